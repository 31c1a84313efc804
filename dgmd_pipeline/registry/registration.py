"""A trained model and its measurements -> a run and a registered version in MLflow."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.registry import versions
from dgmd_pipeline.registry.store import CANDIDATE, ENVIRONMENT, NON_PRODUCTION, PRODUCTION, Store, errors_explained

if TYPE_CHECKING:
    import keras
    from mlflow import MlflowClient
    from mlflow.models import Model, ModelSignature

TRAINING_ID = "dgmd.training_id"  # tag of a run and of a version
LOADER = "dgmd_served"  # name of pyfunc.py in a registered model's folder, and of the module in the consumer's process


class RegisteredVersion(NamedTuple):
    """A version in the registry."""

    name: str
    version: int
    run_id: str
    new: bool  # this call created it; False: it was found


class Candidate(NamedTuple):
    """A trained model and all that is logged with it."""

    training_id: str  # identifies the training: its run and its version have this tag
    model: Callable[[], "keras.Model"]  # called if needed; uint8 [n, height, width, 3] -> float32 [n, classes]
    labels: Sequence[str]  # of the outputs, in their order
    params: Mapping[str, object]
    history: Sequence[Mapping[str, float]]  # metrics of each epoch, from epoch 1
    metrics: Mapping[str, float]  # of the evaluation and the data
    times: Mapping[str, float]  # metrics of the run's steps, logged to the run and not to the model
    tags: Mapping[str, str]
    source: str  # URI of the data, s3://...
    source_digest: str  # fingerprint of the data
    files: Mapping[Path, str]  # a file or folder -> its artifact folder, "" for the top


def git_revision(path: Path) -> str | None:
    """Return the commit of the Git checkout that holds `path`; None outside a checkout."""
    from mlflow.utils.git_utils import get_git_commit

    return get_git_commit(str(path))


def register(store: Store, experiment: str, name: str, candidate: Candidate) -> RegisteredVersion:
    """Log a run and create a non-production version with the alias `candidate`, or return this training's version.

    One request creates the version with its tags, so an interrupted registration finds it by the training's id. A
    complete run of this training is reused; an incomplete one is deleted and logged again.

    Raises PipelineError if MLflow cannot be reached, after the client's retries, or refuses.
    """
    import mlflow
    from mlflow import MlflowClient

    with errors_explained(store):
        mlflow.set_tracking_uri(store.uri)
        client = MlflowClient()
        version = _find_version(client, name, candidate.training_id)
        if version is None:
            experiment_id = _experiment_id(client, experiment, store.artifacts)
            complete = _complete_run(client, experiment_id, candidate.training_id)
            run_id, model_uri = complete or _log_run(client, experiment_id, candidate)
            version = _create_version(client, name, model_uri, run_id, candidate)
        _mark_as_candidate(client, version)
        return version


def run_url(store: Store, version: RegisteredVersion) -> str:
    """Return the address of a version's run: its page on an MLflow server, or the URI of any other store."""
    from mlflow import MlflowClient

    with errors_explained(store):
        experiment = MlflowClient(store.uri).get_run(version.run_id).info.experiment_id
    shown = redact(store.uri).rstrip("/")
    return f"{shown}/#/experiments/{experiment}/runs/{version.run_id}" if shown.startswith("http") else shown


def code_tags(revision: str | None) -> dict[str, str]:
    """Return the tags of a version that name the code that made it."""
    revision = revision or git_revision(Path(__file__)) or "unknown"
    return {"dgmd.version": installed("dgmd_pipeline"), "dgmd.git_revision": revision}


def add_metrics(store: Store, version: RegisteredVersion, metrics: Mapping[str, float]) -> None:
    """Log metrics to the run of a registered version.

    Raises PipelineError if MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with errors_explained(store):
        _log_metrics(MlflowClient(store.uri), version.run_id, [metrics])


def _find_version(client: "MlflowClient", name: str, training_id: str) -> RegisteredVersion | None:
    for version in client.search_model_versions(f"name = '{name}' and tags.`{TRAINING_ID}` = '{training_id}'"):
        return RegisteredVersion(name, int(version.version), version.run_id or "", new=False)
    return None


def _experiment_id(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=artifacts)
    if experiment.lifecycle_stage != "active":
        raise PipelineError(
            f"The MLflow experiment {name} has been deleted. Restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or set MLFLOW_EXPERIMENT_NAME to another one."
        )
    return experiment.experiment_id


def _complete_run(client: "MlflowClient", experiment_id: str, training_id: str) -> tuple[str, str] | None:
    """Return run id and model URI of this training's complete run; delete incomplete ones."""
    complete = None
    for found in client.search_runs([experiment_id], f"tags.`{TRAINING_ID}` = '{training_id}'"):
        run = client.get_run(found.info.run_id)
        models = run.outputs.model_outputs if run.outputs else []
        if run.info.status == "FINISHED" and models:
            complete = run.info.run_id, f"models:/{models[0].model_id}"
        else:
            client.delete_run(run.info.run_id)
    return complete


def _log_run(client: "MlflowClient", experiment_id: str, candidate: Candidate) -> tuple[str, str]:
    """Log a training as one run; return the run's id and the model's URI."""
    import mlflow
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.models import Model

    model = candidate.model()
    tags = {**candidate.tags, TRAINING_ID: candidate.training_id}
    with mlflow.start_run(experiment_id=experiment_id, tags=tags) as run:
        mlflow.log_params(dict(candidate.params), synchronous=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns that a folder may be a folder
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
        # After the model: MLflow assigns the metrics that a run has before the model to the model.
        _log_metrics(client, run.info.run_id, [candidate.times])
    return run.info.run_id, info.model_uri


class _QuietKeras:
    """MLflow's Keras flavor with the Python function of `pyfunc.py`."""

    @staticmethod
    def save_model(path: str, mlflow_model: "Model", **options: object) -> None:
        import mlflow.keras

        mlflow.keras.save_model(path=path, mlflow_model=mlflow_model, **options)
        code = Path(path) / "code"
        code.mkdir()
        shutil.copyfile(Path(__file__).with_name("pyfunc.py"), code / f"{LOADER}.py")
        mlflow_model.flavors["python_function"] |= {"loader_module": LOADER, "code": code.name}
        mlflow_model.save(str(Path(path) / "MLmodel"))


def _log_metrics(client: "MlflowClient", run_id: str, steps: Iterable[Mapping[str, float]]) -> None:
    """Log metrics of MLflow's steps 0, 1, ... in as few requests as possible: the client sends 1,000 in each."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step) for step, metrics in enumerate(steps) for name, value in metrics.items()]
    client.log_batch(run_id, points, synchronous=True)  # the process exits without waiting for a queue


def _signature(classes: int) -> "ModelSignature":
    """Declare images as uint8, so that MLflow refuses images that the caller has already scaled."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))
    probabilities = TensorSpec(np.dtype("float32"), (-1, classes))
    return ModelSignature(Schema([images]), Schema([probabilities]))


def _requirements() -> list[str]:
    """Return what a consumer installs: `tensorflow`, because `tensorflow-cpu` has wheels for x86-64 only."""
    import tensorflow as tf

    return [f"tensorflow=={tf.__version__}", *(f"{name}=={installed(name)}" for name in ("keras", "numpy"))]


def _create_version(
    client: "MlflowClient", name: str, model_uri: str, run_id: str, candidate: Candidate
) -> RegisteredVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        **candidate.tags,
        TRAINING_ID: candidate.training_id,
        ENVIRONMENT: NON_PRODUCTION,
    }
    created = client.create_model_version(
        name, model_uri, run_id, tags=tags, model_id=model_uri.removeprefix("models:/")
    )
    return RegisteredVersion(name, int(created.version), run_id, new=True)


def _mark_as_candidate(client: "MlflowClient", version: RegisteredVersion) -> None:
    """Give the version the alias `candidate`, unless it has been promoted or is not the newest."""
    found = client.get_model_version(version.name, str(version.version))
    newest = max(int(other.version) for other in versions.search(client, version.name))
    promoted = PRODUCTION in found.aliases or found.tags.get(ENVIRONMENT) != NON_PRODUCTION
    if not promoted and newest == version.version and CANDIDATE not in found.aliases:
        client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))
