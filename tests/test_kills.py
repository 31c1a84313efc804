"""`kill -9` at named and at random moments: the real command, S3 and MLflow; what is there after it and at the end.

KILLS is the number of random kills, KILLS_SEED repeats them as far as the machine does.
"""

import csv
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import boto3
import mlflow
import numpy as np
import pytest
from conftest import CREDENTIALS, ROOT, environment_with, picture, run_pipeline

pytestmark = pytest.mark.slow
CNN = {"BACKBONE": "cnn", "IMAGE_WIDTH": 16, "IMAGE_HEIGHT": 16, "NUM_SHARDS": 2, "EPOCHS": 3, "SEED": 1}
FROZEN = {
    "BACKBONE": "MobileNetV3-Small", "BACKBONE_WEIGHTS": "none", "IMAGE_WIDTH": 32, "IMAGE_HEIGHT": 32,
    "HEAD": "hidden",  # the kind that has epochs to be killed in
}  # fmt: skip
LEARNED = {"trained_model", "evaluation", "registered_model"}  # each one is another one
KILLS = int(os.environ.get("KILLS", "1"))

FIRST_BUILD = """
before GET *cloves%20shop_5.jpeg*
after write .draft-raw/listing.csv
before rename .draft-raw raw
after rename .draft-raw raw
after write .draft-inspected/thumbnails
after write .draft-label_map/mapping.json
after write .draft-balanced/_SUCCESS
before write .draft-split/validation.csv
before rename .draft-split split
after rename .draft-split split
before read .draft-tfrecord_*/.resume/*/records.npy
before rename .draft-tfrecord_* tfrecord_*
after POST */mlflow/runs/create
after say *epoch 2/3*
before rename .draft-trained_model trained_model
after rename .draft-trained_model trained_model
after rename .draft-evaluation evaluation
after POST */mlflow/logged-models
before POST */mlflow/runs/update
before POST */mlflow/model-versions/create
after POST */mlflow/model-versions/create
after POST */mlflow/registered-models/alias
before rename .draft-registered_model registered_model
after rename .draft-registered_model registered_model
"""
REPLACING = """
after rename .old-raw .draft-raw
after remove validation.csv
after rename .old-trained_model .draft-trained_model
after rename .old-registered_model .draft-registered_model
"""
BACK_TO_BEFORE = """
before GET *cloves%20shop_5.jpeg*
after rename raw .old-raw
before rename .old-raw raw
after rename .old-raw raw
before rename raw .old-raw
before rename .draft-raw raw
after rename .draft-raw raw
before rename .old-split .draft-split
after rename trained_model .old-trained_model
before rename registered_model .old-registered_model
after rename .draft-registered_model registered_model
"""
FEATURES = """
after rename .draft-features_training/.resume/.* .draft-features_training/.resume/*
after rename .draft-features_* features_*
after say *epoch 2/3*
"""


def moments(text):
    return text.strip().split("\n")


class Undisturbed(NamedTuple):
    """A run that nobody killed."""

    data_dir: Path
    seconds: float


def run(variables, *arguments):
    return run_pipeline(variables["DATA_DIR"].parent, *arguments, **variables)


def undisturbed_run(variables, *arguments):
    start = time.monotonic()
    result = run(variables, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return Undisturbed(variables["DATA_DIR"], time.monotonic() - start)


@pytest.fixture(scope="module")
def settings(s3_endpoint, mlflow_server):
    """What all runs have in common; the bucket holds two data sets."""
    client = boto3.client("s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    client.create_bucket(Bucket="kills")
    for folder, numbers in (("images", range(10)), ("others", range(5, 14))):
        for label in ("allspice", "black pepper", "cloves"):
            for number in numbers:
                key = f"train/{folder}/{label}/{label} shop_{number}.jpeg"
                client.put_object(Bucket="kills", Key=key, Body=picture(label, number))
    return {
        **CNN,
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DATA_BUCKET": "kills",
        "AWS_DATA_PATH": "train/images",
        "MLFLOW_TRACKING_URI": mlflow_server,
    }


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_run({**settings, "DATA_DIR": folder / "data", "MODEL_NAME": "undisturbed"})


@pytest.fixture(scope="module")
def undisturbed_frozen(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    return undisturbed_run({**settings, **FROZEN, "DATA_DIR": folder / "data", "MODEL_NAME": "undisturbed frozen"})


def whole_folders(data_dir):
    """Return the record of every step's folder that is there, or that the next run puts back; each has to have one."""
    if not data_dir.exists():
        return {}
    paths = [path for path in data_dir.iterdir() if path.is_dir() and not path.name.startswith(".draft-")]
    paths.sort(key=lambda path: not path.name.startswith(".old-"))  # where both are there, the new one counts
    return {path.name.removeprefix(".old-"): json.loads((path / "_SUCCESS").read_text("utf-8")) for path in paths}


def pieces(data_dir):
    """Return the inodes of the shards and vectors that a step which was killed has finished."""
    found = [*data_dir.glob(".draft-*/.resume/[!.]*/*.tfrecord"), *data_dir.glob(".draft-*/.resume/[!.]*/features.npy")]
    return {path.stat().st_ino for path in found}


def check_pieces(before, data_dir):
    """Shards and vectors that were finished before the last run are still there: nothing made them again."""
    assert before <= {path.stat().st_ino for path in data_dir.rglob("*")}, "made again"


def check_after_kill(before, data_dir, reference=None):
    """Nothing is lost or half made. Before `reference` is reached for the first time, what is done is never redone."""
    after = whole_folders(data_dir)
    assert set(before) <= set(after), "lost"
    if reference:
        assert {step: after[step] for step in before} == before, "redone"
        for step in set(after) - LEARNED:
            # What it takes to go on with a draft is removed just after the rename; a kill in between is mended later.
            assert_same(data_dir / step, reference / step, aside=".resume")


def kill_at(moment, variables, reference=None):
    data_dir = variables["DATA_DIR"]
    before, finished = whole_folders(data_dir), pieces(data_dir)
    command = [sys.executable, ROOT / "tests" / "support" / "kill_at.py", moment]
    environment = environment_with(variables)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Workers hold the same output, whose end this waits for: none may outlive the run.
    result = subprocess.run(command, cwd=data_dir.parent, env=environment, timeout=120, **options)
    assert result.returncode == -signal.SIGKILL, f"'{moment}' never came:\n{result.stdout}"
    check_after_kill(before, data_dir, reference)
    check_pieces(finished, data_dir)


def contents(folder, aside=None):
    def read(path):
        if path.name == "_SUCCESS":
            record = json.loads(path.read_text("utf-8"))
            of_one_run = ("started", "seconds", "worked", "volume")
            return {name: value for name, value in record.items() if name not in of_one_run}
        return np.load(path) if path.suffix == ".npy" else path.read_bytes()

    names = {path: path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(name): read(path) for path, name in names.items() if name.parts[0] != aside}


def assert_same(folder, reference, aside=None):
    found, expected = contents(folder, aside), contents(reference)
    assert set(found) == set(expected), folder
    for name, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=f"{folder}/{name}")
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value, err_msg=f"{folder}/{name}")
        else:
            assert found[name] == value, f"{folder}/{name}"


def assert_same_training(folder, reference):
    import keras

    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}
    histories = [list(csv.DictReader((path / "history.csv").open(newline=""))) for path in (folder, reference)]
    for row, expected in zip(*histories, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, abs=1e-5
        )
    models = [keras.models.load_model(path / "model.keras", compile=False) for path in (folder, reference)]
    for found, expected in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def assert_registered_once(variables, trainings):
    """Each training has one version and one run; the last one is the candidate and the one that the folder notes."""
    client = mlflow.MlflowClient(variables["MLFLOW_TRACKING_URI"])
    name = variables["MODEL_NAME"]
    versions = client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
    assert [int(version.version) for version in versions] == [*range(trainings, 0, -1)]
    experiment = client.get_experiment_by_name(name).experiment_id
    runs = client.search_runs([experiment])
    assert [model.status for model in client.search_logged_models([experiment])] == trainings * ["READY"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.info.run_id for run in runs) == sorted(version.run_id for version in versions)
    about = json.loads((variables["DATA_DIR"] / "trained_model" / "training.json").read_text())
    assert [version.tags["dgmd.training_id"] for version in versions].count(about["id"]) == 1
    assert versions[0].tags["dgmd.training_id"] == about["id"]
    assert client.get_run(versions[0].run_id).data.tags["dgmd.training_id"] == about["id"]
    assert int(client.get_model_version_by_alias(name, "candidate").version) == trainings
    assert whole_folders(variables["DATA_DIR"])["registered_model"]["counts"]["version"] == trainings
    (logged,) = client.get_run(versions[0].run_id).outputs.model_outputs
    assert client.get_logged_model(logged.model_id).status == "READY"


def assert_nothing_to_do(variables):
    result = run(variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Nothing to do" in result.stdout


def check_at_end(variables, reference, trainings=1):
    data_dir = variables["DATA_DIR"]
    assert sorted(path.name for path in data_dir.iterdir()) == sorted(path.name for path in reference.iterdir())
    for step in set(whole_folders(reference)) - LEARNED:
        assert_same(data_dir / step, reference / step)
    assert_same_training(data_dir / "trained_model", reference / "trained_model")
    assert_registered_once(variables, trainings)
    assert_nothing_to_do(variables)


def test_an_undisturbed_run_leaves_the_folders_and_the_lock_file(undisturbed):
    hidden = [path.name for path in undisturbed.data_dir.iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"]
    assert set(whole_folders(undisturbed.data_dir)) > LEARNED


def test_killed_at_every_named_moment_of_a_first_build(settings, undisturbed, tmp_path):
    variables = {**settings, "DATA_DIR": tmp_path / "data", "MODEL_NAME": "first build"}
    for moment in moments(FIRST_BUILD):
        kill_at(moment, variables, undisturbed.data_dir)
    assert_nothing_to_do(variables)
    check_at_end(variables, undisturbed.data_dir)


def test_killed_while_folders_are_replaced(settings, undisturbed, tmp_path):
    shutil.copytree(undisturbed.data_dir, tmp_path / "data")
    variables = {**settings, "DATA_DIR": tmp_path / "data", "MODEL_NAME": "replaced"}
    other = {**variables, "AWS_DATA_PATH": "train/others", "VALIDATION_PCNT": 0.3}
    for moment in moments(REPLACING):
        kill_at(moment, other)
    assert_nothing_to_do(other)
    finished = whole_folders(tmp_path / "data")
    for moment in moments(BACK_TO_BEFORE):
        kill_at(moment, variables)
        if moment == "before rename raw .old-raw":
            # What was put aside has been put back: with the settings that it was made with, nothing is missing.
            assert whole_folders(tmp_path / "data") == finished
            assert_nothing_to_do(other)
    assert_nothing_to_do(variables)
    check_at_end(variables, undisturbed.data_dir, trainings=2)


def test_killed_while_features_are_extracted_and_learned_from(settings, undisturbed, tmp_path):
    until = ("--until", "train")  # what follows is the same with every backbone
    (tmp_path / "reference").mkdir()
    reference = {**settings, **FROZEN, "DATA_DIR": tmp_path / "reference" / "data"}
    undisturbed_run(reference, *until)
    shutil.copytree(undisturbed.data_dir, tmp_path / "data")
    variables = {**settings, **FROZEN, "DATA_DIR": tmp_path / "data", "MODEL_NAME": "killed frozen"}
    for moment in moments(FEATURES):
        kill_at(moment, variables)
    result = run(variables, *until)
    assert result.returncode == 0, result.stdout + result.stderr
    records = whole_folders(tmp_path / "data")
    assert 0 < records["features_training"]["worked"] < records["features_training"]["images"]
    assert records["trained_model"]["worked"] == records["features_training"]["images"]  # the last of three epochs
    for step in set(whole_folders(reference["DATA_DIR"])) - LEARNED:
        assert_same(tmp_path / "data" / step, reference["DATA_DIR"] / step)
    assert_same_training(tmp_path / "data" / "trained_model", reference["DATA_DIR"] / "trained_model")


def test_killed_at_random_moments(settings, undisturbed, request, tmp_path):
    seed = int(os.environ.get("KILLS_SEED") or secrets.randbits(32))
    print(f"KILLS_SEED={seed}")
    chance = random.Random(seed)
    kills, sequence, shortest = 0, 0, {}
    while kills < KILLS:
        sequence += 1
        variables = {**settings, "DATA_DIR": tmp_path / f"{sequence}" / "data", "MODEL_NAME": f"random {sequence}"}
        reference = undisturbed
        if sequence % 4 == 0:
            variables, reference = {**variables, **FROZEN}, request.getfixturevalue("undisturbed_frozen")
        data_dir = variables["DATA_DIR"]
        data_dir.parent.mkdir()
        seconds = shortest.setdefault(reference, reference.seconds)
        while True:
            before, finished, start = whole_folders(data_dir), pieces(data_dir), time.monotonic()
            process = run_pipeline(data_dir.parent, start=True, **variables)
            moment = chance.uniform(0, seconds) if kills < KILLS else None
            try:
                output = process.communicate(timeout=moment)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                output = process.communicate(timeout=60)[0]  # ends with the last worker
            last = output.strip().split("\n")[-1]
            check_pieces(finished, data_dir)
            print(f"sequence {sequence}, kill {kills + 1} after {moment} s: {process.returncode}, {last}")
            if process.returncode == 0:
                if not before:  # the reference may have been made by a colder or busier machine
                    shortest[reference] = min(seconds, time.monotonic() - start)
                break
            assert process.returncode == -signal.SIGKILL, output
            kills += 1
            check_after_kill(before, data_dir, reference.data_dir)
        check_at_end(variables, reference.data_dir)
