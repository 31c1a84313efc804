"""Registered versions, read from MLflow."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import ChangedFile, PipelineError
from dgmd_pipeline.registry.store import MEASURED, PRODUCTION, REQUEST_FAILED, Store, errors_explained

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import model_registry
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

TRAINING = "split/training.csv"  # artifact of a version's run: the list of its training images

RUNS = 100  # maximum number of runs whose metrics are read; a run has hundreds of metrics


class ForeignVersion(PipelineError):
    """This pipeline did not make the version."""


class ModelVersion(NamedTuple):
    """A version of a registered model."""

    version: int
    run_id: str
    created: float  # seconds since 1970
    tags: Mapping[str, str]  # including a tag for each measured figure, such as `dgmd.latency_ratio`
    aliases: Sequence[str]
    stage: str  # "None", "Staging", "Production" or "Archived"
    description: str = ""


@dataclass(frozen=True)
class ModelState:
    """A registered model and its versions, as one call of `read` found them."""

    name: str
    tags: Mapping[str, str]  # tags of the registered model
    versions: Sequence[ModelVersion]  # the newest first; empty if the registry has no such model

    @property
    def production(self) -> ModelVersion | None:
        """The version with the alias `production`; None if no version has it."""
        return next((version for version in self.versions if PRODUCTION in version.aliases), None)


class DownloadedVersion(NamedTuple):
    """The files of a version on this machine."""

    version: int
    path: Path  # file of the Keras model
    labels: Sequence[str]  # label of each output of the model
    trained_on: frozenset[str]  # SHA-256 of each training image's file
    trained_labels: frozenset[str]  # labels of the training images


def read(store: Store, name: str, message: str = REQUEST_FAILED) -> ModelState:
    """Read a registered model and all its versions.

    Sends one request for the model, and one request for each page of versions.

    Raises PipelineError if MLflow cannot be reached or refuses, or if a version's figures were edited and cannot be
    read; `message` is as in `errors_explained`.
    """
    from mlflow import MlflowClient

    with errors_explained(store, message):
        client = MlflowClient(store.uri)
        model = registered_model(client, name)
        if model is None:
            return ModelState(name, {}, [])
        found = []
        for version in search(client, name):
            number = int(version.version)
            # Aliases are read from the model, because MLflow's search for versions does not return them.
            aliases = [alias for alias, target in sorted(model.aliases.items()) if int(target) == number]
            stage, created = version.current_stage or "None", version.creation_timestamp / 1000
            found.append(
                ModelVersion(
                    number, version.run_id or "", created, _tags(version), aliases, stage, version.description or ""
                )
            )
    return ModelState(name, model.tags, sorted(found, key=lambda version: -version.version))


def run_metrics(store: Store, experiment: str, message: str = REQUEST_FAILED) -> dict[str, Mapping[str, float]]:
    """Return the metrics of an experiment's newest runs: id of the run -> name of the metric -> last value.

    Reads up to RUNS runs, with two requests. Returns {} if there is no such experiment. `message` is as in
    `errors_explained`.

    Raises PipelineError if MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with errors_explained(store, message):
        client = MlflowClient(store.uri)
        found = client.get_experiment_by_name(experiment)
        runs = client.search_runs([found.experiment_id], max_results=RUNS) if found else []
        return {run.info.run_id: run.data.metrics for run in runs}


def fetch(store: Store, name: str, version: ModelVersion, folder: Path) -> DownloadedVersion:
    """Download the model of a version and the list of its training images into `folder`.

    Raises PipelineError if MLflow cannot be reached or refuses. Raises ForeignVersion if this pipeline did not make the
    version.
    """
    import mlflow
    from mlflow.models import Model

    with errors_explained(store, REQUEST_FAILED):
        mlflow.set_tracking_uri(store.uri)
        uri = f"models:/{name}/{version.version}"
        if store.artifacts:
            uri = mlflow.MlflowClient().get_model_version_download_uri(name, str(version.version))
        (folder / "model").mkdir(parents=True)
        _files(store, uri).download_artifacts("", str(folder / "model"))
        metadata = Model.load(str(folder / "model")).metadata or {}
    path, labels = folder / "model" / "data" / "model.keras", metadata.get("labels")
    rows = artifact(store, version, TRAINING, folder)
    if not path.is_file() or not labels or not rows:
        raise ForeignVersion(
            f"{name} version {version.version} was not made by this pipeline: its model, its labels or the list of its "
            "training images is missing."
        )
    examples = _read_examples(rows, version)
    trained_on, known = frozenset(row.sha256 for row in examples), frozenset(row.label for row in examples)
    return DownloadedVersion(version.version, path, labels, trained_on, known)


def trained_labels(store: Store, version: ModelVersion, folder: Path) -> frozenset[str] | None:
    """Return the labels of a version's training images; None if the version has no list of these images.

    The list is downloaded into `folder`.

    Raises PipelineError if MLflow cannot be reached or refuses.
    """
    rows = artifact(store, version, TRAINING, folder)
    return frozenset(row.label for row in _read_examples(rows, version)) if rows else None


def _read_examples(path: Path, version: ModelVersion) -> list[manifest.Example]:
    try:
        return list(manifest.read(path, manifest.Example))
    except ChangedFile as error:
        raise error.of_version(version.version) from error


def artifact(store: Store, version: ModelVersion, name: str, folder: Path) -> Path | None:
    """Download a file of a version's run to `folder / name` and return its path; None if the run has no such file.

    Raises PipelineError if MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with errors_explained(store, REQUEST_FAILED):
        files = _files(store, MlflowClient(store.uri).get_run(version.run_id).info.artifact_uri)
        parent = name.rpartition("/")[0]
        if name not in (file.path for file in files.list_artifacts(parent or None)):
            return None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Some artifact stores create the file's parent folders below `scratch`, others do not. So the file is moved to
        # `path`.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            Path(files.download_artifacts(name, scratch)).replace(path)
        return path


def registered_model(client: "MlflowClient", name: str) -> "model_registry.RegisteredModel | None":
    """Return a registered model; None if the registry has no model called `name`."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def search(client: "MlflowClient", name: str) -> "Iterator[model_registry.ModelVersion]":
    """Yield all versions of a model as MLflow returns them, page after page."""
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _tags(version: "model_registry.ModelVersion") -> dict[str, str]:
    """Return the tags of a version, and a tag for each figure in its tag MEASURED.

    If a figure and a tag of the version have the same name, the tag is returned.
    """
    try:
        figures = dict(json.loads(version.tags.get(MEASURED, "{}")))
    except (ValueError, TypeError) as error:
        raise PipelineError(
            f"The tag {MEASURED} of {version.name} version {version.version} is not a JSON object ({error}): correct "
            "or delete it."
        ) from error
    return {f"dgmd.{name}": str(value) for name, value in figures.items() if value is not None} | version.tags


def _files(store: Store, uri: str) -> "ArtifactRepository":
    """Return the artifact repository for the files that the store recorded at `uri`. They may have moved since."""
    from mlflow.tracking.artifact_utils import add_databricks_profile_info_to_artifact_uri, get_artifact_repository

    place = add_databricks_profile_info_to_artifact_uri(store.place(uri), store.uri)
    return get_artifact_repository(place, tracking_uri=store.uri)
