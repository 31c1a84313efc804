"""A trained model and its measurements -> a run and a version in MLflow."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry import versions
from dgmd_pipeline.registry.store import Store

if TYPE_CHECKING:
    import keras
    from mlflow import MlflowClient
    from mlflow.models import Model

TRAINING_ID = "dgmd.training_id"
LOADER = "dgmd_served"  # the name of pyfunc.py among a registered model's files, and in the consumer's process


class Version(NamedTuple):
    """A version in the registry."""

    name: str
    version: int
    run_id: str
    new: bool  # created just now, and not found from an earlier try


class Candidate(NamedTuple):
    """What is logged and registered."""

    training_id: str  # a version with this tag is this training's
    model: Callable[[], "keras.Model"]  # called if needed; uint8 [n, height, width, 3] -> float32 [n, classes]
    labels: Sequence[str]  # of the outputs, in their order
    params: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]  # metrics of each epoch, the first one is epoch 1
    metrics: Mapping[str, float]  # of the evaluation, data counts and the like
    times: Mapping[str, float]  # metrics of the run's steps, which say nothing about the model
    tags: Mapping[str, str]
    source: str  # URI of the data, s3://...
    source_digest: str  # identity of the data
    files: Mapping[Path, str]  # a file or folder -> the artifact folder it goes to, "" for the top


def git_revision(path: Path) -> str | None:
    """Return the commit of the checkout that `path` is in, or None outside of one."""
    from mlflow.utils.git_utils import get_git_commit

    return get_git_commit(str(path))


def register(store: Store, experiment: str, name: str, candidate: Candidate) -> Version:
    """Log a run and create a non-production version with alias `candidate`, or find the one of this training.

    The version is created with its tags in one call, so that whoever is stopped after it finds it by the training's
    id. A run of this training that was cut off is deleted and made anew, one that is complete is used.

    Raises PipelineError where MLflow cannot be reached or refuses; the client has retried by then.
    """
    import mlflow
    from mlflow import MlflowClient

    with registry_store.explained(store):
        mlflow.set_tracking_uri(store.uri)
        client = MlflowClient()
        found = _find(client, name, candidate.training_id)
        if found is None:
            experiment_id = _experiment(client, experiment, store.artifacts)
            logged = _logged(client, experiment_id, candidate.training_id)
            run_id, model_uri = logged or _log(client, experiment_id, candidate)
            found = _create(client, name, model_uri, run_id, candidate)
        _mark_as_candidate(client, found)
        return found


def run_url(store: Store, version: Version) -> str:
    """Return the address of a version's run: its page on a server, else the URI of the store and the run's id."""
    from mlflow import MlflowClient

    with registry_store.explained(store):
        experiment = MlflowClient(store.uri).get_run(version.run_id).info.experiment_id
    shown = redact(store.uri).rstrip("/")
    return f"{shown}/#/experiments/{experiment}/runs/{version.run_id}" if shown.startswith("http") else shown


def code_tags(revision: str | None) -> dict[str, str]:
    """Return the tags of a version that name the code it was made by."""
    revision = revision or git_revision(Path(__file__)) or "unknown"
    return {"dgmd.version": installed("dgmd_pipeline"), "dgmd.git_revision": revision}


def add_metrics(store: Store, version: Version, metrics: Mapping[str, float]) -> None:
    """Log metrics to the run of a version that is registered.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with registry_store.explained(store):
        _log_metrics(MlflowClient(store.uri), version.run_id, [metrics])


def _find(client: "MlflowClient", name: str, training_id: str) -> Version | None:
    for version in client.search_model_versions(f"name = '{name}' and tags.`{TRAINING_ID}` = '{training_id}'"):
        return Version(name, int(version.version), version.run_id or "", new=False)
    return None


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=artifacts)
    if experiment.lifecycle_stage != "active":
        raise PipelineError(
            f"The MLflow experiment {name} has been deleted. Restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or set MLFLOW_EXPERIMENT_NAME to another one."
        )
    return experiment.experiment_id


def _logged(client: "MlflowClient", experiment_id: str, training_id: str) -> tuple[str, str] | None:
    """Return run id and model URI of this training where they are complete; delete runs that were cut off."""
    complete = None
    for found in client.search_runs([experiment_id], f"tags.`{TRAINING_ID}` = '{training_id}'"):
        run = client.get_run(found.info.run_id)
        models = run.outputs.model_outputs if run.outputs else []
        if run.info.status == "FINISHED" and models:
            complete = run.info.run_id, f"models:/{models[0].model_id}"
        else:
            client.delete_run(run.info.run_id)
    return complete


def _log(client: "MlflowClient", experiment_id: str, candidate: Candidate) -> tuple[str, str]:
    """Log everything about a training as one run and return the run's id and the model's URI."""
    import mlflow
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.models import Model

    model = candidate.model()
    tags = {**candidate.tags, TRAINING_ID: candidate.training_id}
    with mlflow.start_run(experiment_id=experiment_id, tags=tags) as run:
        mlflow.log_params(dict(candidate.params), synchronous=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder MLflow says that it may be a folder
            source = resolve_dataset_source(candidate.source)
        dataset = MetaDataset(source, name=candidate.source, digest=candidate.source_digest[:16])  # type: ignore[abstract]
        mlflow.log_input(dataset, context="training")
        _log_metrics(client, run.info.run_id, [candidate.metrics, *candidate.history])
        for path, folder in candidate.files.items():
            if path.is_dir():
                mlflow.log_artifacts(str(path), folder)
            else:
                mlflow.log_artifact(str(path), folder)
        info = Model.log(
            artifact_path=None,
            flavor=_QuietKeras,
            name="model",
            model=model,
            signature=_signature(len(candidate.labels)),
            pip_requirements=_requirements(),
            metadata={"labels": list(candidate.labels)},
        )
        mapping = next(path for path in candidate.files if path.name == "mapping.json")
        client.log_model_artifact(info.model_id, str(mapping))
        _log_metrics(client, run.info.run_id, [candidate.times])  # what is there before the model becomes the model's
    return run.info.run_id, info.model_uri


class _QuietKeras:
    """MLflow's Keras flavour, whose Python function is that of `pyfunc.py`."""

    @staticmethod
    def save_model(path: str, mlflow_model: "Model", **options: Any) -> None:
        import mlflow.keras

        mlflow.keras.save_model(path=path, mlflow_model=mlflow_model, **options)
        code = Path(path) / "code"
        code.mkdir()
        shutil.copyfile(Path(__file__).with_name("pyfunc.py"), code / f"{LOADER}.py")
        mlflow_model.flavors["python_function"] |= {"loader_module": LOADER, "code": code.name}
        mlflow_model.save(str(Path(path) / "MLmodel"))


def _log_metrics(client: "MlflowClient", run_id: str, steps: Iterable[Mapping[str, float]]) -> None:
    """Log metrics of MLflow's steps 0, 1, ... in as few requests as possible: the client puts 1,000 into each."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step) for step, metrics in enumerate(steps) for name, value in metrics.items()]
    client.log_batch(run_id, points, synchronous=True)  # the process ends without waiting for a queue


def _signature(classes: int) -> Any:
    """Pictures as uint8 on purpose: MLflow then refuses those that a caller has scaled already."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    pictures = TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))
    probabilities = TensorSpec(np.dtype("float32"), (-1, classes))
    return ModelSignature(Schema([pictures]), Schema([probabilities]))


def _requirements() -> list[str]:
    """Name what loading the model needs: `tensorflow`, not `tensorflow-cpu`, which has wheels for x86-64 only."""
    import tensorflow as tf

    return [f"tensorflow=={tf.__version__}", *(f"{name}=={installed(name)}" for name in ("keras", "numpy"))]


def _create(client: "MlflowClient", name: str, model_uri: str, run_id: str, candidate: Candidate) -> Version:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        **candidate.tags,
        TRAINING_ID: candidate.training_id,
        registry_store.ENVIRONMENT: registry_store.NON_PRODUCTION,
    }
    created = client.create_model_version(
        name, model_uri, run_id, tags=tags, model_id=model_uri.removeprefix("models:/")
    )
    return Version(name, int(created.version), run_id, new=True)


def _mark_as_candidate(client: "MlflowClient", version: Version) -> None:
    """Give the version the alias `candidate`, unless it is production by now or not the newest."""
    now = client.get_model_version(version.name, str(version.version))
    newest = max(int(other.version) for other in versions.search_versions(client, version.name))
    promoted = (
        registry_store.PRODUCTION in now.aliases
        or now.tags.get(registry_store.ENVIRONMENT) != registry_store.NON_PRODUCTION
    )
    if not promoted and newest == version.version and registry_store.CANDIDATE not in now.aliases:
        client.set_registered_model_alias(version.name, registry_store.CANDIDATE, str(version.version))
