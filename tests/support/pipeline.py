"""Small runs of the whole pipeline for tests."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import mlflow
import pytest
from conftest import CREDENTIALS, ROOT, environment_with, picture, run_pipeline

TINY = {"BACKBONE": "cnn", "IMAGE_WIDTH": 16, "IMAGE_HEIGHT": 16, "NUM_SHARDS": 2, "EPOCHS": 2, "SEED": 1}


LABELS = ["allspice", "black pepper", "cloves"]


def fill(client, bucket, labels=LABELS, images=10):
    for label in labels:
        for number in range(images):
            key = f"train/images/{label}/{label} shop_{number}.jpeg"
            client.put_object(Bucket=bucket, Key=key, Body=picture(label, number))


def client_of(variables):
    return mlflow.MlflowClient(variables["MLFLOW_TRACKING_URI"].replace("me:pa55word@", ""))


def on_a_terminal(folder, *arguments, **variables):
    """Run the command on a terminal of 80 columns and return the lines that are shown."""
    ours, its = pty.openpty()
    environment = environment_with({"COLUMNS": "80", **variables})
    command = [sys.executable, ROOT / "pipeline.py", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # raised when nobody writes to the terminal any more
        while more := os.read(ours, 4096):
            shown += more
    os.close(ours)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n").splitlines()


STEPS = [
    "raw", "inspected", "label_map", "balanced", "split", "tfrecord_training", "tfrecord_validation",
    "trained_model", "evaluation", "registered_model",
]  # fmt: skip


def folders(data_dir):
    """The values that change when a step is done again."""
    return {step: (data_dir / step / "_SUCCESS").stat().st_mtime_ns for step in STEPS}


def redone(before, data_dir):
    return {step for step, inode in folders(data_dir).items() if before[step] != inode}


@pytest.fixture(scope="session")
def finished(s3_endpoint, mlflow_server, tmp_path_factory):
    """A finished run: its folder, variables and result. Tests do not change it."""
    import boto3

    folder = tmp_path_factory.mktemp("finished")
    variables = {
        **TINY,
        **CREDENTIALS,
        "DATA_DIR": folder / "data",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DATA_BUCKET": "finished",
        "AWS_DATA_PATH": "train/images",
        "MODEL_NAME": "finished",
        "MLFLOW_TRACKING_URI": mlflow_server.replace("//", "//me:pa55word@"),
    }
    client = boto3.client("s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    client.create_bucket(Bucket="finished")
    fill(client, "finished")
    put = {
        "cloves/broken.jpeg": picture("cloves", 0)[:100],
        "cloves/copy of 1.png": picture("cloves", 1),
        "cloves/../../outside.png": picture("cloves", 99),
        "readme.txt": b"no label",
        "nutmeg/lonely.png": picture("nutmeg", 1),
    }
    for name, content in put.items():
        client.put_object(Bucket="finished", Key=f"train/images/{name}", Body=content)
    client.put_object(Bucket="finished", Key="train/images-old/anise/old.png", Body=picture("anise", 1))
    return folder / "data", variables, run_pipeline(folder, **variables)


@pytest.fixture
def data(finished, tmp_path):
    """A copy of the finished run's folder, which a test may change."""
    original, variables, _ = finished
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data", {**variables, "DATA_DIR": tmp_path / "data"}


@pytest.fixture
def live(bucket, s3_endpoint, tmp_path, finished, mlflow_server):
    """A bucket for one test with 3 x 10 images, and the variables for runs on it."""
    name, client = bucket
    fill(client, name)
    variables = {
        **TINY,
        **CREDENTIALS,
        "DATA_DIR": tmp_path / "data",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_DATA_BUCKET": name,
        "AWS_DATA_PATH": "train/images",
        "MLFLOW_TRACKING_URI": mlflow_server,
        "MODEL_NAME": name,
    }
    return name, client, variables


def plan_of(folder, *arguments, **variables):
    """The plan as `{step: (state, why)}`."""
    result = run_pipeline(folder, "plan", "--json", *arguments, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return {step["step"]: (step["state"], step["reason"]) for step in json.loads(result.stdout)["steps"]}


TIMES = re.compile(r"  (\w+|the rest) +([\d,.]+) +(?:([\d,.]+) +)?(?:([\d,.]+) +)?(\d+) %$")


def times_of(lines):
    """The rows of the table of times as `{name: (seconds, share)}`."""
    found = [match.groups() for line in lines if (match := TIMES.search(line))]
    return {name: (float(seconds.replace(",", "")), int(share)) for name, seconds, _, _, share in found}


@pytest.fixture
def variables(bucket, s3_endpoint, tmp_path):
    """The variables of a run on six images of two labels; up to the label map it does not import TensorFlow."""
    name, client = bucket
    for label in ("anise", "cumin"):
        for number in range(3):
            client.put_object(Bucket=name, Key=f"p/{label}/{number}.png", Body=picture(label, number))
    place = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_DATA_BUCKET": name, "AWS_DATA_PATH": "p"}
    return {**CREDENTIALS, **place, "DATA_DIR": tmp_path / "data", "MODEL_NAME": "spices"}
