"""Runs over TLS, with servers whose certificates only a private authority has signed."""

import os
import re

import pytest
from conftest import CREDENTIALS, run_pipeline
from support.pipeline import TINY, fill
from support.tls import Authority

from dgmd_pipeline import settings
from dgmd_pipeline.certificates import VARIABLES
from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.download import download


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def secure_s3(authority, s3_endpoint):
    with authority.in_front_of(s3_endpoint) as address:
        yield address


@pytest.mark.slow
def test_a_run_registers_a_version_with_servers_of_a_private_authority(
    secure_s3, authority, bucket, mlflow_server, tmp_path
):
    name, client = bucket
    fill(client, name, images=4)
    variables = {
        **TINY,
        **CREDENTIALS,
        "DATA_DIR": tmp_path / "data",
        "AWS_ENDPOINT_URL": secure_s3,
        "AWS_DATA_BUCKET": name,
        "AWS_DATA_PATH": "train/images",
        "MODEL_NAME": name,
    }
    with authority.in_front_of(mlflow_server) as address:
        variables["MLFLOW_TRACKING_URI"] = address
        refused = run_pipeline(tmp_path, "--until", "label", **variables)
        assert refused.returncode == 20
        assert "AWS_CA_BUNDLE" in refused.stdout
        trusted = {"AWS_CA_BUNDLE": authority.certificate, "MLFLOW_TRACKING_SERVER_CERT_PATH": authority.certificate}
        done = run_pipeline(tmp_path, **variables, **trusted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name} version 1, non-production" in done.stdout
    assert "cannot be reached" not in done.stdout


@pytest.mark.usefixtures("signed")
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_both_clients_of_s3_trust_the_authority(variable, secure_s3, authority, bucket, monkeypatch, tmp_path):
    name, client = bucket
    keys = [f"a/{number}" for number in range(12)]
    etags = [client.put_object(Bucket=name, Key=key, Body=b"abc")["ETag"].strip('"') for key in keys]
    objects = [SourceObject(key, 3, etag, key) for key, etag in zip(keys, etags, strict=True)]
    monkeypatch.setenv("AWS_ENDPOINT_URL", secure_s3)
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, str(authority.certificate))
    client, by_botocore = connect(), []
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: by_botocore.append(request.url))
    assert set(download(client, name, objects, tmp_path / "raw", threads=1)) == set(objects)
    assert len(by_botocore) == 1


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_names_no_file_of_certificates_is_a_mistake(variable, authority, monkeypatch, tmp_path):
    (tmp_path / "empty.pem").touch()
    (tmp_path / "folder").mkdir()
    for path, problem in (
        ("missing.pem", "cannot be read (No such file or directory)"),
        ("empty.pem", "contains no certificate"),
        ("folder", "is a folder"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / path))
        with pytest.raises(SettingsError, match=rf"^{variable}={tmp_path / path}: .*{re.escape(problem)}"):
            settings.load()
    monkeypatch.setenv(variable, str(authority.certificate))
    settings.load()


@pytest.mark.parametrize("variable", settings.UNSET_IF_EMPTY)
def test_an_empty_variable_counts_as_unset(variable, monkeypatch):
    """MLflow would not verify the server."""
    monkeypatch.setenv(variable, "")
    settings.load()
    assert variable not in os.environ
