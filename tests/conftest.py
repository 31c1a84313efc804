"""Real parts in tiny sizes: a real S3 endpoint in a thread, a real MLflow server process, the real command."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import hypothesis
import numpy as np
import pytest
from PIL import Image
from support.http_server import send, serve

from dgmd_pipeline.settings import Settings, load, variable

pytest.register_assert_rewrite("support")
hypothesis.settings.register_profile("here", deadline=None)  # how long a test takes is not what it tests
hypothesis.settings.load_profile("here")
pytest_plugins = ["support.pipeline", "support.s3"]
ROOT = Path(__file__).parent.parent
COMMAND = f"'{sys.executable}' '{ROOT / 'pipeline.py'}'"  # for a shell
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(autouse=True, scope="session")
def _clean_environment(tmp_path_factory):
    """No test sees the settings, credentials or caches of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AWS_", "MLFLOW_")) or name in map(variable, Settings.model_fields):
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.chdir(tmp_path_factory.mktemp("empty"))
        load()  # the quiet defaults for libraries
        yield


@pytest.fixture(autouse=True)
def _own_folder_and_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@contextlib.contextmanager
def process_restored():
    """Undo what `cli.main` sets up in the process that calls it."""
    handlers, hook, errors = logging.getLogger().handlers[:], sys.excepthook, logging.raiseExceptions
    yield
    logging.getLogger().handlers[:], sys.excepthook, logging.raiseExceptions = handlers, hook, errors


@pytest.fixture
def _own_process():
    with process_restored():
        yield


def picture(label: str, number: int, side: int = 24) -> bytes:
    """A PNG of noise with a bright bar whose place tells the label: learnable, and no two are alike."""
    random = np.random.default_rng([number, *label.encode()])
    pixels = random.integers(0, 160, (side, side, 3), dtype=np.uint8)
    place = sum(label.encode()) % 4 * side // 4
    pixels[:, place : place + side // 4] = 250
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def s3_endpoint():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint, request):
    """An empty bucket: its name and a client to fill it with."""
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="tester", aws_secret_access_key="x", region_name="us-east-1"
    )
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**12}"
    client.create_bucket(Bucket=name)
    return name, client


def wait_for(url: str, process: subprocess.Popen, tries: int = 1200) -> None:
    for _ in range(tries):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    raise AssertionError(f"nobody answers at {url}")


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    from support.mlflow_server import served

    with served(tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


def environment_with(variables: dict[str, object]) -> dict[str, str]:
    """The environment of a process that is to see these variables too."""
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def run_pipeline(folder: Path, *arguments: str, start: bool = False, **variables: object):
    """The real command in a process of its own, in `folder`; `start` gives the process without waiting for it."""
    environment = environment_with(variables)
    command = [sys.executable, str(ROOT / "pipeline.py"), *arguments]
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["errors"] = "surrogateescape"
    if start:
        return subprocess.Popen(command, **{**options, "stderr": subprocess.STDOUT})
    return subprocess.run(command, check=False, timeout=300, **options)


def run_in_own_mounts(folder: Path, script: str, *arguments: object, **variables: object):
    """Run a shell script that may mount what it likes; it exits with 77 where it cannot, and the test is skipped."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, arguments)]
    options = {"cwd": folder, "env": environment_with(variables), "capture_output": True, "text": True}
    try:
        result = subprocess.run(command, check=False, timeout=300, **options)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if result.returncode == 77 or result.stderr.startswith("unshare: "):
        pytest.skip(f"no disk of one's own can be mounted here: {result.stderr}")
    return result


@contextlib.contextmanager
def listening():
    """A server that keeps what is posted to it: its URL and the bodies."""
    bodies = []

    def answer(request):
        if request.command != "POST":
            send(request, 501)
            return
        bodies.append(json.loads(request.rfile.read(int(request.headers["Content-Length"]))))
        send(request, {"/broken": 500, "/moved": 302}.get(request.path, 204), Location="/elsewhere")

    with serve(answer) as url:
        yield url, bodies


@pytest.fixture
def listener():
    with listening() as found:
        yield found
