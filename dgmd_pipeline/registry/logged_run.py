"""Logs a candidate as a finished MLflow run with a model, and deletes the runs and models of failed attempts."""

import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.registry import once
from dgmd_pipeline.registry.store import ATTEMPT, TRAINING_ID
from dgmd_pipeline.serving import source

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, LoggedModel, Run
    from mlflow.models import ModelSignature

log = logging.getLogger(__name__)
MODEL = "model"  # name of the logged model
SHOWN = "val_loss"  # metric of every epoch; it shows which epochs were logged to a run
MAX_NAME = 500  # characters of a data set's name in MLflow


class Candidate(NamedTuple):
    """A trained model and all that is logged with it."""

    training_id: str  # id of the training; the run and the version of the training have it as a tag
    run_name: str
    # Takes the number of the version and a link to the report. Returns a text that describes the version and its run.
    describe: Callable[[int, str], str]
    # Returns the file of a Keras model. The model turns uint8 [n, h, w, 3] into float32 [n, classes]. This function is
    # called only if a run must be logged.
    model: Callable[[], Path]
    labels: Sequence[str]  # label of each output of the model
    params: Mapping[str, object]  # None values are not logged
    history: Sequence[Mapping[str, float]]  # metrics of each epoch, from epoch 1
    metrics: Mapping[str, float]  # metrics of the evaluation
    of_run: Mapping[str, float]  # times and speeds of steps, counts of images; logged to the run, not to the model
    tags: Mapping[str, str]
    source: str  # URI of the data, s3://...
    source_digest: str  # fingerprint of the data
    attempt: str  # id of the attempt whose run has shown the training (see `live_run`); "" if no run has shown it
    files: Mapping[Path, str]  # file or folder on this machine -> folder among the artifacts; "" is the top folder


class _ModelFile(NamedTuple):
    """Stands for a Keras model in a call of MLflow's `save_model`. Its `save` copies the model's file."""

    path: Path

    def save(self, path: str) -> None:
        shutil.copyfile(self.path, path)


class LoggedRun(NamedTuple):
    """A finished run and its model."""

    run_id: str
    model_id: str


def complete_run(client: "MlflowClient", experiment_id: str, training_id: str, keep: str = "") -> LoggedRun | None:
    """Return a complete run of a training, or None. Delete the training's other runs and their models.

    A run is complete if it has the status FINISHED, and its model has the status READY. Failed and repeated attempts
    leave surplus runs and models. `keep` is the id of the run to keep; the default is any complete run. A run of a
    registered version is never deleted.
    """
    found = {run.info.run_id: run for run in client.search_runs([experiment_id], _of_training(training_id))}
    models = {run_id: _models(client, experiment_id, run_id) for run_id in found}
    complete = {
        run_id: model.model_id
        for run_id, run in found.items()
        for model in models[run_id]
        if run.info.status == "FINISHED" and model.status == "READY"
    }
    keep = keep or next(iter(complete), "")
    for run_id in found:
        surplus = models[run_id]
        if run_id == keep:
            surplus = [model for model in surplus if model.status in ("PENDING", "FAILED")]
        elif client.search_model_versions(f"run_id = '{run_id}'"):
            continue
        for model in surplus:
            once.delete(partial(client.delete_logged_model, model.model_id))
        if run_id != keep:
            client.delete_run(run_id)
            log.info("deleted an incomplete or repeated MLflow run of this training: %s", run_id)
    return LoggedRun(keep, complete[keep]) if keep in complete else None


def log_run(client: "MlflowClient", experiment_id: str, candidate: Candidate) -> LoggedRun:
    """Log a training as one run with a model.

    MLflow's functions for the active run are not used, because they continue the run that MLFLOW_RUN_ID names, and
    because they repeat requests that create something.
    """
    from mlflow.tracking.context import registry

    model_file = candidate.model()
    tags = registry.resolve_tags({**candidate.tags, TRAINING_ID: candidate.training_id})  # plus user, program, commit
    created = f"{_of_training(candidate.training_id)} and attributes.status = 'RUNNING'"
    run_id = (
        _continue_live_run(client, experiment_id, candidate, tags)
        or once.create(
            lambda: client.create_run(experiment_id, tags=tags, run_name=candidate.run_name),
            lambda: next(iter(client.search_runs([experiment_id], created)), None),
        ).info.run_id
    )
    try:
        _log_data(client, run_id, candidate)
        model_id = _log_model(client, experiment_id, run_id, candidate, model_file)
        shown = _shown_epochs(client, run_id) if candidate.attempt else {}
        _log_metrics(client, run_id, [candidate.metrics, *candidate.history], model_id, shown)
        log_metrics(client, run_id, candidate.of_run)
    except BaseException:
        _mark_as_failed(client, run_id)
        raise
    client.set_terminated(run_id)
    return LoggedRun(run_id, model_id)


def log_metrics(client: "MlflowClient", run_id: str, metrics: Mapping[str, float]) -> None:
    """Log metrics to a run."""
    _log_metrics(client, run_id, [metrics])


def of_attempt(client: "MlflowClient", experiment_id: str, attempt: str) -> "Run | None":
    """Return the run that shows the training of an attempt; None if there is no such run."""
    return next(iter(client.search_runs([experiment_id], f"tags.`{ATTEMPT}` = '{attempt}'")), None)


def log_epoch(client: "MlflowClient", run_id: str, number: int, metrics: Mapping[str, float]) -> None:
    """Log the metrics of an epoch, counted from 1, to a run."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(name, value, now, number) for name, value in metrics.items()], synchronous=True)


def _continue_live_run(
    client: "MlflowClient", experiment_id: str, candidate: Candidate, tags: Mapping[str, str]
) -> str | None:
    """Reuse the run that has shown the training, and return its id; None if there is no such run.

    If the training has started again from its first epoch, the run may show epochs that the candidate does not have.
    In this case, delete the run and return None.
    """
    from mlflow.entities import RunTag

    run = of_attempt(client, experiment_id, candidate.attempt) if candidate.attempt else None
    if run is None:
        return None
    run_id, known = run.info.run_id, dict(enumerate((row[SHOWN] for row in candidate.history), start=1))
    if any(not math.isclose(value, known.get(step, math.inf)) for step, value in _shown_epochs(client, run_id).items()):
        client.delete_run(run_id)
        return None
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    if run.info.status != "RUNNING":
        client.update_run(run_id, "RUNNING")
    return run_id


def _shown_epochs(client: "MlflowClient", run_id: str) -> dict[int, float]:
    """Return the value of the metric SHOWN for each epoch that was logged to a run."""
    return {point.step: point.value for point in client.get_metric_history(run_id, SHOWN)}


def _of_training(training_id: str) -> str:
    """Return MLflow's filter for runs or versions of a training."""
    return f"tags.`{TRAINING_ID}` = '{training_id}'"


def _models(client: "MlflowClient", experiment_id: str, run_id: str) -> "list[LoggedModel]":
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    return [model for model in found if model.name == MODEL]


def _mark_as_failed(client: "MlflowClient", run_id: str) -> None:
    """Try once to mark a run as failed. Raise no error of MLflow, because the caller raises the original error."""
    from mlflow.exceptions import MlflowException

    try:
        with once.without_repetition():
            client.set_terminated(run_id, "FAILED")
    except MlflowException as error:
        log.debug("The MLflow run %s is not marked as failed: %s", run_id, error)


def _log_data(client: "MlflowClient", run_id: str, candidate: Candidate) -> None:
    """Log the parameters, the data set and the files."""
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, value) for name, value in _params(candidate).items()])
    client.log_inputs(run_id, [_dataset(candidate)])
    for path, folder in candidate.files.items():
        if path.is_dir():
            client.log_artifacts(run_id, str(path), folder)
        else:
            client.log_artifact(run_id, str(path), folder)


def _params(candidate: Candidate) -> dict[str, str]:
    return {name: str(value) for name, value in candidate.params.items() if value is not None}


def _dataset(candidate: Candidate) -> "DatasetInput":
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns about a source with several interpretations, such as a folder
        source = resolve_dataset_source(candidate.source)
    name = candidate.source if len(candidate.source) <= MAX_NAME else candidate.source[: MAX_NAME - 1] + "…"
    described = MetaDataset(source, name=name, digest=candidate.source_digest[:16]).to_dict()  # type: ignore[abstract]
    return DatasetInput(Dataset(**described), [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def _log_model(client: "MlflowClient", experiment_id: str, run_id: str, candidate: Candidate, model_file: Path) -> str:
    """Log the model as an output of the run, with its labels; return the model's id."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.tracking.context import registry

    tags = registry.resolve_tags()
    model = once.create(
        lambda: client.create_logged_model(experiment_id, MODEL, run_id, tags, _params(candidate)),
        lambda: next(iter(_models(client, experiment_id, run_id)), None),
    )
    once.create(
        lambda: client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)]) or True,
        lambda: outputs.model_outputs or None if (outputs := client.get_run(run_id).outputs) else None,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / MODEL
        _save(folder, model, run_id, candidate, model_file)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def _save(folder: Path, logged: "LoggedModel", run_id: str, candidate: Candidate, model_file: Path) -> None:
    """Write the files of the model: MLflow's Keras flavor, the labels, and the code that MLflow loads to predict."""
    import mlflow.keras
    from mlflow.models import Model

    described = Model(
        artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id,
        metadata={"labels": list(candidate.labels)},
    )  # fmt: skip
    mlflow.keras.save_model(
        _ModelFile(model_file), str(folder), mlflow_model=described, signature=_signature(len(candidate.labels)),
        pip_requirements=_requirements(),
    )  # fmt: skip
    described.flavors["python_function"] |= {"loader_module": source.write(folder / "code"), "code": "code"}
    described.save(str(folder / "MLmodel"))
    mapping = next(path for path in candidate.files if path.name == "mapping.json")
    shutil.copyfile(mapping, folder / mapping.name)


def _log_metrics(
    client: "MlflowClient",
    run_id: str,
    steps: Iterable[Mapping[str, float]],
    model_id: str | None = None,
    but: Container[int] = (),
) -> None:
    """Log the items of `steps` as MLflow's steps 0, 1, ...

    The metrics of step 0 are also logged to the model `model_id`. The steps in `but` are left out. MLflow's client
    sends up to 1,000 metrics in a request.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [
        Metric(name, value, now, step, model_id=model_id if step == 0 else None)
        for step, metrics in enumerate(steps)
        if step not in but
        for name, value in metrics.items()
    ]
    # MLflow's queue for asynchronous requests is not used, because the process would exit without waiting for it.
    client.log_batch(run_id, points, synchronous=True)


def _signature(classes: int) -> "ModelSignature":
    """Return the declaration of the model's input, output and parameter.

    MLflow's server converts JSON to the declared type of the input, except for the type `object`. If the input had
    the type uint8, the server would turn wrongly scaled pixels (0 to 1) into black images, and the model could not
    refuse them. So the input has the type `object`.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    images = TensorSpec(np.dtype("O"), (-1,))
    probabilities = TensorSpec(np.dtype("float32"), (-1, classes))
    top_k = ParamSpec("top_k", DataType.long, default=0)  # number of labels for each image; 0: all probabilities
    return ModelSignature(Schema([images]), Schema([probabilities]), ParamSchema([top_k]))


def _requirements() -> list[str]:
    """Return the packages that the model requires.

    They include `tensorflow`, not `tensorflow-cpu`, because the latter has wheels for x86-64 only.
    """
    import tensorflow as tf

    return [f"tensorflow=={tf.__version__}", *(f"{name}=={installed(name)}" for name in ("keras", "numpy", "pillow"))]
