"""Checks of the registry before the first step, for problems that would otherwise appear after the training."""

import base64
import configparser
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dgmd_pipeline.errors import PipelineError, SettingsError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.registry import database
from dgmd_pipeline.registry.store import REQUEST_FAILED, Store, errors_explained

if TYPE_CHECKING:
    import requests

SERVER_MAJOR = 3
LATER = "The run continues; the registration at its end tries again."
TIMEOUT = 5  # seconds: maximum wait for a connection, and maximum wait for each packet
USER, PASSWORD, TOKEN, INSECURE, SERVER_CA, CLIENT_CERTIFICATE = (
    f"MLFLOW_TRACKING_{name}"
    for name in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS", "SERVER_CERT_PATH", "CLIENT_CERT_PATH")
)


def check(store: Store, experiment: str, variables: Mapping[str, str]) -> str | None:
    """Check that a model can be registered under an experiment. Return a warning if this is uncertain.

    `variables` are the environment variables that begin with MLFLOW_.

    Raises PipelineError if the server is older than MLflow 3, because MLflow's client does not support older servers.
    Also raises it if a database cannot be read, or if the experiment has no permanent and writable place for the
    model's files. Raises SettingsError if variables are invalid.
    """
    if store.uri.startswith(("http://", "https://")):
        return _check_server(store.uri, experiment, variables)
    if path := database.path_of(store.uri):
        return _check_sqlite(store, path, experiment)
    if not store.uri.startswith("databricks"):
        _check_database(store, experiment)
    return None


def request_options(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments for `requests` that MLflow's client uses: login or token, workspace, and certificates.

    `requests` itself applies proxies, `.netrc`, REQUESTS_CA_BUNDLE and a login in the URI. This function follows
    mlflow.utils.credentials.get_default_host_creds and mlflow.utils.rest_utils.http_request.

    Raises SettingsError if variables are invalid or contradict each other.
    """
    insecure = variables.get(INSECURE, "false").lower()
    if insecure not in ("true", "false", "1", "0"):
        raise SettingsError(f"{INSECURE}={insecure}: expected true or false.")
    authority = variables.get(SERVER_CA)
    if authority and insecure in ("true", "1"):
        raise SettingsError(f"{INSECURE} and {SERVER_CA} are both set: MLflow accepts only one of them.")
    headers: dict[str, str] = {}
    options: dict[str, Any] = {"verify": authority or insecure in ("false", "0"), "headers": headers}
    if certificate := variables.get(CLIENT_CERTIFICATE):
        options["cert"] = certificate
    user, password = _login(variables)
    if user and password:
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {login}"
    elif token := variables.get(TOKEN):
        headers["Authorization"] = f"Bearer {token}"
    if workspace := variables.get("MLFLOW_WORKSPACE"):
        headers["X-MLFLOW-WORKSPACE"] = workspace
    return options


def needs_plugin(variables: Mapping[str, str]) -> bool:
    """Return whether only a plug-in of MLflow can sign requests."""
    return bool(variables.get("MLFLOW_TRACKING_AUTH") or variables.get("MLFLOW_TRACKING_AWS_SIGV4"))


def _login(variables: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return user and password from the environment, else from MLflow's credentials file."""
    # Path.expanduser raises for a user without a home folder.
    file = os.path.expanduser("~/.mlflow/credentials")  # noqa: PTH111
    parser = configparser.ConfigParser()
    try:
        parser.read(file)
        stored = dict(parser["mlflow"]) if parser.has_section("mlflow") else {}
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {type(error).__name__}.") from None  # str(error) may hold a secret
    user, password = (variables.get(name) or stored.get(name.lower()) for name in (USER, PASSWORD))
    return user, password


def _check_server(uri: str, experiment: str, variables: Mapping[str, str]) -> str | None:
    import requests

    shown = redact(uri.rstrip("/"))
    options = request_options(variables)
    if needs_plugin(variables):
        return None
    try:
        with requests.Session() as session:
            answer = session.get(f"{uri.rstrip('/')}/version", timeout=TIMEOUT, stream=True, **options)
            found = next(answer.iter_content(100), b"").decode("utf-8", "replace").strip()
            if answer.status_code != requests.codes.ok:
                return _explain_status(shown, answer)
            major = re.match(r"(\d+)\.\d", found)
            if major is None:
                return f"The server at {shown} does not identify itself as an MLflow server. {LATER}"
            if int(major[1]) < SERVER_MAJOR:
                raise PipelineError(
                    f"The MLflow server at {shown} is version {found}; this pipeline requires version {SERVER_MAJOR} "
                    "or later: upgrade the server."
                )
            location = _location_on_server(session, uri, experiment, options)
    except (requests.RequestException, ValueError) as error:
        return _explain_failure(shown, error)
    except OSError as error:  # requests checks files of certificates before it connects
        raise PipelineError(f"{error}: correct {CLIENT_CERTIFICATE}, {SERVER_CA} or REQUESTS_CA_BUNDLE.") from error
    if location is not None and _is_local(location) and not _can_hold_artifacts(location):
        raise PipelineError(
            f"The MLflow server at {shown} expects its clients to write the artifacts of {experiment} to {location}, "
            "which is not a writable folder here. Start the server without --no-serve-artifacts and "
            "--default-artifact-root, and set MLFLOW_EXPERIMENT_NAME to a new name, because the place of an "
            "existing experiment does not change. Or mount the server's folder here at the same path."
        )
    return None


def _explain_status(shown: str, answer: "requests.Response") -> str:
    hint = {
        401: f"It requires valid credentials: set {USER} and {PASSWORD}, or {TOKEN}. ",
        403: "If it does not accept the host name of the request, set MLFLOW_SERVER_ALLOWED_HOSTS on the server. ",
    }.get(answer.status_code, "")
    return f"The MLflow server at {shown} answers {answer.status_code} {answer.reason}. {hint}{LATER}"


def _explain_failure(shown: str, error: Exception) -> str:
    import requests

    cause: BaseException = error
    while isinstance(cause, Exception) and (deeper := cause.__cause__ or cause.__context__):
        cause = deeper
    reason = redact(str(getattr(cause, "strerror", None) or cause))
    hint = ""
    if isinstance(error, requests.exceptions.SSLError):
        hint = f"If its certificate is from a private authority, set {SERVER_CA} to the authority's file. "
    return f"The MLflow server at {shown} cannot be reached ({reason}). {hint}{LATER}"


def _location_on_server(
    session: "requests.Session", uri: str, experiment: str, options: Mapping[str, Any]
) -> str | None:
    """Return where a server stores the artifacts of an experiment; None if the server does not say.

    If the experiment does not exist yet, the function returns the location of the newest experiment whose location was
    chosen by the server. The server would choose a location beside this location for the new experiment.
    """
    api = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments"
    answer = session.get(f"{api}/get-by-name", params={"experiment_name": experiment}, timeout=TIMEOUT, **options)
    if found := _content(answer).get("experiment"):
        return found.get("artifact_location")
    latest: dict[str, Any] = {"max_results": 20, "order_by": ["creation_time DESC"], "view_type": "ALL"}
    answer = session.post(f"{api}/search", json=latest, timeout=TIMEOUT, **options)
    for found in _content(answer).get("experiments", []):
        location = found.get("artifact_location", "")
        if location.endswith(f"/{found.get('experiment_id')}"):  # the server chose the location
            return location
    return None


def _content(answer: "requests.Response") -> dict[str, Any]:
    try:
        content = answer.json() if answer.ok else {}
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}


def _check_sqlite(store: Store, path: Path, experiment: str) -> str | None:
    assert store.artifacts is not None  # noqa: S101 - every SQLite database has a folder beside it
    if not path.exists():
        return None
    database.move_artifacts(path, store.artifacts)
    location = database.artifact_location(path, experiment)
    if location in (None, store.artifacts) or not _is_local(location):
        return None
    if _can_hold_artifacts(location):
        return f"The experiment {experiment} stores artifacts in {location}, not beside {path}: back up both places."
    raise PipelineError(
        f"The experiment {experiment} in {path} stores artifacts in {location}, which is not a writable folder here: "
        "restore or mount that folder, or set MLFLOW_EXPERIMENT_NAME to a new name. A new experiment stores them "
        f"beside the database, in {store.artifacts}."
    )


def _check_database(store: Store, experiment: str) -> None:
    from mlflow import MlflowClient

    with errors_explained(store, REQUEST_FAILED):
        found = MlflowClient(store.uri).get_experiment_by_name(experiment)
    if found is None or (_is_local(found.artifact_location) and not _can_hold_artifacts(found.artifact_location)):
        place = "is not created yet" if found is None else f"stores its artifacts at {found.artifact_location}"
        raise PipelineError(
            f"The experiment {experiment} in {redact(store.uri)} {place}, and MLflow would write the model into a "
            "folder of this machine or container. Create an experiment with a place for artifacts "
            "(`mlflow experiments create --experiment-name NAME --artifact-location s3://...`) and set "
            "MLFLOW_EXPERIMENT_NAME to its name; or use an MLflow server."
        )


def _is_local(location: str) -> bool:
    return urlsplit(location).scheme in ("", "file")


def _can_hold_artifacts(location: str) -> bool:
    """Return whether a local folder or its parent folder exists and is writable. `location` is a path or file: URI."""
    path = database.local_path(location)
    return path.is_absolute() and any(
        folder.is_dir() and os.access(folder, os.W_OK) for folder in (path, path.parent) if folder != Path("/")
    )
