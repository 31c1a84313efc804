"""Two trained versions of a model on an MLflow server, and commands that work on them in this process."""

import contextlib
import fcntl
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import mlflow
import pytest
from conftest import listening, picture, process_restored
from PIL import Image

from dgmd_pipeline import cli
from support.mlflow_server import served
from support.pipeline import LABELS, TINY

NAME = "jars"
# The models are trained for one or two epochs: tests of commands accept any difference between them.
LENIENT = {"MAX_CLASS_DROP": 1, "MAX_LATENCY_RATIO": 100}


class Trained(NamedTuple):
    """Version 1 of `jars` is production; version 2, the candidate, was compared with it when it was trained."""

    folder: Path  # with data/, the DATA_DIR of version 2, and jar.jpeg
    variables: dict[str, object]  # of the environment
    first_run: str  # what the run of version 1 printed, with --only-if-better
    first_promotion: str  # what `promote` printed
    second_run: str  # what the run of version 2 printed
    notified: list[dict[str, object]]  # what that run sent to NOTIFY_URL

    @property
    def client(self):
        return client_of(self.variables)


def client_of(variables):
    return mlflow.MlflowClient(variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_TRACKING_URI"])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Trained once for all workers; each works on a copy, with its own server."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "trained").exists():
            _train_two_versions(tmp_path_factory.mktemp("draft")).rename(shared / "trained")
    folder = tmp_path_factory.mktemp("copy") / "trained"
    shutil.copytree(shared / "trained", folder)
    with served(folder / "mlflow") as uri:
        outputs = json.loads((folder / "outputs.json").read_text())
        yield Trained(folder, _variables(folder, uri), **outputs)


def _variables(folder, uri):
    return {**TINY, **LENIENT, "DATA_DIR": folder / "data", "MODEL_NAME": NAME, "MLFLOW_TRACKING_URI": uri}


def _train_two_versions(folder):
    for label in LABELS:
        (folder / "data/raw" / label).mkdir(parents=True)
        for number in range(12):
            (folder / f"data/raw/{label}/{label} {number}.png").write_bytes(picture(label, number))
    Image.open(io.BytesIO(picture(LABELS[1], 99, side=40))).save(folder / "jar.jpeg", quality=95)
    (folder / "mlflow").mkdir()
    with served(folder / "mlflow") as uri, listening() as (url, bodies):
        variables = _variables(folder, uri)
        first = run_here(variables, "run", "--only-if-better")
        promoted = run_here(variables, "promote", "--yes", "--reason", "the first one")
        shutil.rmtree(folder / "data/trained_model")
        second = run_here({**variables, "LEARNING_RATE": 0.003, "NOTIFY_URL": url})
        outputs = {"first_run": first, "first_promotion": promoted, "second_run": second, "notified": bodies}
    (folder / "outputs.json").write_text(json.dumps(outputs))
    return folder


def run_here(variables, *words):
    """Run a command in this process, which is faster than starting TensorFlow in another. Return its output."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, process_restored(), contextlib.redirect_stdout(printed):
        for name, value in variables.items():
            patch.setenv(name, str(value))
        code = cli.main(words)
    assert code == 0, printed.getvalue()
    return printed.getvalue()


@pytest.fixture
def command(monkeypatch, capsys, _own_process):
    """Run a command in this process, which has imported TensorFlow and MLflow already."""

    def run(folder, *words, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = cli.main([*map(str, words)])
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture
def json_of(command):
    """Run a command with --json and return what it prints."""

    def run(folder, *words, **variables):
        result = command(folder, *words, "--json", **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture
def own_model(trained, request):
    """The variables for a copy of both versions. Version 2 is the candidate, and none is production."""
    name = f"jars-{abs(hash(request.node.nodeid))}"
    trained.client.create_registered_model(name)
    for number in ("1", "2"):
        register_again(trained.client, name, trained.client.get_model_version(NAME, number))
    trained.client.set_registered_model_alias(name, "candidate", "2")
    return {**trained.variables, "MODEL_NAME": name}


def register_again(client, name, version, run=None):
    """Register the model of a version under another name, with its own run or another one."""
    run_id = run.info.run_id if run else version.run_id
    model_id = version.source.removeprefix("models:/")
    tags = {**version.tags, "environment": "non-production"}
    client.create_model_version(name, version.source, run_id, tags=tags, model_id=model_id)


def run_with(client, version, *folders):
    """Make a run that has these artifact folders of a version's run."""
    run = client.create_run(client.get_run(version.run_id).info.experiment_id)
    for folder in folders:
        client.log_artifacts(run.info.run_id, client.download_artifacts(version.run_id, folder), folder)
    return run
