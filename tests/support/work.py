"""Functions that workers of a cluster call in tests, and a worker that continues after its run has ended."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


def square(number):
    return number * number


def fail(number):
    raise ValueError(f"not {number}")


def variable(name):
    return os.environ.get(name)


def process_id(_):
    return os.getpid()


def wait_for(path):
    """Write to a file that the work has begun, and wait until `path` exists."""
    with path.with_suffix(".begun").open("a") as file:
        file.write("x")
    while not path.exists():
        time.sleep(0.02)
    return path.name


def die_at(number, bad, folder):
    if number == bad:
        with Path(folder, str(number)).open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def kill_worker_at(number, bad):
    """End the Dask worker, this process's parent."""
    if number == bad:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return number


def allocate(size):
    from dgmd_pipeline.workflow.worker import reserve_memory

    with reserve_memory(size):
        return len(bytearray(size))


def burn(forever):
    """Take processor time in C, as a decoder does."""
    if forever:
        signal.setitimer(signal.ITIMER_PROF, 0.1)
        sum(range(10**10))
    return forever


@contextlib.contextmanager
def keep_writing(folder):
    """Create files in a new folder, one after another, until the folder is removed. At the end, wait for that."""
    folder.mkdir(parents=True)
    script = 'number=0; while : > "$0/$number"; do number=$((number + 1)); /bin/true; done'  # some hundred a second
    process = subprocess.Popen(["sh", "-c", script, folder], stderr=subprocess.DEVNULL)
    while len(list(folder.iterdir())) < 200:
        time.sleep(0.001)
    try:
        yield
        process.wait()
    finally:
        process.kill()
