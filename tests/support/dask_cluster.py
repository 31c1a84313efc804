"""A Dask scheduler and workers in separate processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import CREDENTIALS, ROOT, environment_with

MEMORY = 600_000_000  # bytes of a worker
DASK = [sys.executable, "-m", "dask"]
OF_ONE_RUN = ("started", "seconds", "worked", "volume")  # keys of a step's record
QUICK = {  # turns off unused features that take CPU time
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__GIL__ENABLED": "False",
    "OPENBLAS_NUM_THREADS": "1",
}


class Cluster:
    """A running `dask scheduler` and `dask worker` processes, with their logs in a folder."""

    def __init__(self, folder: Path, **variables: object) -> None:
        self._folder = folder
        self._variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **QUICK, **CREDENTIALS, **variables}
        self._port = 0
        self.workers: list[subprocess.Popen] = []
        self._started = 0
        self.start_scheduler()

    def _start(self, *arguments: object, before: list[str] = (), **variables: object) -> subprocess.Popen:
        self._started += 1
        environment = environment_with({**self._variables, **variables})
        with (self._folder / f"{self._started}.log").open("w") as log:
            command = [*before, *DASK, *map(str, arguments)]
            return subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)

    def start_scheduler(self) -> None:
        """Start the scheduler, at the port of an earlier one."""
        file = self._folder / "scheduler.json"
        file.unlink(missing_ok=True)
        place = ("--host", "127.0.0.1", "--port", self._port, "--dashboard-address", "127.0.0.1:0")
        self.scheduler = self._start("scheduler", *place, "--scheduler-file", file)
        while True:
            with contextlib.suppress(OSError, ValueError):
                self.address = json.loads(file.read_text())["address"]
                break
            assert self.scheduler.poll() is None, self.logs()
            time.sleep(0.05)
        self._port = int(self.address.rpartition(":")[2])

    def start_worker(
        self, *options: object, before: list[str] = (), threads: int = 1, address: str = "", **variables
    ) -> subprocess.Popen:
        """Start a worker; `before` is a command that runs it. `address` is another address of the scheduler."""
        common = (
            "--nthreads",
            threads,
            "--memory-limit",
            MEMORY,
            "--no-dashboard",
            "--local-directory",
            self._folder / "scratch",
        )
        worker = self._start("worker", address or self.address, *common, *options, before=before, **variables)
        self.workers.append(worker)
        return worker

    def kill_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()

    def start_again(self) -> None:
        """Start what has ended, as Docker does: workers end with their scheduler."""
        self.start_scheduler()
        for worker in self.workers:
            worker.wait()
        ended, self.workers = self.workers, []
        for _ in ended:
            self.start_worker()

    def worker_processes(self) -> list[psutil.Process]:
        """The processes that are Dask workers: the nannies' children that have connections."""
        found = []
        for nanny in self.workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(nanny.pid).children()
                found += [each for each in children if "spawn_main" in " ".join(each.cmdline())]
        return found

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("*.log")))

    def close(self) -> None:
        for process in [*self.workers, self.scheduler]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                        os.kill(each.pid, signal.SIGKILL)
            process.wait()


def contents(data_dir: Path) -> dict[str, object]:
    """The bytes of all files in step folders; of the records, only the values that are the same in every run."""
    found: dict[str, object] = {}
    for path in sorted(path for path in data_dir.rglob("*") if path.is_file() and path.parent != data_dir):
        content: object = path.read_bytes()
        if path.name == "_SUCCESS":
            record = json.loads(path.read_text("utf-8"))
            content = {name: value for name, value in record.items() if name not in OF_ONE_RUN}
        found[str(path.relative_to(data_dir))] = content
    return found


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 2, **variables: object):
    """Run a scheduler and workers."""
    running = Cluster(folder, **variables)
    try:
        for _ in range(workers):
            running.start_worker()
        yield running
    finally:
        running.close()
