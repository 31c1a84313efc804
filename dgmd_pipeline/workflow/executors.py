"""Pieces of work -> their results, computed in processes or threads on all cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar

from dgmd_pipeline.errors import PipelineError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessExecutor:
    """Worker processes. They start with the first piece of work and exist until the end of the run."""

    def __init__(self, processes: int | None = None) -> None:
        self._processes = processes or cores()
        self._executor: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
        """Yield `function(piece)` in the order of the pieces. Pieces are read only when they are needed.

        Raises what `function` raises, and PipelineError if a process was killed.
        """
        if self._executor is None:
            # Never fork: TensorFlow may be imported by now, and its threads do not survive a fork.
            self._executor = ProcessPoolExecutor(
                self._processes, mp_context=multiprocessing.get_context("spawn"), initializer=_initialize_worker
            )
        try:
            yield from _in_order(self._executor, function, pieces, 2 * self._processes)
        except BrokenProcessPool:
            raise PipelineError(
                "A worker process was killed, most likely by the system because memory ran out. "
                "Give the pipeline more memory or fewer cores, and run it again: finished steps are kept."
            ) from None

    def close(self) -> None:
        """Terminate the processes, even if they are working."""
        if self._executor is None:
            return
        for process in list((self._executor._processes or {}).values()):
            process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None


def in_threads(function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """Yield `function(piece)` in the order of the pieces, with a thread per core, for work that releases the GIL."""
    with ThreadPoolExecutor(cores()) as executor:
        yield from _in_order(executor, function, pieces, 2 * cores())


def submit_in_background(function: Callable[[], Result]) -> Callable[[], Result]:
    """Start `function` in a thread; return a function that waits for the result and returns (or raises) it."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is used
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result


def _in_order(
    executor: Executor, function: Callable[[Piece], Result], pieces: Iterable[Piece], at_once: int
) -> Iterator[Result]:
    source = iter(pieces)
    waiting = deque(executor.submit(function, piece) for piece in islice(source, at_once))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(function, piece) for piece in islice(source, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def _initialize_worker() -> None:
    # Ctrl-C sends SIGINT to the whole process group. Workers ignore it: the parent decides when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent has ended; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
