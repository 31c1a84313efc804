"""A run with --only-if-better whose promotion fails, on a real MLflow server."""

import json
import shutil

import pytest
from support.http_server import serve
from support.mlflow_server import Fault, FaultyProxy, endpoint, served
from support.trained_versions import NAME, client_of

pytest_plugins = ["support.trained_versions"]
LOOK, CHANGE = "GET registered-models/alias", "POST registered-models/alias"  # to find and to set production
RESET, OFTEN = 0, 1000


class BusyProxy(FaultyProxy):
    """A proxy that lets another operator change something before a promotion looks at production."""

    meanwhile = None

    def answer(self, request):
        if self.meanwhile and endpoint(request.command, request.path) == LOOK:
            self.meanwhile()
        super().answer(request)


@pytest.fixture
def better(trained, tmp_path, monkeypatch):
    """A copy of the two versions in which version 2 is better than production: the server, a proxy, the variables."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.folder, folder)
    run = trained.client.get_model_version(NAME, "2").run_id
    (file,) = folder.glob(f"mlflow/artifacts/*/{run}/artifacts/evaluation/comparison.json")
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.001})
    )
    for name, value in {"MAX_RETRIES": "1", "BACKOFF_FACTOR": "0", "BACKOFF_JITTER": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    with served(folder / "mlflow") as uri, serve((proxy := BusyProxy(uri)).answer) as proxy.url:
        record = folder / "data/evaluation/_SUCCESS"  # the evaluation need not be repeated for the address of the copy
        values = json.loads(record.read_text())
        values["settings"]["mlflow_tracking_uri"] = proxy.url
        record.write_text(json.dumps(values))
        own = {"DATA_DIR": folder / "data", "MLFLOW_TRACKING_URI": proxy.url, "LEARNING_RATE": 0.003}
        yield proxy, {**trained.variables, **own}


def test_a_night_whose_promotion_fails_says_so_and_what_is_registered(better, command, json_of, tmp_path, listener):
    proxy, variables = better
    url, told = listener
    server = client_of({"MLFLOW_TRACKING_URI": f"http://{proxy.server}"})

    def run():
        result = command(tmp_path, "run", "--force", "register", "--only-if-better", **variables, NOTIFY_URL=url)
        assert result.returncode == 30, result.stdout
        assert "Traceback" not in result.stdout + result.stderr
        status = json.loads((variables["DATA_DIR"] / "status.json").read_text())
        assert (status["outcome"], status["exit_code"], status["step"]) == ("failed", 30, None), result.stdout
        assert (status["version"], status["verdict"] is None, status["report"] is None) == (2, False, False)
        assert told[-1]["message"] == status["message"]
        assert status["message"].startswith("jars version 2, already registered. Accuracy ")
        *_, last = result.stdout.splitlines()  # it is nowhere else
        assert result.stdout.count("PROMOTE_IF_BETTER") == status["message"].count("PROMOTE_IF_BETTER") == 1
        assert last.endswith("Later runs do not try again: use `promote 2`.")
        assert "error: Version 2 is registered, but PROMOTE_IF_BETTER failed: " in last
        assert "Report: " in result.stdout and "Where the time went" in result.stdout
        health = command(tmp_path, "health", **variables)
        assert health.returncode == 1 and "PROMOTE_IF_BETTER failed" in health.stdout
        return last

    def production():
        rows = json_of(tmp_path, "models", **variables)
        return [row["version"] for row in rows if row["environment"] == "production"]

    with proxy.failing(Fault(CHANGE, acted=False, status=502), OFTEN):
        assert f"MLflow at {proxy.url} " in run()
    assert production() == [1]
    proxy.meanwhile = lambda: server.delete_registered_model_alias(NAME, "production")
    assert "No version is production any more: another change was made meanwhile." in run()
    proxy.meanwhile = None
    server.set_registered_model_alias(NAME, "production", "1")
    with proxy.failing(Fault(CHANGE, acted=True, status=RESET), OFTEN):
        run()
    assert production() == [2]  # the server has acted, and `models` shows it
    outcomes = [(event["version"], event["done"]) for event in json_of(tmp_path, "history", **variables)]
    assert outcomes[-2:] == [(2, False), (2, True)]
