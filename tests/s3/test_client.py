import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from support.s3 import KEYS, send_listing

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.listing import list_objects

pytestmark = pytest.mark.usefixtures("aws_home")


def has_objects(fake_s3):
    """Whether a listing by a new client succeeds."""
    fake_s3(lambda request, _key, _query: send_listing(request, ["train/cat/1.png"]))
    return bool(list_objects(connect(), "images", "train").objects)


def test_importing_the_package_does_not_import_boto3():
    check = "import sys; from dgmd_pipeline.s3 import client, crt, download, errors, listing, sync;"
    check += " sys.exit(any(m.startswith(('boto', 'awscrt')) for m in sys.modules))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize("keys", [{}, KEYS])
def test_requests_are_signed_with_credentials_and_anonymous_without(monkeypatch, fake_s3, keys):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    authorizations = []

    def answer(request, _key, _query):
        authorizations.append(request.headers["Authorization"])
        send_listing(request, ["train/cat/1.png"])

    fake_s3(answer)
    client = connect()
    list_objects(client, "images", "train")
    assert [value is not None and "AKIDEXAMPLE" in value for value in authorizations] == [bool(keys)]
    assert client.meta.region_name == "us-east-1"


def test_a_configured_credentials_file_is_used(monkeypatch, tmp_path, fake_s3):
    path = tmp_path / "keys"
    path.write_text("[work]\naws_access_key_id = AKIDWORK\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "work")

    def answer(request, _key, _query):
        send_listing(request, ["train/cat/1.png"] if "AKIDWORK" in request.headers["Authorization"] else [])

    fake_s3(answer)
    assert list_objects(connect(), "images", "train").objects


@pytest.mark.usefixtures("signed")
def test_keys_in_the_environment_take_precedence_over_a_missing_file(monkeypatch):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file")
    assert connect()


def test_an_empty_default_file_and_empty_variables_mean_no_credentials(monkeypatch, aws_home, fake_s3):
    (aws_home / ".aws").mkdir()
    (aws_home / ".aws/credentials").touch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_CONFIG_FILE", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")
    assert has_objects(fake_s3)


def test_botocore_does_not_load_service_descriptions_from_aws_data_path(monkeypatch, tmp_path, fake_s3):
    models = tmp_path / "train/s3/2099-01-01"
    models.mkdir(parents=True)
    (models / "service-2.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_DATA_PATH", "train")
    assert has_objects(fake_s3)


@pytest.mark.parametrize("variable", ["AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"])
def test_a_configured_file_that_is_missing_or_a_folder_is_an_error(monkeypatch, tmp_path, variable):
    path = tmp_path / "keys"
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(NoUsableInput, match=rf"{path} \({variable}\) does not exist"):
        connect()
    path.mkdir()
    with pytest.raises(NoUsableInput, match=rf"{path} \({variable}\) is a folder, not a file. Docker creates"):
        connect()


def test_a_folder_in_place_of_the_default_credentials_file_is_an_error(aws_home):
    (aws_home / ".aws/credentials").mkdir(parents=True)
    with pytest.raises(NoUsableInput, match=r"\.aws/credentials is a folder"):
        connect()


def test_a_web_identity_token_that_cannot_be_read_is_an_error_without_a_traceback(monkeypatch, caplog):
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/no/such/token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    with pytest.raises(NoUsableInput, match="cannot be used .*/no/such/token"):
        connect()
    assert caplog.records
    assert "Traceback" not in caplog.text
    assert "/no/such/token" in caplog.text


@contextmanager
def without_root_privileges():
    """Run as the user nobody if the tests run as root, which can read every file."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root cannot become another user here")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["keys", ""])
def test_the_error_about_an_unreadable_credentials_file_names_its_owner(monkeypatch, closed):
    import boto3  # noqa: F401 - the user nobody may not be able to read the installed packages

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "keys"
        path.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = s\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
        (folder / closed).chmod(0)
        with without_root_privileges(), pytest.raises(NoUsableInput) as caught:
            user = os.geteuid()
            connect()
        folder.chmod(0o755)
        assert f"{path} (AWS_SHARED_CREDENTIALS_FILE) cannot be read by this process" in str(caught.value)
        assert f"which runs as user {user} (" in str(caught.value)
        assert f"{folder / closed} belongs to user {os.geteuid()} with mode 0" in str(caught.value)
        assert f"chown {user} {folder / closed}" in str(caught.value)
        assert f"docker run --user {os.geteuid()}" in str(caught.value)
        assert f"PIPELINE_USER={os.geteuid()} in .env" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("aws_secret_access_key = wJalrXUtnFEMI\n", "cannot be parsed"),
        ("[default]\nwJalrXUtnFEMI\n", "cannot be parsed"),
        (b"\xff\xfe[default]", "cannot be parsed"),
        ("", r"the profile 'default'. Sections of \S+: none"),
        ("[work]\naws_access_key_id = a\naws_secret_access_key = wJalrXUtnFEMI\n", r"Sections of \S+: \[work\]"),
        ("[default]\naws_secret_access_key = wJalrXUtnFEMI\n", "no aws_access_key_id"),
        ("[default]\naws_access_key_id = a\n", "Partial credentials"),
        ("[default]\naws_access_key_id =\naws_secret_access_key =\n", "are empty"),
        ("[default]\naws_access_key_id = a\naws_secret_access_key = wJalr XUtnFEMI\n", "contain blanks"),
    ],
)
def test_the_error_about_a_credentials_file_without_usable_keys_contains_no_secret(
    monkeypatch, tmp_path, content, sentence
):
    path = tmp_path / "keys"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with pytest.raises(NoUsableInput, match=sentence) as caught:
        connect()
    assert "wJalr" not in str(caught.value)


def test_a_default_file_with_keys_of_another_profile_only_is_an_error(aws_home):
    (aws_home / ".aws").mkdir()
    (aws_home / ".aws/credentials").write_text("[work]\naws_access_key_id = a\naws_secret_access_key = s\n")
    with pytest.raises(NoUsableInput, match=r"for the profile 'default'.*\[work\].*AWS_PROFILE"):
        connect()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"AWS_ACCESS_KEY_ID": "a"}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_SECRET_ACCESS_KEY": "wJalr"}, "AWS_ACCESS_KEY_ID is not"),
        ({**KEYS, "AWS_SECRET_ACCESS_KEY": "wJalr\n"}, "contain blanks"),
        ({"AWS_PROFILE": "work"}, "profile 'work' .* not in the AWS files"),
        ({**KEYS, "AWS_ENDPOINT_URL": "localhost:9000"}, "AWS_ENDPOINT_URL, if set, must look like http://minio:9000"),
        ({**KEYS, "AWS_ENDPOINT_URL": "ftp://user:wJalr@a b"}, "Invalid endpoint"),
        ({**KEYS, "AWS_DEFAULT_REGION": "us east"}, "region"),
    ],
)
def test_the_error_about_incomplete_or_invalid_settings_contains_no_secret(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NoUsableInput, match=sentence) as caught:
        connect()
    assert "wJalr" not in str(caught.value)
