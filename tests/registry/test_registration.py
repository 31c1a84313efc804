"""Registrations in the embedded store and on a real MLflow server over HTTP."""

import json
import os
import subprocess
import sys

import mlflow
import numpy as np
import pytest

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import registration, versions
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.training.networks import load

pytest_plugins = ["support.registry"]


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    import keras

    images = keras.Input((None, None, 3), dtype="uint8")
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(images))
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras.Model(images, keras.layers.Dense(2, activation="softmax")(pooled)).save(path)
    return path


def candidate(folder, model, training_id="one", **changes):
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "metrics.json").write_text("{}")
    (folder / "mapping.json").write_text(json.dumps({"0": "anise", "1": "mint"}))
    history = [
        {"accuracy": 0.5, "loss": 1.0, "val_accuracy": 0.6, "val_loss": 0.9},
        {"accuracy": 0.7, "loss": 0.8, "val_accuracy": 0.8, "val_loss": 0.7},
        {"accuracy": 0.9, "loss": 0.6, "val_accuracy": 0.7, "val_loss": 0.8},
    ]
    values = {
        "training_id": training_id,
        "model": lambda: load(model),
        "labels": ["anise", "mint"],
        "params": {"EPOCHS": 3},
        "history": history,
        "metrics": {"evaluation_accuracy": 0.8},
        "times": {"step_seconds/raw": 12.5, "step_share/raw": 1.0},
        "tags": {"dgmd.version": "0.1.0"},
        "source": "s3://bucket/train/images",
        "source_digest": "a" * 64,
        "files": {folder / "mapping.json": "", folder / "evaluation": "evaluation"},
    }
    return registration.Candidate(**{**values, **changes})


def test_a_training_is_registered_once(store, saved_model, tmp_path, request):
    name = f"often-{request.node.callspec.id}"
    first = registration.register(store, name, name, candidate(tmp_path, saved_model))
    again = registration.register(store, name, name, candidate(tmp_path, saved_model))
    assert (first.version, first.new) == (1, True)
    assert again == first._replace(new=False)
    other = registration.register(store, name, name, candidate(tmp_path, saved_model, "two"))
    assert (other.version, other.new) == (2, True)
    client = mlflow.MlflowClient(store.uri, store.uri)
    assert int(client.get_model_version_by_alias(name, "candidate").version) == 2
    assert len(client.search_runs([client.get_experiment_by_name(name).experiment_id])) == 2
    assert not (tmp_path / "mlruns").exists()


def test_each_epoch_is_a_step_of_the_metrics(store, saved_model, tmp_path, request):
    name = f"epochs-{request.node.callspec.id}"
    version = registration.register(store, name, name, candidate(tmp_path, saved_model))
    client = mlflow.MlflowClient(store.uri, store.uri)
    points = client.get_metric_history(version.run_id, "val_accuracy")
    assert [point.value for point in sorted(points, key=lambda point: point.step)] == [0.6, 0.8, 0.7]
    assert client.get_run(version.run_id).data.metrics["val_accuracy"] == 0.7


def test_a_long_history_is_logged_completely(store, saved_model, tmp_path, request):
    name = f"long-{request.node.callspec.id}"
    history = [dict.fromkeys(("accuracy", "loss", "val_accuracy", "val_loss"), float(epoch)) for epoch in range(400)]
    version = registration.register(store, name, name, candidate(tmp_path, saved_model, history=history))
    client = mlflow.MlflowClient(store.uri, store.uri)
    for metric in history[0]:
        points = client.get_metric_history(version.run_id, metric)
        values = {point.step: point.value for point in points}
        assert len(points) == 400
        assert values == {epoch + 1: float(epoch) for epoch in range(400)}


def test_step_times_belong_to_the_run_and_evaluation_metrics_also_to_the_model(store, saved_model, tmp_path, request):
    name = f"times-{request.node.callspec.id}"
    version = registration.register(store, name, name, candidate(tmp_path, saved_model))
    registration.add_metrics(store, version, {"step_seconds/registered_model": 2.5})
    client = mlflow.MlflowClient(store.uri, store.uri)
    run = client.get_run(version.run_id)
    times = {name: value for name, value in run.data.metrics.items() if name.startswith("step_")}
    assert times == {"step_seconds/raw": 12.5, "step_share/raw": 1.0, "step_seconds/registered_model": 2.5}
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert [metric.key for metric in model.metrics] == ["evaluation_accuracy"]


def test_a_consumer_without_this_package_gets_the_same_predictions_and_no_output(embedded_store, saved_model, tmp_path):
    registration.register(embedded_store, "quiet", "quiet", candidate(tmp_path, saved_model))
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = f"""
import sys, mlflow, numpy as np
mlflow.set_tracking_uri({embedded_store.uri!r})
model = mlflow.pyfunc.load_model("models:/quiet/1")
images = np.load("images.npy")
for stream in (sys.stdout, sys.stderr):
    print("predicting", file=stream, flush=True)
np.save("predictions.npy", model.predict(images))
assert "dgmd_pipeline" not in sys.modules
assert mlflow.keras.load_model("models:/quiet/1").output_shape == (None, 2)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [stream.partition("predicting\n")[2] for stream in (done.stdout, done.stderr)] == ["", ""]
    assert np.array_equal(np.load(tmp_path / "predictions.npy"), load(saved_model).predict(images, verbose=0))


def test_an_incomplete_run_is_logged_again(embedded_store, saved_model, tmp_path):
    # MLflow notices the missing file after it has started the run.
    incomplete = candidate(tmp_path, saved_model, files={tmp_path / "nowhere": ""})
    with pytest.raises(PipelineError, match=r"could not register the model: .*nowhere"):
        registration.register(embedded_store, "cut", "cut", incomplete)
    version = registration.register(embedded_store, "cut", "cut", candidate(tmp_path, saved_model))
    client = mlflow.MlflowClient(embedded_store.uri, embedded_store.uri)
    runs = client.search_runs([client.get_experiment_by_name("cut").experiment_id])
    assert [run.info.run_id for run in runs] == [version.run_id]


def test_a_complete_run_without_a_version_is_reused(embedded_store, saved_model, tmp_path):
    first = registration.register(embedded_store, "shared", "first", candidate(tmp_path, saved_model))
    second = registration.register(embedded_store, "shared", "second", candidate(tmp_path, saved_model))
    assert second.new
    assert second.run_id == first.run_id
    client = mlflow.MlflowClient(embedded_store.uri, embedded_store.uri)
    assert client.get_run(first.run_id).info.lifecycle_stage == "active"
    assert mlflow.pyfunc.load_model("models:/second/1").metadata.metadata["labels"] == ["anise", "mint"]


def test_a_promoted_version_does_not_become_the_candidate_again(embedded_store, saved_model, tmp_path):
    registration.register(embedded_store, "promoted", "promoted", candidate(tmp_path, saved_model))
    client = mlflow.MlflowClient(embedded_store.uri, embedded_store.uri)
    client.delete_registered_model_alias("promoted", "candidate")
    client.set_model_version_tag("promoted", "1", "environment", "production")
    registration.register(embedded_store, "promoted", "promoted", candidate(tmp_path, saved_model))
    assert client.get_model_version("promoted", "1").aliases == []


def test_a_deleted_experiment_is_explained(embedded_store, saved_model, tmp_path):
    registration.register(embedded_store, "deleted", "deleted", candidate(tmp_path, saved_model))
    client = mlflow.MlflowClient(embedded_store.uri, embedded_store.uri)
    client.delete_experiment(client.get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(PipelineError, match="has been deleted. Restore it"):
        registration.register(embedded_store, "deleted", "deleted", candidate(tmp_path, saved_model, "two"))


def test_an_error_does_not_show_the_login_of_a_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(PipelineError, match="did not answer as expected") as caught:
        versions.read(registry_store.Store("http://me:pa55word@127.0.0.1:9", None), "jars")
    assert "pa55word" not in str(caught.value)
