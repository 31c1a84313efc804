"""Registered versions, read from MLflow."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.registry.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Foreign(PipelineError):
    """A version was not made by this pipeline."""


class Entry(NamedTuple):
    """What the registry says of a version."""

    version: int
    run_id: str
    created: float  # seconds since 1970
    tags: Mapping[str, str]
    aliases: Sequence[str]
    stage: str


class Fetched(NamedTuple):
    """A version's files, here."""

    version: int
    path: Path  # of the Keras model
    labels: Sequence[str]  # of its outputs, in their order
    trained_on: frozenset[str]  # SHA-256 of each training image's file


def entries(store: Store, name: str) -> list[Entry]:
    """Return the versions of a model, the newest first; none where there is no such model.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with registry_store.explained(store, registry_store.ASKED):
        client = MlflowClient(store.uri)
        model = registered_model(client, name)
        if model is None:
            return []
        aliases = model.aliases  # a search for versions does not return them
        found = []
        for version in search_versions(client, name):
            number = int(version.version)
            its = [alias for alias, other in sorted(aliases.items()) if int(other) == number]
            stage, created = version.current_stage or "None", version.creation_timestamp / 1000
            found.append(Entry(number, version.run_id or "", created, version.tags, its, stage))
    return sorted(found, key=lambda entry: -entry.version)


def registered_model(client: "MlflowClient", name: str) -> Any:
    """Return MLflow's `RegisteredModel`; None where there is none of this name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def production(store: Store, name: str) -> Entry | None:
    """Return the version that has the alias `production`; None where there is none.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    return next((entry for entry in entries(store, name) if registry_store.PRODUCTION in entry.aliases), None)


def fetch(store: Store, name: str, entry: Entry, folder: Path) -> Fetched:
    """Download a version's model and what its run says of it into `folder`.

    Raises PipelineError where MLflow cannot be reached or refuses, Foreign where the version was not made by this
    pipeline.
    """
    import mlflow
    from mlflow.models import Model

    with registry_store.explained(store, registry_store.ASKED):
        mlflow.set_tracking_uri(store.uri)
        mlflow.artifacts.download_artifacts(f"models:/{name}/{entry.version}", dst_path=str(folder / "model"))
        about = Model.load(str(folder / "model")).metadata or {}
    path, labels = folder / "model" / "data" / "model.keras", about.get("labels")
    rows = artifact(store, entry, "split/training.csv", folder)
    if not path.is_file() or not labels or not rows:
        raise Foreign(
            f"{name} version {entry.version} was not made by this pipeline: its model, its labels or the list of its "
            "training images is missing."
        )
    trained_on = frozenset(row.sha256 for row in manifest.read(rows, manifest.Example))
    return Fetched(entry.version, path, labels, trained_on)


def artifact(store: Store, entry: Entry, name: str, folder: Path) -> Path | None:
    """Download a file of a version's run to `folder / name` and return its path; None where the run has no such file.

    Raises PipelineError where MLflow cannot be reached or refuses.
    """
    from mlflow import MlflowClient

    with registry_store.explained(store, registry_store.ASKED):
        client = MlflowClient(store.uri)
        above = name.rpartition("/")[0]
        if name not in (file.path for file in client.list_artifacts(entry.run_id, above or None)):
            return None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # some stores keep the folders above, others do not
            Path(client.download_artifacts(entry.run_id, name, scratch)).replace(path)
        return path


def search_versions(client: "MlflowClient", name: str) -> Iterable[Any]:
    """Yield the versions of a model as MLflow's `ModelVersion`, all pages."""
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return
