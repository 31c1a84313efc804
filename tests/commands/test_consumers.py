"""The code of README.md, docs/moving.md and docs/for-ml-engineers.md with which a consumer uses a model.

A consumer has MLflow and not this package; only the page for ML engineers uses it.
"""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, environment_with, picture, wait_for
from support.images import encode, exif
from support.pipeline import LABELS
from support.trained_versions import NAME

from dgmd_pipeline.data import decoding

pytest_plugins = ["support.trained_versions"]


def snippets(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


(README,) = snippets("README.md")
LOADING, ASKING, _ = snippets("docs/moving.md")
(SERVING,) = snippets("docs/moving.md", "sh")
NOTEBOOK = next(code for code in snippets("docs/for-ml-engineers.md") if "jar.jpeg" in code)
STAGE, ALIAS = 'f"models:/{NAME}/Production"', 'f"models:/{NAME}@production"'
SCALED = {"0 to 1": np.linspace(0, 1, 48), "-1 to 1": np.linspace(-1, 1, 48)}
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
PIXELS = f"""
import mlflow
import numpy as np
model = mlflow.pyfunc.load_model("models:/{NAME}@production")
network = mlflow.keras.load_model("models:/{NAME}@production")
pixels = np.load("pixels.npy")
assert np.array_equal(model.predict(pixels), network.predict(pixels, verbose=0))
for low in (0, -1):
    for kind in (np.float32, np.float64):
        try:
            print(model.predict(np.linspace(low, 1, 48, dtype=kind).reshape(1, 4, 4, 3)))
        except mlflow.exceptions.MlflowException as error:
            print(error)
print(model.predict(pixels).tolist())
"""


def files():
    """Images of every label as they are stored by scanners, phones, painting programs and cameras: name -> content."""
    for label in LABELS:
        plain = PIL.Image.open(io.BytesIO(picture(label, 7)))
        grey = plain.convert("L")
        transparent = plain.convert("RGBA")
        transparent.putalpha(grey.point(lambda level: 255 if level > 200 else 0))
        yield f"plain {label}.png", encode(plain, "PNG")
        turned = plain.transpose(PIL.Image.Transpose.ROTATE_90)
        yield f"turned {label}.jpeg", encode(turned, "JPEG", quality=95, exif=exif(6))
        yield f"transparent {label}.png", encode(transparent, "PNG")
        yield f"16 bit {label}.png", encode(PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
        yield f"grey {label}.png", encode(grey, "PNG")


@pytest.fixture
def consumer(trained, tmp_path, json_of):
    """A folder with image files, the variables of a consumer, and what `predict` says of them: {file: (label, p)}."""
    for name, content in files():
        (tmp_path / name).write_bytes(content)
    variables = {name: trained.variables[name] for name in ("MODEL_NAME", "MLFLOW_TRACKING_URI")}
    return tmp_path, variables, predicted(json_of, tmp_path, trained.variables)


def predicted(json_of, folder, variables, *options):
    rows = json_of(folder, "predict", *sorted(path.name for path in folder.iterdir()), *options, **variables)
    assert len(rows) == 5 * len(LABELS)
    return {row["file"]: (row["label"], pytest.approx(row["probability"], abs=1e-5)) for row in rows}


def on(names, code):
    """The code of a document for these files instead of one."""
    assert code.count('["jar.jpeg"]') == 1
    return code.replace('["jar.jpeg"]', repr(sorted(names)))


def answers(printed):
    lines = [re.fullmatch(r"(.*\.\w+) (.*) (\S+)", line).groups() for line in printed.splitlines()]
    return {file: (label, float(probability)) for file, label, probability in lines}


def run(*codes, folder, variables):
    ran = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS], input=json.dumps(codes), cwd=folder, env=environment_with(variables),
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_files_are_read_wrongly_without_the_code_of_the_training():
    for name, content in files():
        naive = PIL.Image.open(io.BytesIO(content)).convert("RGB")
        same = np.array_equal(np.asarray(naive), np.asarray(decoding.read_rgb(content)))
        assert same == name.startswith(("plain", "grey")), name


def test_python_code_of_the_documents_agrees_with_predict(consumer):
    folder, variables, expected = consumer
    readme = README.replace('"http://mlflow.example.org:5000"', repr(variables["MLFLOW_TRACKING_URI"]))
    readme = readme.replace('"models:/dgmd_model@production"', f'"models:/{NAME}@production"')
    assert STAGE in LOADING and NAME in readme
    np.save(folder / "pixels.npy", np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), np.uint8))
    codes = [on(expected, code) for code in (readme, LOADING, LOADING.replace(STAGE, ALIAS, 1))]
    *printed, pixels = run(*codes, PIXELS, folder=folder, variables=variables)
    assert [answers(each) for each in printed] == [expected] * 3
    *refusals, accepted = pixels.splitlines()
    for refusal in refusals:
        assert re.search(r"Expected image files .*; found .* float.* to 1\. Do not scale pixels", refusal), refusal
    assert np.array(json.loads(accepted)).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert len(refusals) == 4


def test_code_for_a_notebook_agrees_with_predict(consumer, trained, json_of):
    folder, variables, _ = consumer
    expected = predicted(json_of, folder, trained.variables, "--version", "2")
    (folder / "data").symlink_to(trained.folder / "data")  # of version 2
    code = [sys.executable, "-c", on(expected, NOTEBOOK)]
    environment = environment_with({**variables, "PYTHONPATH": ROOT})
    ran = subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert answers(ran.stdout) == expected


@pytest.fixture
def server(consumer):
    """MLflow's own server of the production version: a function that sends it a request."""
    folder, variables, _ = consumer
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["PORT"] = free.getsockname()[1]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        SERVING, shell=True, cwd=folder, env=environment_with({**variables, **path}), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{variables['PORT']}"

    def ask(body):
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)["predictions"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["message"]

    try:
        wait_for(f"{url}/health", server)
        yield ask
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def test_mlflow_serves_the_production_model_over_http(consumer, server):
    folder, variables, expected = consumer
    (printed,) = run(on(expected, ASKING), folder=folder, variables=variables)
    assert answers(printed) == expected

    name = next(iter(expected))
    text = base64.b64encode((folder / name).read_bytes()).decode()
    status, (probabilities,) = server({"inputs": [text]})
    assert (status, LABELS[int(np.argmax(probabilities))], max(probabilities)) == (200, *expected[name])
    wrapped = base64.encodebytes((folder / name).read_bytes()).decode()  # in lines
    for body in ({"instances": [text]}, {"inputs": wrapped}, {"dataframe_split": {"columns": ["x"], "data": [[text]]}}):
        assert server(body) == (200, [pytest.approx(probabilities, abs=1e-6)])

    pixels = np.asarray(PIL.Image.open(folder / f"plain {LABELS[0]}.png"))
    status, (probabilities,) = server({"inputs": [pixels.tolist()]})
    assert (status, max(probabilities)) == (200, expected[f"plain {LABELS[0]}.png"][1])
    assert server({"instances": [pixels.tolist()]}) == (200, [probabilities])

    for field in ("inputs", "instances"):
        for scale, values in SCALED.items():
            status, message = server({field: values.reshape(1, 4, 4, 3).tolist()})
            assert status == 400
            assert re.fullmatch(
                r"Expected image files .*; found an array of the type float64 and the shape \[1, 4, 4, 3\] with "
                rf"values from {scale}\. Do not scale pixels: the model does it\.",
                message,
            )
    bomb = base64.b64encode(encode(PIL.Image.new("1", (20_000, 20_000)), "PNG")).decode()
    for value, why in (
        (bomb, "DecompressionBombError"),
        ("jar.jpeg", r"a text that is not base64 \(jar\.jpeg\)"),
        (base64.b64encode(b"<html>").decode(), "HTML; expected an image in the format JPEG"),
        (text[:400], "truncated|broken"),
    ):
        status, message = server({"inputs": [text, value]})
        assert status == 400
        assert re.match(rf"Image 2 of 2 cannot be read: .*({why})", message), message
    assert server({"inputs": [text]})[0] == 200
