"""SQLite databases of MLflow: those of older and newer releases, and those that were moved with their folder.

`support/mlflow-3.10.sql` and `mlflow-3.14.sql` are dumps of databases that MLflow 3.10.1 and 3.14.0 made, each with an
experiment, a finished run with metrics, a logged model and a registered version with an alias.
"""

import contextlib
import shutil
import sqlite3
import sys

import mlflow
import pytest
from conftest import ROOT, run_in_own_mounts
from mlflow.models import Model
from sqlalchemy import create_engine

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import database, versions
from dgmd_pipeline.registry import store as registry_store

pytest_plugins = ["support.registry"]
OLD = {"3.10": "1b5f0d9ad7c1", "3.14": "b7e4c1a90f23"}  # release -> the revision of its schema
CONTAINER = "file:///app/data/mlflow/artifacts"


def old_database(folder, release):
    folder.mkdir(parents=True)
    path = folder / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((ROOT / f"tests/support/mlflow-{release}.sql").read_text())
    return path


def change(path, *statement):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(*statement)


def dump(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("release", OLD)
def test_a_database_of_an_older_release_is_copied_and_upgraded(release, tmp_path, caplog):
    path = old_database(tmp_path / "mlflow", release)
    before = dump(path)
    path.with_name("mlflow.db.upgrading").write_bytes(b"of an upgrade that was killed")
    store = registry_store.embedded(path.parent)
    registry_store.upgrade(store)
    copy = path.with_name(f"mlflow.db.{OLD[release]}.backup")
    assert sorted(path.parent.iterdir()) == [path, copy]
    assert dump(copy) == before
    assert f"upgraded from schema {OLD[release]} to" in caplog.text
    assert copy.name in caplog.text
    (version,) = versions.read(store, "jars").versions
    assert (version.version, version.aliases, version.tags["environment"]) == (1, ["candidate"], "non-production")
    points = mlflow.MlflowClient(store.uri, store.uri).get_metric_history(version.run_id, "val_accuracy")
    assert [point.value for point in points] == [0.5, 0.75]
    caplog.clear()
    upgraded = path.read_bytes()
    registry_store.upgrade(store)
    assert (path.read_bytes(), caplog.text) == (upgraded, "")


def test_a_database_is_unchanged_if_its_upgrade_fails(tmp_path):
    path = old_database(tmp_path / "mlflow", "3.14")
    change(path, "CREATE TABLE mcp_servers (name TEXT)")  # the first migration of several creates it
    before = dump(path)
    with pytest.raises(PipelineError, match=r"mcp_servers.*unchanged, and mlflow.db.b7e4c1a90f23.backup is a copy"):
        database.upgrade(path)
    assert dump(path) == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["mlflow.db", "mlflow.db.b7e4c1a90f23.backup"]
    assert dump(path.with_name("mlflow.db.b7e4c1a90f23.backup")) == before


def test_a_database_of_a_newer_release_is_refused_with_the_copies_that_can_replace_it(tmp_path):
    path = old_database(tmp_path / "mlflow", "3.14")
    path.with_name("mlflow.db.b7e4c1a90f23.backup").write_bytes(b"")
    change(path, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    before = dump(path)
    with pytest.raises(
        PipelineError, match=r"does not know its schema ffffffffffff.*\(mlflow.db.b7e4c1a90f23.backup\)"
    ):
        database.upgrade(path)
    assert dump(path) == before


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(PipelineError, match=rf"{path} cannot be read or upgraded: file is not a database"):
        database.upgrade(path)
    database.upgrade(tmp_path / "missing.db")
    assert list(tmp_path.iterdir()) == [path]


def test_the_image_of_the_server_says_why_it_cannot_upgrade(tmp_path):
    path = old_database(tmp_path / "mlflow", "3.10")
    script = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77; exec "$2" -m "$3" "sqlite:///$1/mlflow.db"'
    )
    words = (path.parent, sys.executable, "dgmd_pipeline.registry.database")
    done = run_in_own_mounts(tmp_path, script, *words, PYTHONPATH=ROOT)
    assert done.returncode == 1
    assert "may not write to its folder. Run the command once where this folder is writable" in done.stderr
    assert "Traceback" not in done.stderr


def registered_by_hand(store, name, folder):
    """Register a version with the files that `versions.fetch` needs, without a real model."""
    mlflow.set_tracking_uri(store.uri)
    client = mlflow.MlflowClient()
    experiment = client.create_experiment(name, artifact_location=store.artifacts)
    run = client.create_run(experiment)
    (folder / "split").mkdir(parents=True)
    images = folder / "split/training.csv"
    manifest.write(images, manifest.Example, [manifest.Example("jar/1.png", "jar", 0, "a" * 64, "1")])
    client.log_artifact(run.info.run_id, str(images), "split")
    model = client.create_logged_model(experiment, name="model", source_run_id=run.info.run_id)
    (folder / "model/data").mkdir(parents=True)
    (folder / "model/data/model.keras").write_bytes(b"weights")
    Model(metadata={"labels": ["jar"]}).save(str(folder / "model/MLmodel"))
    client.log_model_artifacts(model.model_id, str(folder / "model"))
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model(name)
    client.create_model_version(name, f"models:/{model.model_id}", run.info.run_id, model_id=model.model_id)
    mlflow.set_tracking_uri(None)  # it is also a variable of the environment, which other tests would see
    return run.info.run_id


@pytest.fixture(scope="module")
def made_in_a_container(tmp_path_factory):
    """A folder `mlflow` with a store as a container leaves it, where it is /app/data/mlflow; the id of its run."""
    folder = tmp_path_factory.mktemp("host") / "data/mlflow"
    folder.mkdir(parents=True)
    registry_store.create(folder)
    store = registry_store.embedded(folder)
    run = registered_by_hand(store, "jars", folder.parent / "files")
    client = mlflow.MlflowClient(store.uri, store.uri)
    client.create_experiment("of another program", artifact_location="file:///app/data/elsewhere/artifacts")
    client.create_experiment("with the same names", artifact_location="file:///srv/mlflow/artifacts")
    client.create_run(client.get_experiment_by_name("with the same names").experiment_id)
    for table, column in database.PLACES:
        place = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"  # noqa: S608
        change(folder / "mlflow.db", place, (store.artifacts, CONTAINER))
    return folder, run


@pytest.fixture
def moved(made_in_a_container, tmp_path):
    folder = tmp_path / "a?b #c%20d/mlflow"
    shutil.copytree(made_in_a_container[0], folder)
    return registry_store.embedded(folder), folder


def test_a_store_is_read_at_another_path_without_changing_it(moved, tmp_path):
    store, folder = moved
    before = dump(folder / "mlflow.db")
    (version,) = versions.read(store, "jars").versions
    fetched = versions.fetch(store, "jars", version, tmp_path / "1")
    assert fetched.path.read_bytes() == b"weights"
    assert (fetched.labels, fetched.trained_on) == (["jar"], {"a" * 64})
    assert versions.artifact(store, version, "missing.csv", tmp_path) is None
    assert dump(folder / "mlflow.db") == before


def test_a_store_at_another_path_can_be_changed_to_it(moved, made_in_a_container, tmp_path):
    store, folder = moved
    registry_store.move_artifacts(store)
    client = mlflow.MlflowClient(store.uri, store.uri)
    # As a consumer without this package reads it
    mlflow.set_tracking_uri(store.uri)
    assert mlflow.artifacts.download_artifacts("models:/jars/1", dst_path=str(tmp_path / "model"))
    assert client.list_artifacts(made_in_a_container[1], "split")[0].path == "split/training.csv"
    run = client.create_run(client.get_experiment_by_name("jars").experiment_id)
    assert run.info.artifact_uri.startswith(folder.as_uri())
    recorded = "\n".join(dump(folder / "mlflow.db"))
    assert CONTAINER not in recorded
    assert "'file:///app/data/elsewhere/artifacts'" in recorded
    assert "'file:///srv/mlflow/artifacts'" in recorded  # its run is not in this folder


def test_a_database_is_in_its_folder_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / "a?b #c%20d&uri=true e@f:g/mlflow"
    folder.mkdir(parents=True)
    registry_store.create(folder)
    registered_by_hand(registry_store.embedded(folder), "jars", tmp_path / "files")
    assert {path.name for path in tmp_path.iterdir()} == {"files", folder.parent.name}
    assert sorted(path.name for path in folder.iterdir()) == ["artifacts", "mlflow.db"]
    assert database.path_of(registry_store.embedded(folder).uri) == folder / "mlflow.db"


def test_a_database_that_is_set_stores_artifacts_beside_it(tmp_path):
    assert registry_store.at(f"sqlite:///{tmp_path}/mlflow.db") == registry_store.embedded(tmp_path)
    assert registry_store.at("sqlite:///jars.db").artifacts == (tmp_path / "artifacts").as_uri()
    assert registry_store.at("http://me@127.0.0.1:9").artifacts is None


def test_only_files_that_are_worthless_until_they_are_complete_are_written_without_waiting_for_the_disk(tmp_path):
    def synchronous(name):
        with create_engine(database.uri_of(tmp_path / name)).connect() as connection:
            return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    with database.without_sync():
        assert synchronous("draft.db") == 0
    assert synchronous("draft.db") > 0
