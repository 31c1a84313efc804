"""Where the registry is and whether it answers; names of its tags, aliases and artifacts; errors explained."""

import base64
import contextlib
import http.client
import logging
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import redact

log = logging.getLogger(__name__)
CANDIDATE, PRODUCTION = "candidate", "production"  # aliases; PRODUCTION is also a value of the tag ENVIRONMENT
ENVIRONMENT = "environment"  # tag of a version
NON_PRODUCTION = "non-production"
TRAINING_ID = "dgmd.training_id"  # tag of a run and of a version
SERVER_MAJOR = 3
REGISTRATION_FAILED = "could not register the model: {}. The training is kept; the next run only registers the model."
REQUEST_FAILED = "did not answer as expected: {}. Check the server and repeat the command."
EMBEDDED_BYTES = 2_000_000  # an embedded store without its models: the database has 0.96 MB after the first version


class Store(NamedTuple):
    """An MLflow tracking server and model registry."""

    uri: str  # of both
    artifacts: str | None  # URI of the folder for a new experiment's files; None: the server chooses


def embedded(folder: Path) -> Store:
    """Return the store that `create` made in `folder`: an SQLite database and artifact files."""
    folder = folder.resolve()
    return Store(f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri())


def create(folder: Path) -> None:
    """Create an embedded store in an empty folder. The folder may be moved before its first use."""
    from mlflow import MlflowClient

    (folder / "artifacts").mkdir()
    store = embedded(folder)
    with errors_explained(store):
        MlflowClient(store.uri).search_experiments()


def check_server(uri: str, login: str | None = None, timeout: float = 5) -> str | None:
    """Ask an MLflow server for its version, without importing MLflow. Return a warning if the server does not tell.

    `login` is "user:password"; a login in the URI takes precedence. `timeout` is in seconds. A URI that is not HTTP is
    not checked.

    Raises PipelineError if the server is older than MLflow 3: the client of MLflow 3 does not support older servers.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    parts = urllib.parse.urlsplit(uri.rstrip("/"))
    login_in_uri, _, host = parts.netloc.rpartition("@")
    shown = parts._replace(netloc=host).geturl()
    login = urllib.parse.unquote(login_in_uri) or login
    later = "The run continues; the registration at its end tries again."
    request = urllib.request.Request(f"{shown}/version", headers=_authorization(login) if login else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            found = answer.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        hint = {
            401: "It requires a user and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. ",
            403: "It may not accept the host name of the request: set MLFLOW_SERVER_ALLOWED_HOSTS on the server. ",
        }.get(error.code, "")
        return f"The MLflow server at {shown} answers {error.code} {error.reason}. {hint}{later}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"The MLflow server at {shown} cannot be reached ({getattr(error, 'reason', error)}). {later}"
    major = re.match(r"(\d+)\.\d", found)
    if major is None:
        return f"The server at {shown} does not identify itself as an MLflow server. {later}"
    if int(major[1]) < SERVER_MAJOR:
        raise PipelineError(
            f"The MLflow server at {shown} is version {found}; this pipeline requires version {SERVER_MAJOR} or later: "
            "upgrade the server."
        )
    return None


def _authorization(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


@contextlib.contextmanager
def errors_explained(store: Store, message: str = REGISTRATION_FAILED) -> Iterator[None]:
    """Turn an exception of MLflow into a PipelineError, and silence MLflow's log.

    `message` has a `{}` for the reason.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        # MLflow passes on errors of HTTP clients, databases and artifact stores, which share no base class. A built-in
        # exception is a bug of this package, except for disk errors and a missing database driver.
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | ModuleNotFoundError):
            raise
        reason = str(error).strip().split("\n")[0][:300].rstrip(".")
        # Redacted here, because the message is also stored: in reports, the history and MLflow.
        raise PipelineError(redact(f"MLflow at {store.uri} {message.format(reason)}")) from error
