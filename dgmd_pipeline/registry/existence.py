"""Asks the registry whether it still has a version.

This module does not use MLflow, because the import of MLflow takes longer than a run whose steps are all done already.
"""

import contextlib
import itertools
import json
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dgmd_pipeline.formatting import redact
from dgmd_pipeline.registry import database
from dgmd_pipeline.registry.store import TRAINING_ID

log = logging.getLogger(__name__)
TIMEOUT = 2  # seconds: maximum wait for a connection, and maximum wait for each packet
PIECE, MAX_BYTES = 10_000, 1_000_000  # an answer is read in pieces of PIECE bytes, up to MAX_BYTES bytes
# MLflow keeps the row of a deleted version and sets its stage to Deleted_Internal.
QUERY = """
SELECT tags.value FROM model_versions AS versions
LEFT JOIN model_version_tags AS tags
ON tags.name = versions.name AND tags.version = versions.version AND tags.key = ?
WHERE versions.name = ? AND versions.version = ? AND versions.current_stage != 'Deleted_Internal'
"""


class Registered(NamedTuple):
    """A version that was registered."""

    name: str
    version: int
    training_id: str


def exists(uri: str, wanted: Registered, options: Mapping[str, Any]) -> bool | None:
    """Return whether the registry at a URI still has a version.

    Sends one request to a server, or one query to an SQLite database. Returns False if the version with this number
    comes from another training. Returns None if the registry does not answer as expected, or is a database other than
    SQLite. `options` are arguments for `requests`, such as a login.
    """
    if uri.startswith(("http://", "https://")):
        return _on_server(uri, wanted, options)
    path = database.path_of(uri)
    return _in_database(path, wanted) if path else None


def _on_server(uri: str, wanted: Registered, options: Mapping[str, Any]) -> bool | None:
    import requests

    url = f"{uri.rstrip('/')}/api/2.0/mlflow/model-versions/get"
    asked = {"name": wanted.name, "version": str(wanted.version)}
    try:
        with requests.get(url, params=asked, timeout=TIMEOUT, stream=True, **options) as answer:
            text = b"".join(itertools.islice(answer.iter_content(PIECE), MAX_BYTES // PIECE))
    except (requests.RequestException, OSError) as error:  # OSError: a file with certificates is missing
        _warn(redact(uri), wanted, type(error).__name__)
        return None
    try:
        content = json.loads(text)
        if answer.ok:
            tags = {tag["key"]: tag["value"] for tag in content["model_version"].get("tags", [])}
            return tags.get(TRAINING_ID, wanted.training_id) == wanted.training_id
        if content["error_code"] == "RESOURCE_DOES_NOT_EXIST":
            return False
        reason = content["error_code"]
    except (ValueError, LookupError, TypeError, AttributeError):
        reason = "not an answer of MLflow"
    _warn(redact(uri), wanted, f"{answer.status_code} {answer.reason}, {reason}")
    return None


def _in_database(path: Path, wanted: Registered) -> bool | None:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute(QUERY, (TRAINING_ID, wanted.name, wanted.version)).fetchone()
    except sqlite3.Error as error:
        _warn(str(path), wanted, str(error))
        return None
    return found is not None and found[0] in (None, wanted.training_id)


def _warn(registry: str, wanted: Registered, reason: str) -> None:
    text = "Cannot find out whether %s version %d is still in the registry: %s does not answer as expected: %s."
    log.warning(text, wanted.name, wanted.version, registry, reason)
