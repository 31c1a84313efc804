"""A real MLflow server for tests, and the requests that are sent to it."""

import contextlib
import http.client
import http.server
import os
import re
import socket
import struct
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mlflow
from conftest import environment_with, wait_for

from support.http_server import send, serve


@contextlib.contextmanager
def served(folder, **variables):
    """Serve the SQLite store in a folder with an MLflow server, started as in its image, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "server", "--port", str(port), "--workers", "1", f"--artifacts-destination={folder}/artifacts"]
    command = [sys.executable, "-m", "dgmd_pipeline.registry.login", *command]
    of_the_image = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise six more processes start, for GenAI jobs
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (folder / "log").open("wb") as log:
        environment = environment_with({**of_the_image, **variables})
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 9)
        server.wait()


@contextlib.contextmanager
def registered_model_requests():
    """Collect the requests for a registered model that this process sends to MLflow servers.

    Before each change, MLflow's client itself asks whether the name is the name of a prompt. These requests are left
    out.
    """
    sent = []
    put_request = http.client.HTTPConnection.putrequest

    def record(self, method, url, *arguments, **options):
        if "/mlflow/registered-models/get" in url:
            sent.append(f"{method} {url}")
        return put_request(self, method, url, *arguments, **options)

    with (
        mock.patch.object(http.client.HTTPConnection, "putrequest", record),
        mock.patch.object(mlflow.MlflowClient, "_raise_if_prompt", lambda *_: None),
    ):
        yield sent


class FaultyProxy:
    """What a proxy in front of an MLflow server has seen, and the fault that it causes."""

    def __init__(self, server: str) -> None:
        self.server = urllib.parse.urlsplit(server).netloc
        self.url = ""
        self.seen: list[str] = []  # endpoints, in the order of their first requests
        self.fault: Fault | None = None
        self.times = 0  # how often the fault still occurs

    @contextlib.contextmanager
    def failing(self, fault: "Fault", times: int) -> Iterator[None]:
        """Let the next requests to an endpoint fail."""
        self.fault, self.times = fault, times
        yield
        self.fault = None

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = endpoint(request.command, request.path)
        self.seen += [] if name in self.seen else [name]
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.fault if self.fault and self.fault.endpoint == name and self.times else None
        self.times -= fault is not None
        if fault is None or fault.acted:
            connection = http.client.HTTPConnection(self.server, timeout=60)
            connection.request(request.command, request.path, body, dict(request.headers))
            answered = connection.getresponse()
            content = answered.read()
            connection.close()
        if fault is None:
            send(request, answered.status, content, Content_Type=answered.headers["Content-Type"])
        elif fault.status:
            send(request, fault.status, b"<html>Bad Gateway</html>", Content_Type="text/html")
        else:  # a reset
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close_connection = True
            request.connection.close()


class Fault(NamedTuple):
    """A request that fails."""

    endpoint: str
    acted: bool  # the server has acted, only its answer is lost
    status: int = 0  # of the answer; 0: the connection is reset


def endpoint(method: str, path: str) -> str:
    """Return a request's method and path, with * for what differs between registrations."""
    path = re.sub(r"^/api/\d\.\d/(mlflow/)?", "", urllib.parse.urlsplit(path).path)
    path = re.sub(r"/code/.*", "/code/*", path)  # the modules that are served with the model
    return f"{method} {re.sub(r'(?<=/)(m-)?[0-9a-f]{32}(?=/|$)|(?<=artifacts/)[0-9]+(?=/)', '*', path)}"


@contextlib.contextmanager
def faulty_proxy(server: str) -> Iterator[FaultyProxy]:
    """Forward requests to an MLflow server, except those that are to fail."""
    proxy = FaultyProxy(server)
    with serve(proxy.answer) as proxy.url:
        yield proxy
