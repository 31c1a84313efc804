"""Trainings that MLflow shows while they run, in the embedded store and on a real server."""

import mlflow
import pytest
from support.registry import candidate

from dgmd_pipeline.registry import live_run, registration
from dgmd_pipeline.registry import store as registry_store

pytest_plugins = ["support.registry"]


@pytest.fixture
def place(store, request):
    name = f"live-{abs(hash(request.node.nodeid))}"
    return live_run.Place(store, name, name)


def runs_of(place):
    client = mlflow.MlflowClient(place.store.uri, place.store.uri)
    experiment = client.get_experiment_by_name(place.experiment)
    return client, client.search_runs([experiment.experiment_id])


def points(client, run):
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "val_accuracy"))


def test_epochs_are_shown_and_the_registration_completes_the_run(place, saved_model, tmp_path):
    training = candidate(tmp_path, saved_model, place.attempt, attempt=place.attempt)
    live_run.LiveRun(place, "jars 2026-11-26 03:00").log_epoch(1, training.history[0])
    live_run.end(place, "KILLED", "terminated")
    _, (run,) = runs_of(place)
    assert (run.info.run_name, run.info.status) == ("jars 2026-11-26 03:00", "KILLED")
    assert run.data.tags["mlflow.note.content"] == "terminated"

    live = live_run.LiveRun(place, "of a later process")
    live.log_epoch(2, training.history[1])
    live.log_epoch(1, training.history[2])  # of fine-tuning, which begins again at 1
    live.log_epoch(3, training.history[0])
    client, (run,) = runs_of(place)
    assert (run.info.run_name, run.info.status) == ("jars 2026-11-26 03:00", "RUNNING")
    assert points(client, run) == [(1, 0.6), (2, 0.8)]
    assert "mlflow.note.content" not in run.data.tags

    version = registration.register(place.store, place.experiment, place.experiment, training)
    live_run.end(place, "FAILED")
    client, (run,) = runs_of(place)
    assert (run.info.run_id, run.info.status) == (version.run_id, "FINISHED")
    assert points(client, run) == [(1, 0.6), (2, 0.8), (3, 0.7)]
    assert run.data.tags["dgmd.training_id"] == place.attempt


@pytest.mark.parametrize(("enabled", "samples"), [(None, 2), ("false", 0), ("perhaps", 0)])
def test_epochs_show_the_load_of_the_machine_unless_it_is_turned_off(place, monkeypatch, caplog, enabled, samples):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1e-9")
    if enabled:
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", enabled)
    live = live_run.LiveRun(place, "jars")
    for number in (1, 2):
        live.log_epoch(number, {"loss": 0.5, "val_accuracy": 0.6, "val_loss": 0.9})
    client, (run,) = runs_of(place)
    assert points(client, run) == [(1, 0.6), (2, 0.6)]
    memory = client.get_metric_history(run.info.run_id, "system/system_memory_usage_percentage")
    assert [(point.step, 0 < point.value < 100) for point in memory] == [(1, True), (2, True)][:samples]
    shown = "MLflow does not show the load of this machine: ValueError: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING value must"
    assert [message[: len(shown)] for message in caplog.messages] == [shown] * (enabled == "perhaps")


def test_a_run_that_shows_other_epochs_is_replaced(place, saved_model, tmp_path):
    training = candidate(tmp_path, saved_model, place.attempt, attempt=place.attempt)
    live_run.LiveRun(place, "jars").log_epoch(1, training.history[2])
    registration.register(place.store, place.experiment, place.experiment, training)
    client, (run,) = runs_of(place)
    assert points(client, run) == [(1, 0.6), (2, 0.8), (3, 0.7)]


def test_a_training_goes_on_without_mlflow(caplog):
    place = live_run.Place(registry_store.Store("http://127.0.0.1:9", None), "jars", "one")
    live = live_run.LiveRun(place, "jars")
    live.log_epoch(1, {"loss": 1.0, "val_loss": 1.0})
    assert [message.split(":")[0] for message in caplog.messages] == [
        "MLflow does not show this training while it runs"
    ]
