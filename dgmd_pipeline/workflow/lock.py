"""The lock of DATA_DIR. The file of the lock says which run holds the lock, and how far this run is."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import Busy, PipelineError

LOCK = ".lock"  # file in DATA_DIR
SECONDS_BETWEEN_WRITES = 5.0


@contextlib.contextmanager
def hold(data_dir: Path) -> Iterator["Holder"]:
    """Lock `data_dir` for one run, and provide the Holder, which publishes the run's progress.

    The kernel releases the lock when the process ends. If another process holds the lock, raises a Busy that
    names the other process. Raises PipelineError if no file can be created in `data_dir`.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / LOCK).open("a+b", buffering=0)
    except FileNotFoundError:  # for example, in /proc
        raise PipelineError(f"{data_dir}: DATA_DIR must be a folder on a disk: choose another path.") from None
    with file:
        if not _acquire(file):
            raise Busy(f"{data_dir} is in use by another run: {_read_holder(data_dir)}. Wait until it has ended.")
        holder = Holder(data_dir / LOCK)
        holder.tell("", "")
        try:
            yield holder
        finally:
            _write(data_dir / LOCK, "")


class Holder:
    """The run that holds the lock. It writes its process and its progress to the lock's file."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._step, self._since = path, 0.0, "", ""
        self._process = f"process {os.getpid()} on {socket.gethostname()}, started {formatting.utc_now()}"

    def tell(self, step: str, progress: str) -> None:
        """Write the name of the step and its progress to the file.

        Within a step, a call does nothing if the last write was less than SECONDS_BETWEEN_WRITES ago.
        """
        if step != self._step:
            self._step, self._since = step, formatting.utc_now()
        elif time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        self._written = time.monotonic()
        _write(self._path, "\n".join([self._process, step, self._since, progress]))


class Run(NamedTuple):
    """The run that locked a DATA_DIR last."""

    process: str  # for example "process 7 on host"
    started: str  # ISO 8601, UTC
    step: str  # name of the folder that it writes; "" before the first step
    since: str  # when the step began: ISO 8601, UTC
    progress: str  # progress of the step in words; "" if nothing is known
    silent: float  # seconds since it last wrote its progress
    killed: bool  # whether the run has ended without releasing its lock

    def __str__(self) -> str:
        step = f", {self.step} since {self.since}" if self.step else ""
        return f"{self.process}, started {self.started}{step}" + (f" ({self.progress})" if self.progress else "")


def last_run(data_dir: Path) -> Run | None:
    """Return the run that is active, or that was killed; None if the last run has released its lock."""
    try:
        with (data_dir / LOCK).open("rb", buffering=0) as file:
            lines = file.read().decode().split("\n")
            if not lines[0]:
                return None
            silent = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)
            killed = True
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                killed = False
    except FileNotFoundError:
        return None
    process, _, started = lines[0].partition(", started ")
    step, since, progress = (*lines[1:], "", "", "")[:3]
    return Run(process, started, step, since, progress, silent, killed)


def _acquire(file: FileIO) -> bool:
    """Lock the file, and return whether this succeeded.

    Several attempts are made, because `last_run` in another process may hold the lock for a moment.
    """
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


def _write(path: Path, text: str) -> None:
    # Errors do not matter, because the lock does not depend on the text. The text is written before the file is
    # shortened. Otherwise, another process could read an empty file and conclude that no run holds the lock.
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(file, text.encode(), 0)
            os.ftruncate(file, len(text.encode()))
        finally:
            os.close(file)


def _read_holder(data_dir: Path) -> str:
    """Return which run holds the lock. If the file does not name a run yet, wait for a moment."""
    for _ in range(20):
        if run := last_run(data_dir):
            return str(run)
        time.sleep(0.01)
    return "a process that has just started or is about to end"
