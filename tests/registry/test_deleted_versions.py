"""A registered version that somebody deletes in the registry."""

import json
import os
import subprocess
import sys
import tarfile

import mlflow
import pytest
from conftest import ROOT, environment_with
from test_data_dir_of_before import SETTINGS

from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry.existence import Registered, exists

pytest_plugins = ["support.registry", "support.trained_versions"]
TRAINING = "dgmd.training_id"


@pytest.fixture
def version(store, request):
    """Version 2 of a model of this test's own."""
    name = f"deleted {abs(hash(request.node.nodeid))}"
    client = mlflow.MlflowClient(store.uri, store.uri)
    client.create_registered_model(name)
    client.create_model_version(name, "s3://bucket/one", tags={TRAINING: "one"})
    client.create_model_version(name, "s3://bucket/two", tags={TRAINING: "two"})
    return client, Registered(name, 2, "two")


def test_a_version_exists_until_it_or_its_model_is_deleted(store, version):
    client, wanted = version
    assert exists(store.uri, wanted, {}) is True
    client.delete_model_version(wanted.name, "2")
    assert exists(store.uri, wanted, {}) is False
    assert exists(store.uri, Registered(wanted.name, 1, "one"), {}) is True
    client.delete_registered_model(wanted.name)
    assert exists(store.uri, Registered(wanted.name, 1, "one"), {}) is False


def test_a_version_of_another_training_does_not_count_and_one_without_a_training_does(store, version):
    client, wanted = version
    assert exists(store.uri, wanted._replace(training_id="another"), {}) is False
    client.delete_model_version_tag(wanted.name, "2", TRAINING)
    assert exists(store.uri, wanted, {}) is True


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", "ConnectionError"),
        ("{server}/another/path", "404 Not Found, not an answer of MLflow"),
        ("sqlite:////no/such/mlflow.db", "unable to open database file"),
    ],
)
def test_a_registry_that_does_not_answer_is_a_warning(uri, reason, mlflow_server, caplog):
    assert exists(uri.format(server=mlflow_server), Registered("jars", 1, "one"), {}) is None
    assert reason in caplog.text


def test_other_databases_are_not_asked():
    assert exists("postgresql://somewhere/mlflow", Registered("jars", 1, "one"), {}) is None


@pytest.fixture
def data_dir(tmp_path):
    """A DATA_DIR whose embedded store holds the version of its record, with a run and a model without files."""
    with tarfile.open(ROOT / "tests" / "support" / "data_dirs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "cnn"
    registry_store.create(folder / "mlflow")
    uri, artifacts = registry_store.embedded(folder / "mlflow")
    client = mlflow.MlflowClient(uri, uri)
    mlflow.set_tracking_uri(uri)
    del os.environ["MLFLOW_TRACKING_URI"]  # which this function sets
    record = json.loads((folder / "registered_model" / "_SUCCESS").read_text())
    tags = {TRAINING: record["inputs"]["trained_model"], "environment": "non-production"}
    run = client.create_run(client.create_experiment("dgmd_model", artifact_location=artifacts), tags=tags).info
    model = client.create_logged_model(run.experiment_id, "model", run.run_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.set_terminated(run.run_id)
    client.create_registered_model("dgmd_model")
    client.create_model_version("dgmd_model", f"models:/{model.model_id}", run.run_id, tags=tags)
    return folder, client


def test_a_run_registers_a_training_again_whose_version_was_deleted(data_dir, command):
    folder, client = data_dir
    variables = {**SETTINGS, "BACKBONE": "cnn", "DATA_DIR": folder}
    assert "Nothing to do: dgmd_model version 1 is registered." in command(folder, **variables).stdout
    client.delete_model_version("dgmd_model", "1")
    gone = "dgmd_model version 1 is no longer in the registry: the next run registers the training again."
    healthy = command(folder, "health", **variables)
    assert (healthy.returncode, gone in healthy.stdout) == (0, True)
    models = command(folder, "models", **variables)
    assert (models.returncode, gone in models.stdout) == (20, True)
    again = command(folder, **variables)
    assert again.returncode == 0, again.stdout
    assert "registered_model    run" in again.stdout and "dgmd_model version 1 is no longer" in again.stdout
    new = "dgmd_model version 2, non-production, in place of version 1, which is no longer in the registry"
    assert new in again.stdout and new in command(folder, "health", **variables).stdout
    assert client.get_model_version_by_alias("dgmd_model", "candidate").version == 2
    assert "Nothing to do: dgmd_model version 2 is registered." in command(folder, **variables).stdout


def test_a_run_without_work_does_not_import_mlflow(data_dir):
    folder, _ = data_dir
    code = "import sys; from dgmd_pipeline import cli; assert cli.main() == 0; assert 'mlflow' not in sys.modules"
    environment = environment_with({**SETTINGS, "BACKBONE": "cnn", "DATA_DIR": folder})
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Nothing to do: dgmd_model version 1 is registered." in ran.stdout
