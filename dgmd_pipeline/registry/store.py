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
CANDIDATE, PRODUCTION = "candidate", "production"  # aliases; the latter also a value of the tag
ENVIRONMENT = "environment"
NON_PRODUCTION = "non-production"
SERVER_MAJOR = 3
REGISTERED = "did not take the model: {}. The training is kept; the next run only registers."
ASKED = "did not answer as expected: {}. See to the server and give the command again."
EMBEDDED_BYTES = 2_000_000  # of an embedded store beside its models: its database has 0.96 MB after the first


class Store(NamedTuple):
    """Where runs and versions go."""

    uri: str  # tracking and registry
    artifacts: str | None  # where a new experiment keeps files; None: where the server says


def embedded(folder: Path) -> Store:
    """Return the store that `create` made: an SQLite database and artifact files."""
    folder = folder.resolve()
    return Store(f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri())


def create(folder: Path) -> None:
    """Make an embedded store in an empty folder, which may be moved before it is used."""
    from mlflow import MlflowClient

    (folder / "artifacts").mkdir()
    store = embedded(folder)
    with explained(store):
        MlflowClient(store.uri).search_experiments()


def check_server(uri: str, login: str | None = None, timeout: float = 5) -> str | None:
    """Ask an MLflow server for its version, without importing MLflow; return a warning where that is not possible.

    `login` is "user:password"; one in the URI goes first.

    Raises PipelineError where the server is older than MLflow 3, which this client cannot be trusted to speak to.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    parts = urllib.parse.urlsplit(uri.rstrip("/"))
    login_in_uri, _, host = parts.netloc.rpartition("@")
    shown = parts._replace(netloc=host).geturl()
    login = urllib.parse.unquote(login_in_uri) or login
    later = "The run goes on; the registration at its end tries again."
    request = urllib.request.Request(f"{shown}/version", headers=_authorization(login) if login else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            found = answer.read(100).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        hint = {
            401: "It wants a user and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. ",
            403: "It may not know the host name it was called by: set MLFLOW_SERVER_ALLOWED_HOSTS on the server. ",
        }.get(error.code, "")
        return f"The MLflow server at {shown} answers {error.code} {error.reason}. {hint}{later}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"The MLflow server at {shown} cannot be reached ({getattr(error, 'reason', error)}). {later}"
    major = re.match(r"(\d+)\.\d", found)
    if major is None:
        return f"What answers at {shown} does not say that it is an MLflow server. {later}"
    if int(major[1]) < SERVER_MAJOR:
        raise PipelineError(
            f"The MLflow server at {shown} is version {found}, this pipeline speaks to version {SERVER_MAJOR} and "
            "later: upgrade the server."
        )
    return None


def _authorization(login: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


@contextlib.contextmanager
def explained(store: Store, what: str = REGISTERED) -> Iterator[None]:
    """Turn what MLflow raises into a PipelineError, and keep it from talking.

    `what` has a place for the reason.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        # Behind MLflow are HTTP, databases and artifact stores, whose clients' errors have no class in common. What
        # Python itself raises is a fault of ours, save for the disk's errors and a database driver that is missing.
        if type(error).__module__ == "builtins" and not isinstance(error, OSError | ModuleNotFoundError):
            raise
        reason = str(error).strip().split("\n")[0][:300].rstrip(".")
        # It is stored, too: in reports, the history and MLflow.
        raise PipelineError(redact(f"MLflow at {store.uri} {what.format(reason)}")) from error
