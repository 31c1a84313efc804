"""Small runs of the whole pipeline for tests."""

import contextlib
import os
import pty
import subprocess
import sys

import mlflow
from conftest import ROOT, environment_with, picture

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
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while more := os.read(ours, 4096):
            shown += more
    os.close(ours)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n").splitlines()
