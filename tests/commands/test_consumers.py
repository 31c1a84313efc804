"""The lines of docs/moving.md, with which a service uses the production model without this package."""

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
from conftest import ROOT, environment_with, wait_for
from support.pipeline import LABELS

pytest_plugins = ["support.trained_versions"]

PAGE = (ROOT / "docs/moving.md").read_text("utf-8")
LOADING, ASKING, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(SERVING,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
STAGE, ALIAS = 'f"models:/{NAME}/Production"', 'f"models:/{NAME}@production"'
SCALING = ('.convert("RGB"))', '.convert("RGB")) / 255')
IN_ONE_PROCESS = """
import contextlib, io, json, sys
results = []
for code in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, {})
        except Exception as error:
            print(error)
    results.append(printed.getvalue())
assert "dgmd_pipeline" not in sys.modules
print(json.dumps(results))
"""


@pytest.fixture
def consumer(trained, json_of):
    """A folder with an image, the variables of a consumer, and what `predict` says of the image."""
    (row,) = json_of(trained.folder, "predict", "jar.jpeg", **trained.variables)
    return trained.folder, {name: trained.variables[name] for name in ("MODEL_NAME", "MLFLOW_TRACKING_URI")}, row


def test_mlflow_alone_loads_the_production_model_and_refuses_scaled_images(consumer):
    folder, variables, expected = consumer
    assert STAGE in LOADING and SCALING[0] in LOADING
    snippets = [LOADING, LOADING.replace(STAGE, ALIAS, 1), LOADING.replace(*SCALING)]
    ran = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS], input=json.dumps(snippets), cwd=folder, env=environment_with(variables),
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    *predictions, refusal = json.loads(ran.stdout.splitlines()[-1])
    for printed in predictions:
        label, probability = printed.split("\n")[-2].rsplit(" ", 1)
        assert label == expected["label"]
        assert float(probability) == pytest.approx(expected["probability"], abs=1e-5)
    assert "float64 does not match expected dtype uint8" in refusal


def test_mlflow_serves_the_production_model_over_http(consumer):
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
