"""A Dask scheduler with up to 1,000 simulated workers and empty pieces: how many pieces a second it can do.

The scheduler, its connections and the run are real. Workers are real, too (`distributed.Worker`), but hundreds of them
share a process, and they return an empty result at once instead of giving a piece to another process. A piece
contains as many bytes as one of `convert` (256 images).

The simulated workers need more CPU time than the scheduler, so the measured pieces per second are too low. The result
is the CPU time of the scheduler and of the run for a piece. Its inverse is the number of pieces per second on one core.

Needs the extra `cluster`. Writes no claim: docs/scaling.md has the figures.

    python -m benchmarks.simulated_scheduler [--pieces 4000] [--bytes 67000] [--processes 4] [--least 10] [--most 1000]
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure

COUNTS = (10, 100, 1_000)
IDLE = 20.0  # seconds in which the scheduler only receives the workers' heartbeats
# Turns off unused features that take CPU time, and timeouts, because the machine may stop for minutes.
QUIET = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__GIL__ENABLED": "False",
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1 day",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "600s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "3600s",
}
# Turns off two periodic calls of each worker, 50 and 2 a second.
QUIET_WORKERS = {
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1h",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "1h",
}


def main() -> None:
    options = measure.arguments(__doc__, pieces=4_000, bytes=67_000, processes=4, least=10, most=1_000)
    os.environ.update(QUIET)
    print("| workers | pieces/s here | scheduler, ms | run, ms | scheduler alone, pieces/s | idle | memory | checks |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in COUNTS:
        if options.least <= count <= options.most:
            print(row(count, max(options.pieces, 4 * count), options.bytes, options.processes), flush=True)


def row(count: int, pieces: int, size: int, processes: int) -> str:
    """Measure with `count` workers, and return a row of the table."""
    import psutil

    with measure.folder() as folder, scheduler(Path(folder)) as (address, pid), workers(address, count, processes):
        process = psutil.Process(pid)
        with executor(address, Path(folder), count) as (map_pieces, seconds_of_checks):
            for _ in map_pieces(empty, [bytes(size)] * count):  # opens connections
                pass
            idle = cpu(process)
            time.sleep(IDLE)
            idle = (cpu(process) - idle) / IDLE
            start, before, own = time.perf_counter(), cpu(process), time.process_time()
            done = sum(1 for _ in map_pieces(empty, (os.urandom(size) for _ in range(pieces))))
            seconds, scheduler_cpu, own = time.perf_counter() - start, cpu(process) - before, time.process_time() - own
            assert done == pieces
            memory = process.memory_info().rss
    of_a_piece = scheduler_cpu / pieces
    return (
        f"| {count:,} | {pieces / seconds:,.0f} | {1000 * of_a_piece:.2f} | {1000 * own / pieces:.2f} | "
        f"{1 / of_a_piece:,.0f} | {100 * idle:.1f} % | {memory / 2**20:,.0f} MiB | {seconds_of_checks:.0f} s |"
    )


def empty(_: bytes) -> None:
    """Do nothing."""


def cpu(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def executor(address: str, folder: Path, count: int) -> Iterator[tuple[Callable[..., Iterable[Any]], float]]:
    """Connect as a run does, and provide its map function and the seconds for connecting and checking."""
    from distributed import Client

    from dgmd_pipeline.workflow import cluster, lock

    cluster.CHECK_TIMEOUT = 1800  # all workers answer from a few processes
    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=1800)
    used = cluster.ClusterExecutor(address, folder.resolve(), os.getpid)
    with lock.hold(folder), contextlib.closing(used):
        start = time.perf_counter()
        used.connect()
        yield used.map, time.perf_counter() - start


@contextlib.contextmanager
def scheduler(folder: Path) -> Iterator[tuple[str, int]]:
    """Run a scheduler, and provide its address and its process."""
    file = folder / "scheduler.json"
    place = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file)]
    with started(["dask", "scheduler", *place], folder / "scheduler.log") as process:
        address = ""
        while not address:
            time.sleep(0.1)
            assert process.poll() is None, (folder / "scheduler.log").read_text()
            with contextlib.suppress(OSError, ValueError):
                address = json.loads(file.read_text())["address"]
        yield address, process.pid


@contextlib.contextmanager
def workers(address: str, count: int, processes: int) -> Iterator[None]:
    """Run `count` simulated workers in a few processes."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(measure.folder())
        processes = min(processes, count)
        for number in range(processes):
            some = count // processes + (number < count % processes)
            words = ["benchmarks.simulated_scheduler", "workers", address, str(some), str(folder)]
            stack.enter_context(started(words, Path(folder, f"{number}.log"), **QUIET_WORKERS))
        yield


@contextlib.contextmanager
def started(words: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **variables}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=measure.ROOT, stdout=file, stderr=file, env=environment
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class InPlace:
    """Does what a worker's process does, without a process."""

    def map(self, function: Callable[[bytes], None], items: Iterable[bytes], _: int) -> list[None]:
        return [function(each) for each in items]


async def simulate(address: str, count: int, folder: str) -> None:
    """Run `count` workers until the process is killed."""
    from distributed import Worker

    from dgmd_pipeline.workflow import cluster_worker

    in_place = InPlace()
    cluster_worker._pool = lambda _, __: in_place  # type: ignore[assignment,return-value]
    make = partial(Worker, address, nthreads=1, memory_limit=0, local_directory=folder, dashboard=False)
    running = []
    for _ in range(count):
        running.append(await make())
    await asyncio.gather(*(worker.finished() for worker in running))


if __name__ == "__main__":
    if sys.argv[1:2] == ["workers"]:
        asyncio.run(simulate(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
    else:
        main()
