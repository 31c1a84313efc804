"""Registrations in the embedded store and on a real MLflow server over HTTP."""

import concurrent.futures
import json
import os
import subprocess
import sys

import mlflow
import numpy as np
import pytest
from support.registry import candidate

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import registration, versions
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.training.networks import load

pytest_plugins = ["support.registry"]


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
    registration.add_metrics(store, version, {"system/step_seconds/registered_model": 2.5})
    client = mlflow.MlflowClient(store.uri, store.uri)
    run = client.get_run(version.run_id)
    times = {name: value for name, value in run.data.metrics.items() if name.startswith("system/")}
    assert times == {
        "system/step_seconds/raw": 12.5,
        "system/step_share/raw": 1.0,
        "system/step_seconds/registered_model": 2.5,
    }
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert [metric.key for metric in model.metrics] == ["validation_accuracy"]


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
probabilities = model.predict(images[:2])
for count in (1, 2, 9):
    for row, best in zip(probabilities, model.predict(images[:2], params={{"top_k": count}}), strict=True):
        expected = sorted(zip(row.tolist(), ("anise", "mint")), reverse=True)[:count]
        assert best == [{{"label": label, "probability": probability}} for probability, label in expected]
for wrong in (-1, "two", 1.5):
    try:
        model.predict(images, params={{"top_k": wrong}})
    except mlflow.exceptions.MlflowException:
        continue
    raise AssertionError(wrong)
assert "dgmd_pipeline" not in sys.modules
assert mlflow.keras.load_model("models:/quiet/1").output_shape == (None, 2)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [stream.partition("predicting\n")[2] for stream in (done.stdout, done.stderr)] == ["", ""]
    # In two processes, the order of the operations differs, and so do the last bits of the results.
    expected = load(saved_model).predict(images, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "predictions.npy"), expected, rtol=1e-6)


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


@pytest.fixture
def repeated(store, saved_model, tmp_path, request):
    """A registration that was repeated by an older client: its name, a client and a function that registers again."""
    name = f"repeated-{abs(hash(request.node.nodeid))}"
    version = registration.register(store, name, name, candidate(tmp_path, saved_model))
    client = mlflow.MlflowClient(store.uri, store.uri)
    mlflow.set_tracking_uri(store.uri)
    run = client.get_run(version.run_id)
    experiment, tags = run.info.experiment_id, client.get_model_version(name, "1").tags
    model_id = run.outputs.model_outputs[0].model_id
    client.create_model_version(name, f"models:/{model_id}", version.run_id, tags=tags, model_id=model_id)
    other = client.create_run(experiment, tags=run.data.tags).info.run_id
    client.create_logged_model(experiment, "model", other)
    client.create_logged_model(experiment, "model", version.run_id)
    client.create_logged_model(experiment, "of somebody else", version.run_id)

    def again():
        assert registration.register(store, name, name, candidate(tmp_path, saved_model)) == version._replace(new=False)
        models = client.search_logged_models([experiment])
        assert {model.model_id for model in models if model.name == "model"} == {model_id}
        assert [model.name for model in models if model.model_id != model_id] == ["of somebody else"]
        return [run.info.run_id for run in client.search_runs([experiment])]

    return name, client, again, [version.run_id, other]


def test_what_repeated_requests_created_is_deleted(store, repeated):
    name, _, again, (run_id, _) = repeated
    assert again() == [run_id]
    (version,) = versions.read(store, name).versions
    assert (version.version, version.aliases) == (1, ["candidate"])


def test_a_second_version_that_is_in_use_is_not_deleted(store, repeated, caplog):
    name, client, again, (run_id, _) = repeated
    client.set_registered_model_alias(name, "champion", "2")
    assert again() == [run_id]
    assert [version.version for version in versions.read(store, name).versions] == [2, 1]
    assert "Version 2 is not deleted, because it is in use" in caplog.text


def test_the_run_of_another_models_version_is_not_deleted(store, repeated):
    name, client, again, (run_id, other) = repeated
    client.create_registered_model(f"{name}-other")
    client.create_model_version(f"{name}-other", f"runs:/{other}/model", other)
    experiment = client.get_run(other).info.experiment_id
    (model,) = client.search_logged_models([experiment], f"source_run_id = '{other}'")
    client.delete_logged_model(model.model_id)
    assert sorted(again()) == sorted([run_id, other])


def test_a_run_or_model_that_the_environment_names_is_not_used(store, saved_model, tmp_path, request, monkeypatch):
    name = f"inherited-{request.node.callspec.id}"
    for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.setenv(variable, "0" * 32)
    monkeypatch.setenv("MLFLOW_ACTIVE_MODEL_ID", "m-" + "0" * 32)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # MLflow reads the active model once in each thread
        values = store, name, name, candidate(tmp_path, saved_model)
        version = thread.submit(registration.register, *values).result()
    client = mlflow.MlflowClient(store.uri, store.uri)
    run = client.get_run(version.run_id)
    assert run.info.experiment_id == client.get_experiment_by_name(name).experiment_id
    assert run.data.metrics["validation_accuracy"] == 0.8


def test_the_name_of_long_data_is_shortened(store, saved_model, tmp_path, request):
    name, source = f"far-{request.node.callspec.id}", "s3://bucket/" + "deep/" * 204
    version = registration.register(store, name, name, candidate(tmp_path, saved_model, source=source))
    run = mlflow.MlflowClient(store.uri, store.uri).get_run(version.run_id)
    dataset = run.inputs.dataset_inputs[0].dataset
    assert dataset.name == source[:499] + "…"
    assert json.loads(dataset.source) == {"uri": source}


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
