"""Registers a trained model and its measurements in MLflow, as a run and a version."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.registry import logged_run, once, versions
from dgmd_pipeline.registry.logged_run import Candidate, LoggedRun
from dgmd_pipeline.registry.store import (
    CANDIDATE,
    ENVIRONMENT,
    NON_PRODUCTION,
    PRODUCTION,
    REGISTRATION_FAILED,
    TRAINING_ID,
    Store,
    errors_explained,
)
from dgmd_pipeline.registry.versions import ModelState, ModelVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
KIND = "mlflow.experimentKind"  # tag of an experiment: which pages MLflow shows first
TRAINING = "custom_model_development"  # value of the tag KIND
# Newer versions of MLflow ignore KIND. So links get this suffix, which selects MLflow's pages for model training.
SHOWN_AS_TRAINING = "?workflowType=machine_learning"
NOTE = "mlflow.note.content"  # tag of a run: its description
REPORT = "evaluation/report.html"  # artifact of a run
MODEL_DESCRIPTION = (
    "An image classifier, trained by dgmd_pipeline. The alias `production` names the version in use. The alias "
    "`candidate` names the newest version. The tags `verdict` and `accuracy` and the description of a version come "
    "from the version's evaluation."
)


class RegisteredVersion(NamedTuple):
    """A version in the registry."""

    name: str
    version: int
    run_id: str
    new: bool  # True: this call created the version; False: the version existed


def git_revision(path: Path) -> str | None:
    """Return the commit of the Git checkout that holds `path`; None outside a checkout."""
    from mlflow.utils.git_utils import get_git_commit

    return get_git_commit(str(path))


def register(store: Store, experiment: str, name: str, candidate: Candidate) -> RegisteredVersion:
    """Log a run and create a non-production version with the alias `candidate`.

    Does neither if the candidate's training has a version already. Returns the version of the training.

    Runs and versions have the training's id as a tag. A complete run of an earlier attempt is reused. If the
    training has several runs, several logged models or several versions, one of each is kept, and the others are
    deleted. A version that somebody has promoted or given an alias is never deleted.

    Raises PipelineError if MLflow refuses, or cannot be reached after the client's retries.
    """
    import mlflow
    from mlflow import MlflowClient

    with errors_explained(store):
        mlflow.set_tracking_uri(store.uri)
        mlflow.clear_active_model()  # otherwise metrics are also logged to the model in MLFLOW_ACTIVE_MODEL_ID
        client = MlflowClient()
        state = versions.read(store, name, REGISTRATION_FAILED)
        new = not _of_training(state, candidate.training_id)
        if new:
            place = experiment_id(client, experiment, store.artifacts)
            logged = logged_run.complete_run(client, place, candidate.training_id)
            _create_version(client, name, logged or logged_run.log_run(client, place, candidate), candidate)
            state = versions.read(store, name, REGISTRATION_FAILED)
        state, version = _keep_one_version(client, state, candidate.training_id)
        run = _keep_one_run(client, candidate.training_id, version.run_id)
        _mark_as_candidate(client, state, version)
        if run:
            _describe(client, name, version, run, candidate)
        return RegisteredVersion(name, version.version, version.run_id, new)


def run_url(store: Store, version: RegisteredVersion) -> str:
    """Return the address of the page of a version's run on an MLflow server. For other stores, return their URI."""
    from mlflow import MlflowClient

    with errors_explained(store):
        experiment = MlflowClient(store.uri).get_run(version.run_id).info.experiment_id
    shown = redact(store.uri).rstrip("/")
    page = f"{shown}/#/experiments/{experiment}/runs/{version.run_id}{SHOWN_AS_TRAINING}"
    return page if shown.startswith("http") else shown


def code_tags(revision: str | None) -> dict[str, str]:
    """Return the tags that say which code made a version."""
    revision = revision or git_revision(Path(__file__)) or "unknown"
    return {"dgmd.version": installed("dgmd_pipeline"), "dgmd.git_revision": revision}


def add_metrics(store: Store, version: RegisteredVersion, metrics: Mapping[str, float]) -> None:
    """Log metrics to the run of a registered version.

    Raises PipelineError if MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with errors_explained(store):
        logged_run.log_metrics(MlflowClient(store.uri), version.run_id, metrics)


def _of_training(state: ModelState, training_id: str) -> list[ModelVersion]:
    """Return the versions of a training. The first one is the version to keep.

    Versions in use come before other versions, and older versions come before newer ones.
    """
    found = [version for version in state.versions if version.tags.get(TRAINING_ID) == training_id]
    return sorted(found, key=lambda version: (not _in_use(version), version.version))


def _in_use(version: ModelVersion) -> bool:
    """Return whether somebody has promoted the version, or given it an alias."""
    return bool(version.aliases) or version.tags.get(ENVIRONMENT) != NON_PRODUCTION or version.stage != "None"


def experiment_id(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """Return the id of an experiment; create it if it does not exist. Raises PipelineError if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:

        def find() -> str | None:
            created = client.get_experiment_by_name(name)
            return created.experiment_id if created else None

        kind = {KIND: TRAINING}
        return once.create(lambda: client.create_experiment(name, artifact_location=artifacts, tags=kind), find)
    if experiment.lifecycle_stage != "active":
        raise PipelineError(
            f"The MLflow experiment {name} has been deleted. Restore it (mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}), or set MLFLOW_EXPERIMENT_NAME to another one."
        )
    if "inferred" in experiment.tags.get(KIND, "inferred"):  # the tag is missing, or MLflow's web page has guessed it
        client.set_experiment_tag(experiment.experiment_id, KIND, TRAINING)
    return experiment.experiment_id


def _create_version(client: "MlflowClient", name: str, run: LoggedRun, candidate: Candidate) -> None:
    once.create(
        lambda: client.create_registered_model(name, description=MODEL_DESCRIPTION),
        lambda: versions.registered_model(client, name),
    )
    uri = f"models:/{run.model_id}"
    tags = {**candidate.tags, TRAINING_ID: candidate.training_id, ENVIRONMENT: NON_PRODUCTION}
    mine = f"name = '{name}' and tags.`{TRAINING_ID}` = '{candidate.training_id}'"
    once.create(
        lambda: client.create_model_version(name, uri, run.run_id, tags=tags, model_id=run.model_id),
        lambda: next(iter(client.search_model_versions(mine)), None),
    )


def _keep_one_version(client: "MlflowClient", state: ModelState, training_id: str) -> tuple[ModelState, ModelVersion]:
    """Keep one version of a training, and delete the others that are not in use.

    Return the new state and the version that is kept.
    """
    kept, *others = _of_training(state, training_id)
    for other in others:
        if _in_use(other):
            log.warning(
                "%s versions %d and %d are the same model. Version %d is not deleted, because it is in use.",
                state.name, kept.version, other.version, other.version,
            )  # fmt: skip
            continue
        once.delete(partial(client.delete_model_version, state.name, str(other.version)))
        log.warning("deleted %s version %d: a second copy of version %d", state.name, other.version, kept.version)
        state = dataclasses.replace(state, versions=[version for version in state.versions if version != other])
    return state, kept


def _keep_one_run(client: "MlflowClient", training_id: str, run_id: str) -> "Run | None":
    """Delete the runs and models of a training, except the run `run_id` and its model. Return this run.

    The version of the training uses this run. Returns None if somebody has deleted the run `run_id` permanently.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    logged_run.complete_run(client, run.info.experiment_id, training_id, keep=run_id)
    return run


def _describe(client: "MlflowClient", name: str, version: ModelVersion, run: "Run", candidate: Candidate) -> None:
    """Describe a version and its run. Keep an existing description, because somebody may have edited it."""
    if version.description:
        return
    page = f"#/experiments/{run.info.experiment_id}/runs/{version.run_id}/artifacts/{REPORT}{SHOWN_AS_TRAINING}"
    text = candidate.describe(version.version, f"[report.html]({page})")
    client.set_tag(version.run_id, NOTE, text)
    client.update_model_version(name, str(version.version), text)


def _mark_as_candidate(client: "MlflowClient", state: ModelState, version: ModelVersion) -> None:
    """Give the version the alias `candidate`, unless it has been promoted or is not the newest."""
    promoted = PRODUCTION in version.aliases or version.tags.get(ENVIRONMENT) != NON_PRODUCTION
    newest = max(other.version for other in state.versions)
    if not promoted and newest == version.version and CANDIDATE not in version.aliases:
        client.set_registered_model_alias(state.name, CANDIDATE, str(version.version))
