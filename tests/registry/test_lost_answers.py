"""Registrations on a real MLflow server whose requests fail, before or after the server has acted."""

import contextlib

import mlflow
import pytest
from support.mlflow_server import Fault, faulty_proxy
from support.registry import candidate

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import live_run, registration, versions
from dgmd_pipeline.registry.store import Store

pytest_plugins = ["support.registry"]
CREATING = [
    "POST experiments/create", "POST runs/create", "POST logged-models", "POST runs/outputs",
    "POST registered-models/create", "POST model-versions/create",
]  # fmt: skip
MODEL = "PUT mlflow-artifacts/artifacts/*/models/*/artifacts"
OTHERS = [
    "GET registered-models/get", "GET experiments/get-by-name", "POST runs/search", "POST runs/log-batch",
    "POST runs/log-inputs", "GET runs/get", "PUT mlflow-artifacts/artifacts/*/*/artifacts/mapping.json",
    "GET logged-models/*", f"{MODEL}/data/model.keras", "PATCH logged-models/*", "POST runs/update",
    "GET model-versions/search", "POST logged-models/search", "POST registered-models/alias",
    "POST runs/set-tag", "PATCH model-versions/update",
]  # fmt: skip
MORE_UPLOADS = [
    "PUT mlflow-artifacts/artifacts/*/*/artifacts/evaluation/metrics.json", f"{MODEL}/requirements.txt",
    f"{MODEL}/MLmodel", f"{MODEL}/python_env.yaml", f"{MODEL}/conda.yaml", f"{MODEL}/mapping.json",
    f"{MODEL}/code/*", f"{MODEL}/data/keras_module.txt",
]  # fmt: skip
RESET, BAD_GATEWAY, OFTEN = 0, 502, 1000


@pytest.fixture(scope="module")
def proxy(mlflow_server):
    with faulty_proxy(mlflow_server) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
        yield found


@pytest.fixture
def client(mlflow_server):
    return mlflow.MlflowClient(mlflow_server, mlflow_server)


@pytest.fixture
def register(proxy, saved_model, tmp_path, request):
    """Register the only training of a model of this test's own."""
    name = f"lost-{abs(hash(request.node.nodeid))}"

    def call():
        return registration.register(Store(proxy.url, None), name, name, candidate(tmp_path, saved_model, name))

    call.name = name
    return call


def registered(client, name):
    """All that MLflow has of a model and its experiment."""
    experiment = client.get_experiment_by_name(name).experiment_id
    state = versions.read(Store(client.tracking_uri, None), name)
    found = {
        "versions": [(version.version, version.aliases) for version in state.versions],
        "runs": [run.info.status for run in client.search_runs([experiment])],
        "models": [model.status for model in client.search_logged_models([experiment])],
    }
    (run,) = client.search_runs([experiment])
    (model,) = client.search_logged_models([experiment])
    return found | {
        "metrics": {metric: len(client.get_metric_history(run.info.run_id, metric)) for metric in run.data.metrics},
        "metrics of the model": {metric.key for metric in model.metrics},
        "params": run.data.params,
        "data sets": [used.dataset.name for used in run.inputs.dataset_inputs],
        "outputs": [output.model_id == model.model_id for output in run.outputs.model_outputs],
        "artifacts": {file.path for file in client.list_artifacts(run.info.run_id)},
        "artifacts of the model": {file.path for file in client.list_logged_model_artifacts(model.model_id)},
    }


COMPLETE = {
    "versions": [(1, ["candidate"])],
    "runs": ["FINISHED"],
    "models": ["READY"],
    "metrics": {"accuracy": 3, "loss": 3, "val_accuracy": 3, "val_loss": 3, "validation_accuracy": 1,
                "system/step_seconds/raw": 1, "system/step_share/raw": 1},
    "metrics of the model": {"validation_accuracy"},
    "params": {"EPOCHS": "3"},
    "data sets": ["s3://bucket/train/images"],
    "outputs": [True],
    "artifacts": {"mapping.json", "evaluation"},
    "artifacts of the model": {"MLmodel", "code", "conda.yaml", "data", "mapping.json", "python_env.yaml",
                               "requirements.txt"},
}  # fmt: skip


def test_the_tests_know_each_endpoint(proxy, register, client):
    proxy.seen.clear()
    assert register().new
    assert set(proxy.seen) == {*CREATING, *OTHERS, *MORE_UPLOADS}
    assert registered(client, register.name) == COMPLETE


@pytest.mark.parametrize("endpoint", CREATING)
def test_a_lost_answer_creates_nothing_twice(endpoint, proxy, register, client):
    with proxy.failing(Fault(endpoint, acted=True, status=RESET), OFTEN):
        assert register().new
    assert registered(client, register.name) == COMPLETE


@pytest.mark.parametrize("acted", [True, False])
@pytest.mark.parametrize("endpoint", ["POST runs/create", "POST runs/search", "POST runs/log-batch", "GET metrics/*"])
def test_a_training_that_was_shown_while_it_ran_is_registered_once(
    endpoint, acted, proxy, saved_model, tmp_path, client, request
):
    name = f"shown-{abs(hash(request.node.nodeid))}"
    store, shown = Store(proxy.url, None), candidate(tmp_path, saved_model, name, attempt=name)
    with proxy.failing(Fault(endpoint, acted=acted, status=RESET), 1):
        live = live_run.LiveRun(live_run.Place(store, name, name), name)
        for number, row in enumerate(shown.history[:2], start=1):
            live.log_epoch(number, row)
    with proxy.failing(Fault(endpoint, acted=acted, status=RESET), OFTEN), contextlib.suppress(PipelineError):
        registration.register(store, name, name, shown)
    registration.register(store, name, name, shown)
    assert registered(client, name) == COMPLETE


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(endpoint, acted=False, status=RESET) for endpoint in [*CREATING, *OTHERS]),
        *(Fault(endpoint, acted=True, status=BAD_GATEWAY) for endpoint in OTHERS),
    ],
    ids=lambda fault: f"{fault.endpoint} {'after' if fault.acted else 'before'}",
)
def test_the_next_registration_after_a_failure_completes_it(fault, proxy, register, client):
    with proxy.failing(fault, OFTEN):
        try:
            register()
        except PipelineError as error:
            assert "could not register the model" in str(error)
    register()
    assert registered(client, register.name) == COMPLETE
