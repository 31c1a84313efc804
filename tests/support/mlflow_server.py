"""A real MLflow server for tests, and the requests that are sent to it."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
from unittest import mock

import mlflow
from conftest import environment_with, wait_for


@contextlib.contextmanager
def served(folder):
    """Serve the MLflow store in a folder over HTTP, SQLite behind it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store]
    with (folder / "log").open("wb") as log:
        # Otherwise six more processes start, for GenAI jobs.
        environment = environment_with({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 9)
        server.wait()


@contextlib.contextmanager
def registered_model_requests():
    """Collect the requests for a registered model that this process sends to MLflow servers, and send them.

    Without those of MLflow's client itself, which asks before each change whether the name is that of a prompt.
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
