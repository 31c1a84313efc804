"""An SQLite database of MLflow: its URI, the upgrade of its schema, and the places of artifacts in its tables.

The image of the MLflow server runs this module before the server: `python -m dgmd_pipeline.registry.database URI`.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from dgmd_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

log = logging.getLogger(__name__)
PLACES = (  # columns with the URI of a folder of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def uri_of(path: Path) -> str:
    """Return MLflow's URI for a database file at an absolute path, which may contain any characters."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    # If a URI begins with sqlite:///, MLflow creates the parent folder of the path in the URI. MLflow does not decode
    # the path, so the folder would have a wrong name if the path is quoted. If the URI begins with
    # sqlite+pysqlite:///, MLflow creates no folder. SQLAlchemy decodes the path in both cases.
    return f"sqlite:///{path}" if quoted == str(path) else f"sqlite+pysqlite:///{quoted}"


def path_of(uri: str) -> Path | None:
    """Return the file of the SQLite database at a URI; None if the URI names a server or another database."""
    if not uri.startswith("sqlite"):
        return None
    plain = uri.removeprefix("sqlite:///")
    if plain.startswith("/") and not set(plain) & set("?%#"):  # saves the import of SQLAlchemy, 0.2 s
        return Path(plain).resolve()
    from sqlalchemy import make_url

    name = make_url(uri).database
    return None if not name or name == ":memory:" or name.startswith("file:") else Path(name).resolve()


def check_driver(uri: str) -> None:
    """Raise ValueError if the driver of a database is not installed. MLflow installs only the driver of SQLite.

    The error's text says what value is expected.
    """
    if uri.startswith(("http:", "https:", "databricks", "sqlite:")):
        return
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    packages = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        package = packages.get(error.name or "", error.name)
        raise ValueError(
            f"the address of an MLflow server, or a database whose driver is installed ({package} is not)"
        ) from None
    except ArgumentError:
        raise ValueError("a database with a driver that SQLAlchemy knows, such as postgresql+psycopg://host") from None


def local_path(uri: str) -> Path:
    """Return the path of a local folder of artifacts. MLflow records it as a path or as a file: URI."""
    return Path(unquote(urlsplit(uri).path) if uri.startswith("file:") else uri)


def upgrade(path: Path) -> None:
    """Upgrade the schema of a database to the schema of the installed MLflow. Keep a copy of the old database.

    A database that does not exist yet or has no schema is left to MLflow, which creates its tables. MLflow's
    migrations are not transactional and cannot be repeated after an interruption. So the migrations change a temporary
    copy. The temporary copy then replaces the content of the database in one transaction.

    Raises PipelineError if the schema is newer than the installed MLflow, if the upgrade fails or if the file is not
    a database. After such an error, the database is unchanged.
    """
    if not path.is_file():
        return
    try:
        scripts = _migrations()
        if _schema(path) in (None, scripts.get_current_head()):
            return
        with _locked(path.parent):
            _upgrade(path, scripts)
    except (OSError, sqlite3.Error) as error:
        raise PipelineError(f"MLflow's database {path} cannot be read or upgraded: {error}.") from error


def _upgrade(path: Path, scripts: "ScriptDirectory") -> None:
    from alembic.util import CommandError
    from mlflow import __version__ as installed
    from mlflow.db import upgrade as db_upgrade

    found, head = _schema(path), scripts.get_current_head()
    if found in (None, head):  # another process has upgraded it
        return
    try:
        scripts.get_revision(found)
    except CommandError:
        copies = sorted(file.name for file in path.parent.iterdir() if file.name.startswith(f"{path.name}."))
        raise PipelineError(
            f"MLflow's database {path} was upgraded by a newer version of MLflow. MLflow {installed} does not know its "
            f"schema {found}. Use the newer version again, or replace the database with a copy from before the upgrade "
            f"({', '.join(copies) or 'there is none beside it'})."
        ) from None
    if not os.access(path.parent, os.W_OK) or not os.access(path, os.W_OK):
        raise PipelineError(
            f"MLflow's database {path} has the schema {found} of an older MLflow. MLflow {installed} cannot upgrade "
            f"it: user {os.getuid()} may not write to its folder. Run the command once where this folder is writable."
        )
    copy, draft = path.with_name(f"{path.name}.{found}.backup"), path.with_name(f"{path.name}.upgrading")
    _copy(path, copy)
    draft.unlink(missing_ok=True)  # the draft of an upgrade that was killed
    try:
        _copy(path, draft)
        with _quiet_migrations(), without_sync():
            db_upgrade.main([uri_of(draft)], standalone_mode=False)
        _copy(draft, path)
    except Exception as error:  # whatever a migration raises
        reason = str(error).strip().split("\n")[0]
        raise PipelineError(
            f"The upgrade of MLflow's database {path} from schema {found} to {head} of MLflow {installed} failed: "
            f"{reason}. The database is unchanged, and {copy.name} is a copy of it. Until the cause of the "
            "failure is corrected, use the version of MLflow that made the database."
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    log.warning(
        "MLflow's database %s was upgraded from schema %s to %s of MLflow %s. %s is a copy from before the upgrade.",
        path, found, head, installed, copy.name,
    )  # fmt: skip


@contextlib.contextmanager
def without_sync() -> Iterator[None]:
    """Within the block, SQLite does not wait for the disk.

    If the machine crashes, a database that is written in the block may be damaged. So use the block only for temporary
    files, which are discarded after a crash.

    MLflow creates and upgrades its tables in about 60 transactions. On a busy disk, SQLite spends 2.0 of 2.8 s
    on waiting.
    """
    from sqlalchemy import Engine, event

    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)


def move_artifacts(path: Path, artifacts: str) -> None:
    """Update the places of artifacts in a database after their folder was moved to `artifacts`, a URI.

    The database records a folder for each experiment. This function replaces this folder with `artifacts`, in the
    places of the experiment and of its runs and models, if two conditions are met. (1) The path of the recorded folder
    and `artifacts` end with the same two names. (2) `artifacts` contains at least one run whose recorded place is
    below the recorded folder, or the database has no such run. All columns are changed in one transaction.

    Raises PipelineError if the database cannot be read or written.
    """
    name = "/".join(artifacts.split("/")[-2:])
    here = local_path(artifacts)
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection, connection:
            recorded = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
            for (old,) in recorded:
                if not old or old == artifacts or not (old.startswith("file:") and old.endswith(f"/{name}")):
                    continue
                runs = connection.execute(
                    "SELECT run_uuid FROM runs WHERE substr(artifact_uri, 1, ?) = ?", (len(old) + 1, f"{old}/")
                ).fetchall()
                if runs and not any((here / run).exists() for (run,) in runs):
                    continue
                for table, column in PLACES:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (artifacts, len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )
                log.info("  %s: the artifacts that were at %s are now at %s", path, old, artifacts)
    except sqlite3.Error as error:
        raise PipelineError(f"MLflow's database {path} cannot be read or written: {error}.") from error


def artifact_location(path: Path, experiment: str) -> str | None:
    """Return where an experiment's artifacts are; None if the database has no such experiment.

    Raises PipelineError if the database cannot be read.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
            row = connection.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,))
            return next((location for (location,) in row), None)
    except sqlite3.Error as error:
        raise PipelineError(f"MLflow's database {path} cannot be read: {error}.") from error


def _migrations() -> "ScriptDirectory":
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))


def _schema(path: Path) -> str | None:
    """Return the revision of a database's schema; None if it has no tables of MLflow."""
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return row[0] if row else None


def _copy(source: Path, target: Path) -> None:
    """Make `target` a copy of a database, in one transaction.

    Other processes may use both databases during the copying.
    """
    with contextlib.closing(sqlite3.connect(source)) as origin, contextlib.closing(sqlite3.connect(target)) as copy:
        origin.backup(copy)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time upgrade a database in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)  # makes the names of new files in the folder durable
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quiet_migrations() -> Iterator[None]:
    """Silence the log of each migration."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def main(uri: str) -> str | None:
    """Upgrade the database that a URI names, if it is an SQLite database. Return the message of a failure."""
    try:
        if path := path_of(uri):
            upgrade(path)
    except PipelineError as error:
        return str(error)
    return None


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main(sys.argv[1]))
