"""`python pipeline.py demo` and what it promises."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from conftest import run_pipeline, wait_for

from dgmd_pipeline import manifest
from dgmd_pipeline.demo import picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_pipeline(folder, "demo")


def test_the_demo_registers_a_model_that_knows_its_digits(demo):
    folder, result = demo
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((folder / "demo-data" / "evaluation" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.98
    assert "dgmd_model version 1 is registered, non-production, with a validation accuracy of 9" in result.stdout
    for reason in ("duplicate", "conflict", "unreadable", "truncated", "empty", "no label", "unsafe name"):
        assert reason in result.stdout


def test_it_makes_at_most_three_more_errors_than_a_support_vector_machine_on_the_same_split(demo):
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    folder, _ = demo
    digits = load_digits()
    values, truth = {}, {}
    for side in ("training", "validation"):
        rows = manifest.read(folder / "demo-data" / "split" / f"{side}.csv", manifest.Example)
        named = [original(row.path) for row in rows]
        truth[side] = [digit for digit, _ in named]
        values[side] = [digits.data[np.flatnonzero(digits.target == digit)[number]] for digit, number in named]
    machine = SVC(gamma=0.001).fit(values["training"], truth["training"])
    errors = int((machine.predict(values["validation"]) != truth["validation"]).sum())
    with np.load(folder / "demo-data" / "evaluation" / "predictions.npz") as kept:
        ours = int((kept["probabilities"].argmax(1) != kept["truth"]).sum())
    assert ours <= errors + 3


def original(path):
    """Digit and number of the picture that a demo object shows."""
    label, name = path.split("/")
    return int(label), int(name.split("_")[1].split(".")[0].split(",")[0]) if "_" in name else -1


def test_run_again_with_its_variables_it_does_nothing(demo):
    folder, _ = demo
    code = """
import sys
from dgmd_pipeline.cli import main
assert main(["--env-file", "demo.env"]) == 0
assert not {"tensorflow", "mlflow"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Nothing to do: dgmd_model version 1 is registered." in result.stdout


def test_a_consumer_that_knows_nothing_of_this_package_reads_the_digits(demo):
    from sklearn.datasets import load_digits

    folder, _ = demo
    digits = load_digits()
    rows = manifest.read(folder / "demo-data" / "split" / "validation.csv", manifest.Example)
    chosen = [original(row.path) for row in rows]
    for number, (digit, position) in enumerate(chosen):
        values = digits.images[np.flatnonzero(digits.target == digit)[position]]
        (folder / f"consumer-{digit}-{number}.png").write_bytes(picture(values, 20 + number % 50, "PNG"))
    code = """
import json, pathlib
import mlflow, numpy as np
from PIL import Image
mlflow.set_tracking_uri("sqlite:///demo-data/mlflow/mlflow.db")
model = mlflow.pyfunc.load_model("models:/dgmd_model/1")
run = mlflow.MlflowClient().get_model_version("dgmd_model", "1").run_id
mapping = json.load(open(mlflow.artifacts.download_artifacts(run_id=run, artifact_path="mapping.json")))
right = []
for path in pathlib.Path(".").glob("consumer-*.png"):
    probabilities = model.predict(np.asarray(Image.open(path))[np.newaxis])[0]
    right.append(mapping[str(probabilities.argmax())] == path.name.split("-")[1])
print(sum(right) / len(right))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) >= 0.98


def test_the_next_commands_work_as_printed(demo):
    folder, result = demo
    after = result.stdout.partition("What next?")[2].splitlines()
    server, plan, remove, again = [line.strip() for line in after if line.startswith("  ") and "#" not in line]
    page = subprocess.Popen(["/bin/sh", "-c", f"exec {server}"], cwd=folder, start_new_session=True)
    try:
        wait_for("http://127.0.0.1:5050/health", page)
        experiments = urllib.request.urlopen(
            "http://127.0.0.1:5050/ajax-api/2.0/mlflow/registered-models/search"
        ).read()
        assert b'"dgmd_model"' in experiments
    finally:
        os.killpg(page.pid, signal.SIGKILL)
        page.wait()
    plan = subprocess.run(plan, shell=True, cwd=folder, check=True, capture_output=True, text=True)
    assert " run " not in plan.stdout
    kept = (folder / "demo-data" / "tfrecord_training").stat().st_ino
    result = subprocess.run(f"{remove} && {again}", shell=True, cwd=folder, check=True, capture_output=True, text=True)
    assert "dgmd_model version 2, non-production" in result.stdout
    assert (folder / "demo-data" / "tfrecord_training").stat().st_ino == kept
