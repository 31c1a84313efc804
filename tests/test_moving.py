"""The lines of docs/moving.md, run as a consumer would run them: with nothing but MLflow's public client."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment_with, picture, run_pipeline, wait_for
from PIL import Image
from test_pipeline import LABELS, TINY

PAGE = (ROOT / "docs/moving.md").read_text("utf-8")
LOADING, ASKING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SERVING,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def consumer(mlflow_server, tmp_path_factory):
    """A folder with a picture in it, the variables of a consumer, and what the promoted model says of the picture."""
    folder = tmp_path_factory.mktemp("consumer")
    for label in LABELS:
        (folder / "data/raw" / label).mkdir(parents=True)
        for number in range(12):
            (folder / f"data/raw/{label}/{number}.png").write_bytes(picture(label, number))
    Image.open(io.BytesIO(picture(LABELS[1], 99, side=40))).save(folder / "jar.jpeg", quality=95)
    variables = {**TINY, "EPOCHS": 6, "MODEL_NAME": "moved", "MLFLOW_TRACKING_URI": mlflow_server}
    assert run_pipeline(folder, **variables).returncode == 0
    assert run_pipeline(folder, "promote", "--yes", **variables).returncode == 0
    predicted = run_pipeline(folder, "predict", "jar.jpeg", "--json", **variables)
    (row,) = json.loads(predicted.stdout)
    return folder, {"MODEL_NAME": "moved", "MLFLOW_TRACKING_URI": mlflow_server}, row


@pytest.mark.parametrize("uri", ['f"models:/{NAME}/Production"', 'f"models:/{NAME}@production"'])
def test_a_consumer_loads_the_production_model_with_mlflow_s_client_alone(consumer, uri):
    folder, variables, expected = consumer
    code = LOADING.replace('f"models:/{NAME}/Production"', uri, 1)
    assert uri in code
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment_with(variables), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    label, probability = ran.stdout.split("\n")[-2].rsplit(" ", 1)
    assert label == expected["label"]
    assert float(probability) == pytest.approx(expected["probability"], abs=1e-5)


def test_pictures_that_were_scaled_are_refused(consumer):
    folder, variables, _ = consumer
    code = LOADING.replace('.convert("RGB"))', '.convert("RGB")) / 255')
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment_with(variables), capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert "float64 does not match expected dtype uint8" in ran.stderr


def test_mlflow_s_own_server_answers_a_picture_with_probabilities(consumer):
    folder, variables, expected = consumer
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**variables, "PORT": port, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        SERVING, shell=True, cwd=folder, env=environment_with(variables), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        ran = subprocess.run(
            [sys.executable, "-c", ASKING], cwd=folder, env=environment_with(variables), capture_output=True, text=True
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert ran.returncode == 0, ran.stderr
    probabilities = np.array(json.loads(ran.stdout))
    assert LABELS[probabilities.argmax()] == expected["label"]
    assert probabilities.max() == pytest.approx(expected["probability"], abs=1e-4)
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
