"""The code that Dask calls in a worker: a check that the worker fits the run, and the work on pieces."""

import functools
import hashlib
import importlib.metadata
import multiprocessing
import pickle
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.workflow import lock
from dgmd_pipeline.workflow.executors import ProcessExecutor

PACKAGE = Path(__file__).parent.parent
COMPARED = ("dask", "distributed", "tensorflow", "tensorflow-cpu", "numpy", "pillow", "dgmd_pipeline")
ANSWER = ".cluster-"  # a worker that checks itself creates a file in DATA_DIR; the file's name begins with this prefix
OWN_MEMORY = 150_000_000  # bytes that a Dask worker uses before its first piece

DaskWorker = Any  # distributed.Worker; only `workflow.cluster` imports Dask
# Job.id -> the executor that does the job's pieces. There is at most one entry, because a worker has one job at a time.
_pools: dict[str, ProcessExecutor] = {}


class Job(NamedTuple):
    """What a worker needs to know about the run that sends it pieces. A Job contains no secret."""

    id: str
    data_dir: Path
    holder: str  # text that names the process with the lock of DATA_DIR
    versions: dict[str, str]
    prepare: Callable[[], None]  # called before the first piece

    def answer(self, worker: str) -> Path:
        """Return the path of the file that `worker` creates in DATA_DIR when it checks itself."""
        return self.data_dir / f"{ANSWER}{self.id}-{hashlib.sha256(worker.encode()).hexdigest()[:16]}"


@functools.cache  # a change of the code's files has no effect on a worker that has loaded the code
def versions() -> dict[str, str]:
    """Return the versions that have to be the same in the run and in all workers, and a hash of this package's code."""
    found = {"Python": platform.python_version()}
    for name in COMPARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "(missing)"
    code = hashlib.sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".jinja")):
        code.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return {**found, "code of dgmd_pipeline": code.hexdigest()[:12]}


def holder(data_dir: Path) -> str:
    """Return which process holds the lock of DATA_DIR, and since when. Raises OSError."""
    return (data_dir / lock.LOCK).read_text("utf-8").partition("\n")[0]


def check(content: bytes, dask_worker: DaskWorker) -> str | None:
    """Return why this worker cannot do pieces of a job, or None if it can.

    The text continues a sentence that begins with the name of the worker. `content` is the pickled Job. The worker
    creates the file `job.answer` in DATA_DIR. The run looks for this file, to make sure that it
    sees the same disk as the worker.
    """
    job: Job = pickle.loads(content)
    here = versions()
    if different := [name for name in here if here[name] != job.versions[name]]:
        found, expected = (", ".join(f"{name} {each[name]}" for name in different) for each in (here, job.versions))
        return f"has {found}, and the run has {expected}. Start the worker with the image of the run."
    if dask_worker.state.nthreads != 1:
        return f"has {dask_worker.state.nthreads} threads. Start it with `--nthreads 1`, and start more workers."
    try:
        seen = holder(job.data_dir)
        job.answer(dask_worker.address).touch()
    except OSError as error:
        return f"cannot use DATA_DIR: {error}. Give the worker the disk of the run at the same path, writable."
    if seen != job.holder:
        return (
            f"sees another folder at {job.data_dir} than the run. Give the run and all workers the same disk at this "
            "path."
        )
    return None


def do_piece(job: bytes, content: bytes, dask_worker: DaskWorker) -> bytes:
    """Do a piece, and return its pickled outcome.

    The outcome is a tuple: whether the piece succeeded, its results or the exception, and the seconds that it took.
    `job` is the pickled Job. `content` is a pickled tuple: the function, and the list of items.
    """
    start = time.monotonic()
    try:
        pool = _pool(job, dask_worker)
        function, items = pickle.loads(content)
        return pickle.dumps((True, list(pool.map(function, items, len(items))), time.monotonic() - start))
    except Exception as error:  # noqa: BLE001 - raised in the run
        return pickle.dumps((False, error, time.monotonic() - start))


def _pool(content: bytes, dask_worker: DaskWorker) -> ProcessExecutor:
    job: Job = pickle.loads(content)
    if job.id not in _pools:
        end()
        if problem := check(content, dask_worker):  # the worker may have joined after the run's check
            raise PipelineError(f"The Dask worker {dask_worker.address} {problem}")
        job.answer(dask_worker.address).unlink(missing_ok=True)
        job.prepare()
        # A Dask worker is marked as a daemon process. Python forbids such a process to start others, so the mark is
        # removed. The process of the executor ends with the worker anyway.
        multiprocessing.current_process().daemon = False
        limit = dask_worker.memory_manager.memory_limit
        # A ProcessExecutor uses half of the given memory, and leaves the rest for TensorFlow. A Dask worker does not
        # load TensorFlow, so the executor is given twice the memory that it may use.
        _pools[job.id] = ProcessExecutor(1, 2 * max(limit - OWN_MEMORY, 0) if limit else None)
    return _pools[job.id]


def end(_: str = "") -> None:
    """End the process that does the pieces of the last run."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()
