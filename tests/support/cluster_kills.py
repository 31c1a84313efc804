"""Kills workers of a Dask cluster and the run at random moments. Run by hand:

    PYTHONPATH=.:tests python tests/support/cluster_kills.py [kills [seed]]

It checks that a successful run leaves the same folders as a local run that was not killed.
"""

import contextlib
import difflib
import json
import logging
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import psutil
from conftest import CREDENTIALS, picture, run_pipeline
from moto.server import ThreadedMotoServer

from support.dask_cluster import cluster, contents

SETTINGS = {"BACKBONE": "cnn", "IMAGE_WIDTH": 32, "IMAGE_HEIGHT": 32, "NUM_SHARDS": 8}


def fill(endpoint):
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    client.create_bucket(Bucket="kills")
    for number in range(900):
        label = ("allspice", "black pepper", "cloves")[number % 3]
        client.put_object(Bucket="kills", Key=f"p/{label}/{number}.png", Body=picture(label, number, 64))


def difference(name, found, expected):
    """Return how a file differs from the file of the local run."""
    if found is None or expected is None:
        return f"{name}: {'missing' if found is None else 'not expected'}"
    if isinstance(found, dict):
        found, expected = (json.dumps(each, indent=1, sort_keys=True).encode() for each in (found, expected))
    lines = (each.decode("utf-8", "replace").splitlines() for each in (expected, found))
    changes = [line for line in difflib.unified_diff(*lines, lineterm="", n=0) if line[:2] not in ("--", "++", "@@")]
    return f"{name}: {len(expected)} bytes expected, {len(found)} found\n" + "\n".join(changes[:20])


def main(kills=50, seed=None):
    seed = secrets.randbits(32) if seed is None else int(seed)
    print(f"seed {seed}", flush=True)
    chance, done, runs, workers = random.Random(seed), 0, 0, 0
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    fill(f"http://{host}:{port}")
    place = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DATA_BUCKET": "kills", "AWS_DATA_PATH": "p"}
    with tempfile.TemporaryDirectory() as scratch, cluster(Path(scratch)) as running:
        folder = Path(scratch)
        variables = {**SETTINGS, **CREDENTIALS, **place}
        begun = time.monotonic()
        local = run_pipeline(folder, "run", "--until", "convert", **variables, DATA_DIR=folder / "local")
        assert local.returncode == 0, local.stdout
        seconds, expected = time.monotonic() - begun, contents(folder / "local")
        number = 0
        while done < int(kills):
            number += 1
            variables |= {"DATA_DIR": folder / f"{number}", "DASK_SCHEDULER_ADDRESS": running.address}
            outputs = []
            while True:
                runs += 1
                run = run_pipeline(folder, "run", "--until", "convert", start=True, **variables)
                while run.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        run.wait(chance.uniform(0, seconds / 2))
                    victims = running.worker_processes()
                    if run.poll() is None and done < int(kills):
                        done += 1
                        kills_run = chance.random() < 0.3 or not victims
                        workers += not kills_run
                        with contextlib.suppress(psutil.NoSuchProcess):
                            run.kill() if kills_run else chance.choice(victims).kill()
                output = run.communicate()[0]
                outputs.append(output)
                last = output.strip().split("\n")[-1]
                print(f"{number}: {done} kills, {run.returncode}, {last}", flush=True)
                if run.returncode == 0:
                    break
                assert run.returncode == -signal.SIGKILL or (run.returncode == 30 and "were lost" in output), output
            found = contents(folder / f"{number}")
            names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            differences = [difference(name, found.get(name), expected.get(name)) for name in names]
            assert not names, "\n".join([*outputs, running.logs(), *differences])
    print(f"{done} kills ({workers} of workers), {runs} runs, {number} times the same folders; seed {seed}")
    server.stop()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
