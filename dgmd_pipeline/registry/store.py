"""The place of the registry and its artifacts, the names of its tags and aliases, and explanations of errors."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.registry import database

CANDIDATE, PRODUCTION = "candidate", "production"  # aliases; PRODUCTION is also a value of the tag ENVIRONMENT
ENVIRONMENT = "environment"  # tag of a version
# Tag of a version: a JSON object of measured figures. An older version of the pipeline wrote one tag for each figure.
# `versions.read` returns each figure as a tag of its own.
MEASURED = "dgmd.measured"
ACCURACY = "dgmd.validation_accuracy"  # tag that `versions.read` returns for the figure `validation_accuracy`
NON_PRODUCTION = "non-production"  # value of the tag ENVIRONMENT
TRAINING_ID = "dgmd.training_id"  # tag of a run and of a version
EVENT = "dgmd.event."  # prefix of tags of a registered model; the time comes next, so the names sort by time
ATTEMPT = "dgmd.attempt"  # tag of a run: id of the attempt that opened the run, see `live_run`
# Error messages: a message follows "MLflow at <URI>", and the reason replaces {}.
REGISTRATION_FAILED = (
    "could not register the model: {}. The training is kept: the next run with the same images and settings uses it."
)
REQUEST_FAILED = "did not answer as expected: {}. Correct this and repeat the command."
NOT_ALLOWED = (
    "refuses this: {}. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account that may do it, and "
    "repeat the command."
)
REASON_LENGTH = 400  # maximum number of characters of a reason
# Disk space for an embedded store without models. It includes a reserve: after the first version, the database has
# 0.96 MB.
EMBEDDED_BYTES = 2_000_000


class NotAllowed(PipelineError):
    """MLflow does not know the account of this process, or does not permit its request."""


class Store(NamedTuple):
    """An MLflow tracking server and model registry, or a database that is both."""

    uri: str  # of the server or the database
    artifacts: str | None  # URI of the folder for a new experiment's files; None: the server chooses

    def place(self, recorded: str) -> str:
        """Return the present URI of artifacts that the database recorded at `recorded`.

        The URI differs from `recorded` if the folder of the database was moved, or has another path on this machine or
        in this container. If there is nothing at the new place, return `recorded`.
        """
        if self.artifacts is None or not recorded.startswith("file:"):
            return recorded
        name = "/".join(self.artifacts.split("/")[-2:])
        moved = f"{self.artifacts}/{recorded.rpartition(f'/{name}/')[2]}"
        return moved if f"/{name}/" in recorded and database.local_path(moved).exists() else recorded


def at(uri: str) -> Store:
    """Return the store at a URI of MLflow. The folder `artifacts` beside an SQLite database contains its artifacts."""
    path = database.path_of(uri)
    return Store(uri, (path.parent / "artifacts").as_uri() if path else None)


def embedded(folder: Path) -> Store:
    """Return the store that `create` made in `folder`: an SQLite database and artifact files."""
    return at(database.uri_of(folder.resolve() / "mlflow.db"))


def create(folder: Path) -> None:
    """Create an embedded store in an empty folder.

    The caller syncs the folder to the disk, and may move it before its first use.
    """
    from mlflow import MlflowClient

    (folder / "artifacts").mkdir()
    store = embedded(folder)
    with errors_explained(store), database.without_sync():
        MlflowClient(store.uri).search_experiments()


def upgrade(store: Store) -> None:
    """Upgrade the schema of an SQLite database to the schema of the installed MLflow: see `database.upgrade`."""
    if path := database.path_of(store.uri):
        database.upgrade(path)


def move_artifacts(store: Store) -> None:
    """Update the places of artifacts in an SQLite database whose folder was moved: see `database.move_artifacts`."""
    if (path := database.path_of(store.uri)) and store.artifacts:
        database.move_artifacts(path, store.artifacts)


@contextlib.contextmanager
def errors_explained(store: Store, message: str = REGISTRATION_FAILED) -> Iterator[None]:
    """Turn an exception of MLflow into a PipelineError, and silence MLflow's log.

    `message` has a `{}` for the reason. Raises NotAllowed if MLflow does not know the account, or does not
    permit the request.
    """
    import mlflow  # noqa: F401 - its first import sets the level of its log

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        # MLflow passes on errors of HTTP clients, databases and artifact stores. These errors share no base class. A
        # built-in exception is a bug of this package, except for disk errors and a missing database driver.
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | ModuleNotFoundError):
            raise
        denied = getattr(error, "error_code", None) in ("PERMISSION_DENIED", "UNAUTHENTICATED")
        frame = NOT_ALLOWED if denied and message == REQUEST_FAILED else message
        # Redacted here, because the message is also stored: in reports, the history and MLflow.
        text = redact(f"MLflow at {store.uri} {frame.format(reason(error))}")
        raise (NotAllowed if denied else PipelineError)(text) from error


def reason(error: Exception) -> str:
    """Return what an exception says: its first line, or all lines if the first line ends with a colon."""
    text = str(error).strip().removeprefix("PERMISSION_DENIED: ")
    first = text.partition("\n")[0]
    text = " ".join(text.split()) if first.endswith(":") else first
    if len(text) > REASON_LENGTH:
        text = text[:REASON_LENGTH].rsplit(" ", 1)[0] + " [...]"
    return text.rstrip(".")
