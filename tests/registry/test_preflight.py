"""What a run asks the registry before its first step: a real MLflow server, and servers that answer as a test says."""

import base64
import contextlib
import json

import mlflow
import pytest
from support.http_server import send, serve
from support.tls import Authority

from dgmd_pipeline.errors import PipelineError, SettingsError
from dgmd_pipeline.registry import preflight
from dgmd_pipeline.registry import store as registry_store

pytest_plugins = ["support.registry"]
LATER = "the registration at its end tries again"


def check(uri, experiment="jars", **variables):
    variables = {f"MLFLOW_TRACKING_{name}": value for name, value in variables.items()}
    return preflight.check(registry_store.at(uri), experiment, variables)


@contextlib.contextmanager
def answering(status, body=b"", **later):
    """Start a server; `later` has the JSON for the last part of paths. Give its host and the requests that it got."""
    asked = []

    def answer(request):
        asked.append((request.path, request.headers.get("Authorization")))
        end = request.path.partition("?")[0].rpartition("/")[2]
        if end == "version":
            send(request, status, body)
        elif end in later:
            send(request, 200, json.dumps(later[end]).encode())
        else:
            send(request, 404)

    with serve(answer) as url:
        yield url.removeprefix("http://"), asked


def test_a_server_of_version_3_is_accepted(mlflow_server):
    assert check(mlflow_server) is None


def test_an_older_server_is_refused():
    with (
        answering(200, b"2.22.1") as (host, _),
        pytest.raises(PipelineError, match="is version 2.22.1; .* upgrade the server"),
    ):
        check(f"http://{host}")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
        (403, b"Invalid Host header", "MLFLOW_SERVER_ALLOWED_HOSTS"),
        (502, b"", "answers 502"),
        (200, b"<html>welcome</html>", "does not identify itself as an MLflow server"),
    ],
)
def test_a_server_that_does_not_tell_its_version_is_a_warning(status, body, said):
    with answering(status, body) as (host, _):
        warning = check(f"http://me:s3cr3t@{host}/")
    assert said in warning
    assert LATER in warning
    assert "s3cr3t" not in warning


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("http://me:s3cr3t@127.0.0.1:9/", "Connection refused"), ("http://me:s3cr3t@no such host/", "no such host")],
)
def test_a_server_that_cannot_be_reached_is_a_warning(uri, reason):
    warning = check(uri)
    assert "cannot be reached (" in warning
    assert reason in warning
    assert LATER in warning
    assert "s3cr3t" not in warning


BASIC = "Basic " + base64.b64encode(b"me:p@ss").decode()


@pytest.mark.parametrize(
    ("uri", "variables", "sent"),
    [
        ("http://me:p%40ss@{}", {}, BASIC),
        ("http://{}/", {"USERNAME": "me", "PASSWORD": "p@ss"}, BASIC),
        ("http://{}/", {"USERNAME": "me", "PASSWORD": "p@ss", "TOKEN": "t0ken"}, BASIC),
        ("http://{}/", {"USERNAME": "me", "TOKEN": "t0ken"}, "Bearer t0ken"),
        ("http://{}/", {}, None),
    ],
)
def test_a_login_or_a_token_is_sent_as_a_header(uri, variables, sent):
    with answering(200, b"3.17.2") as (host, asked):
        assert check(uri.format(host), **variables) is None
    assert {login for _, login in asked} == {sent}
    assert [path.partition("?")[0] for path, _ in asked][:2] == ["/version", "/api/2.0/mlflow/experiments/get-by-name"]


def test_a_login_is_taken_from_the_files_of_mlflow_and_netrc(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    credentials = tmp_path / ".mlflow/credentials"
    credentials.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = p@ss\n")
    with answering(200, b"3.17.2") as (host, asked):
        check(f"http://{host}")
        assert {login for _, login in asked} == {BASIC}
        credentials.unlink()
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login net password rc\n")
        asked.clear()
        check(f"http://{host}")
        assert {login for _, login in asked} == {"Basic " + base64.b64encode(b"net:rc").decode()}
    for text in ("mlflow_tracking_password = s3cr3t\n", "[mlflow]\nmlflow_tracking_password = s3cr3t%\n"):
        credentials.write_text(text)
        with pytest.raises(SettingsError, match="credentials cannot be read") as caught:
            check("http://127.0.0.1:9")
        assert "s3cr3t" not in str(caught.value)


def test_a_proxy_is_used(monkeypatch):
    with answering(200, b"3.17.2") as (proxy, asked):
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy}")
        assert check("http://mlflow.example.org") is None
    assert asked[0][0] == "http://mlflow.example.org/version"


def test_the_certificate_of_a_private_authority(tmp_path, monkeypatch):
    authority = Authority(tmp_path)
    with answering(200, b"3.17.2") as (host, _), authority.in_front_of(f"http://{host}") as uri:
        warning = check(uri)
        assert "certificate verify failed" in warning
        assert "set MLFLOW_TRACKING_SERVER_CERT_PATH to the authority's file" in warning
        assert check(uri, SERVER_CERT_PATH=str(authority.certificate)) is None
        assert check(uri, INSECURE_TLS="true") is None
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
        assert check(uri) is None
        with pytest.raises(PipelineError, match="missing.pem: correct MLFLOW_TRACKING_CLIENT_CERT_PATH"):
            check(uri, CLIENT_CERT_PATH="missing.pem")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"INSECURE_TLS": "yes"}, "MLFLOW_TRACKING_INSECURE_TLS=yes: expected true or false"),
        ({"INSECURE_TLS": "1", "SERVER_CERT_PATH": "ca.pem"}, "INSECURE_TLS and MLFLOW_TRACKING_SERVER_CERT_PATH are"),
    ],
)
def test_variables_that_mlflow_refuses_after_the_training_are_refused_before(variables, said):
    with pytest.raises(SettingsError, match=said):
        check("http://127.0.0.1:9", **variables)


def test_an_experiment_of_a_server_in_a_folder_that_is_not_here_is_refused(mlflow_server, tmp_path):
    client = mlflow.MlflowClient(mlflow_server, mlflow_server)
    client.create_experiment("away", artifact_location="/srv/of/the/server/7")
    client.create_experiment("shared", artifact_location=(tmp_path / "shared" / "8").as_uri())
    with pytest.raises(PipelineError, match=r"write the artifacts of away to /srv/of/the/server/7, .*--no-serve-artif"):
        check(mlflow_server, "away")
    with pytest.raises(PipelineError, match="artifacts of shared to file:"):
        check(mlflow_server, "shared")
    (tmp_path / "shared").mkdir()
    assert check(mlflow_server, "shared") is None
    assert check(mlflow_server, "not made yet") is None


@pytest.mark.parametrize(
    ("location", "refused"),
    [("/srv/mlruns/2", True), ("./mlruns/2", True), ("mlflow-artifacts:/2", False), ("s3://jars/2", False)],
)
def test_a_new_experiment_of_a_server_is_expected_where_the_latest_one_is(location, refused):
    chosen = {"artifact_location": "file:///chosen/by/its/maker", "experiment_id": "3"}
    found = {"search": {"experiments": [chosen, {"artifact_location": location, "experiment_id": "2"}]}}
    with (
        answering(200, b"3.17.2", **found) as (host, _),
        pytest.raises(PipelineError, match=location) if refused else contextlib.nullcontext(),
    ):
        assert check(f"http://{host}") is None


def test_an_experiment_of_a_database_that_is_not_beside_it(embedded_store, tmp_path):
    client = mlflow.MlflowClient(embedded_store.uri, embedded_store.uri)
    (tmp_path / "mlruns").mkdir()
    client.create_experiment("in another folder", artifact_location=f"{tmp_path}/mlruns/1")
    client.create_experiment("in a lost folder", artifact_location="/of/a/container/mlruns/1")
    client.create_experiment("in a bucket", artifact_location="s3://jars/1")
    assert check(embedded_store.uri, "new") is None
    assert check(embedded_store.uri, "in a bucket") is None
    assert "not beside" in check(embedded_store.uri, "in another folder")
    with pytest.raises(PipelineError, match="artifacts in /of/a/container/mlruns/1, which is not a writable folder"):
        check(embedded_store.uri, "in a lost folder")
    assert check(f"sqlite:///{tmp_path}/new.db") is None
    assert not (tmp_path / "new.db").exists()
