"""Executors, which apply a function to items of work in processes or threads on all cores."""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from dgmd_pipeline.errors import PipelineError, WorkerDied
from dgmd_pipeline.workflow import machine, worker

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNKS_OF_A_WORKER = 2  # lists of items that a worker gets: one in progress, and one that waits


class Executor(Protocol):
    """Does the heavy work of a run: in processes on this machine, or on a cluster."""

    is_cluster: bool
    dashboard: str | None  # address of a page that shows the work

    def connect(self) -> None:
        """Prepare for work before the first step. Raises PipelineError for a problem that would stop a later step."""

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], chunk: int = 1
    ) -> Iterator[Result | WorkerDied]:
        """Yield `function(item)` in the order of the items, or a WorkerDied if the item's process died."""

    def describe(self) -> str:
        """Return the number of workers as text, for the progress of a step; "" without a cluster."""

    def usage(self) -> str:
        """Return a line for the end of the run: how much work the cluster did; "" if no cluster did any work."""

    def close(self) -> None:
        """End the work, even if it is unfinished."""


class ProcessExecutor:
    """Worker processes. They start when there is work, and end with the run.

    This is not a `concurrent.futures.ProcessPoolExecutor`: docs/decisions/0009-processes-and-threads.md says why.
    """

    is_cluster = False
    dashboard: str | None = None

    def __init__(self, processes: int | None = None, memory: int | None = None) -> None:
        """Use at most `processes` processes and `memory` bytes.

        The defaults are the number of cores and the memory that this process may use in its machine or container.

        The workers get half of the memory. The other half is for this process, which may load TensorFlow.
        Each worker needs memory even without an item. The number of workers is limited, so that enough of the workers'
        memory stays free for items: `worker.LARGEST_ITEM`, but at most three quarters of the workers' memory.
        """
        budget = (memory or machine.memory()) // 2
        room = min(worker.LARGEST_ITEM, budget * 3 // 4)
        self._processes = min(processes or machine.cores(), max((budget - room) // worker.OWN_MEMORY, 1))
        self._memory = max(budget - self._processes * worker.OWN_MEMORY, 0)
        self._budget: worker.Budget | None = None
        self._workers: list[_Worker] = []

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], chunk: int = 1
    ) -> Iterator[Result | WorkerDied]:
        """Yield `function(item)` in the order of the items. A worker gets `chunk` items at a time.

        If a worker dies while it works on an item, all workers are started again, and the item is tried a second time.
        During the second attempt, no worker works on any other item, because another item could take the memory that
        this item needs. If the worker of the second attempt dies, too, the item's result is a WorkerDied. If a timer
        for processor time ends a worker, there is no second attempt, and the result of the worker's item is a
        WorkerDied. After a restart of the workers, other items may be processed again.
        Raises what `function` raises, and PipelineError if workers do not start. An executor can have only one open
        iterator at a time.
        """
        source = iter(items)
        window: deque[_Chunk] = deque()
        try:
            while True:
                while len(window) < CHUNKS_OF_A_WORKER * self._processes and (some := list(islice(source, chunk))):
                    window.append(_Chunk(some))
                if not window:
                    return
                self._assign(function, window)
                if window[0].outcomes is None:
                    self._receive(window)
                    continue
                for succeeded, value in window[0].outcomes:
                    if not succeeded:
                        raise value
                    yield value
                window.popleft()
        finally:
            if window:  # the caller has closed the iterator, or an exception was raised
                self.close()

    def connect(self) -> None:
        """Do nothing: processes start when there is work for them."""

    def describe(self) -> str:
        """Return an empty text."""
        return ""

    usage = describe

    def close(self) -> None:
        """Terminate the processes, even if they are working."""
        for each in self._workers:
            each.process.terminate()
        for each in self._workers:
            each.close()
        self._workers = []
        if self._budget:
            self._budget.close()
        self._budget = None

    def _assign(self, function: Callable[..., object], window: "Iterable[_Chunk]") -> None:
        """Send unassigned chunks to workers.

        A chunk whose `is_suspect` is set is sent first. Until its outcome is known, no other chunk is sent.
        """
        suspects = [chunk for chunk in window if chunk.is_suspect and chunk.outcomes is None]
        if any(chunk.is_assigned for chunk in suspects):
            return
        for chunk in suspects[:1] or [chunk for chunk in window if not chunk.is_assigned and chunk.outcomes is None]:
            free = min(self._workers, key=lambda each: len(each.chunks), default=None)
            if (free is None or free.chunks) and len(self._workers) < self._processes:
                free = self._start_worker()
            if free is None or len(free.chunks) >= CHUNKS_OF_A_WORKER:
                return
            free.send(function, chunk)

    def _start_worker(self) -> "_Worker":
        self._budget = self._budget or worker.Budget.of(self._memory)
        self._workers.append(_Worker(self._budget))
        return self._workers[-1]

    def _receive(self, window: "deque[_Chunk]") -> None:
        """Wait for the outcomes of chunks. If a worker has died, handle its death and return."""
        ready = wait([each.connection for each in self._workers])
        for each in [each for each in self._workers if each.connection in ready]:
            if not each.receive():
                each.process.join()
                self._handle_deaths(window)
                return

    def _handle_deaths(self, window: "deque[_Chunk]") -> None:
        """End all workers. In `window`, put each item that a dead worker was working on into a separate chunk."""
        dead = [each for each in self._workers if not each.process.is_alive()]
        positions = [each.receive_rest() for each in dead]
        self.close()
        for each, position in zip(dead, positions, strict=True):
            death = WorkerDied(each.process.exitcode or 0)
            if not each.is_started:
                raise PipelineError(
                    f"A worker process did not start: {death}. Give the pipeline more memory or fewer cores, and run "
                    "it again: finished steps are kept."
                )
            if each.chunks:
                _isolate(window, each.chunks[0], position, death)


@dataclass(eq=False)
class _Chunk:
    """Items that are sent to a worker together, and their outcomes."""

    items: list[Any]
    outcomes: list[tuple[bool, Any]] | None = None  # for each item: whether it succeeded, and its result or exception
    is_assigned: bool = False
    is_suspect: bool = False  # the chunk has one item, and the worker that worked on this item died


def _isolate(window: deque[_Chunk], chunk: _Chunk, position: int, death: WorkerDied) -> None:
    """Split a chunk into three: the items before `position`, the item at `position`, and the items after it.

    The worker died while it worked on the item at `position`.
    """
    suspect = _Chunk(chunk.items[position : position + 1], is_suspect=True)
    if chunk.is_suspect or death.by_timer:
        suspect.outcomes = [(True, death)]
    parts = [_Chunk(chunk.items[:position]), suspect, _Chunk(chunk.items[position + 1 :])]
    index = window.index(chunk)
    window.remove(chunk)
    for part in reversed([part for part in parts if part.items]):
        window.insert(index, part)


class _Worker:
    """A worker process, its connections, and the chunks that it has."""

    def __init__(self, budget: worker.Budget) -> None:
        # Never fork: TensorFlow may be imported by now, and its threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self._progress, far_progress = context.Pipe(duplex=False)
        self.process = context.Process(target=worker.run, args=(far_end, far_progress, budget), daemon=True)
        self.process.start()
        far_end.close()
        far_progress.close()
        self.is_started = False
        self.chunks: deque[_Chunk] = deque()

    def send(self, function: Callable[..., object], chunk: _Chunk) -> None:
        chunk.is_assigned = True
        self.chunks.append(chunk)
        with contextlib.suppress(OSError):  # if the worker has died, `receive` notices it
            self.connection.send((function, chunk.items))

    def receive(self) -> bool:
        """Wait for the outcomes of a chunk. Return False if the process has died."""
        try:
            outcomes = self.connection.recv()
        except (EOFError, OSError):
            return False
        if self.is_started:
            chunk = self.chunks.popleft()
            chunk.outcomes = outcomes
            for _ in outcomes:
                os.read(self._progress.fileno(), 1)
        self.is_started = True
        return True

    def receive_rest(self) -> int:
        """Receive what a dead process has sent. Return the position of the item that it was working on.

        The position counts from 0 in the process's current chunk.
        """
        while self.receive():
            pass
        finished = len(os.read(self._progress.fileno(), 2**16))
        return min(finished, len(self.chunks[0].items) - 1) if self.chunks else 0

    def close(self) -> None:
        """Wait for the end of the process, which has been terminated."""
        self.process.join()
        self.connection.close()
        self._progress.close()
        for chunk in self.chunks:
            chunk.is_assigned = False


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items. Uses a thread per core, for work that releases the GIL."""
    threads = machine.cores()
    source = iter(items)
    with ThreadPoolExecutor(threads) as executor:
        waiting = deque(executor.submit(function, item) for item in islice(source, 2 * threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(executor.submit(function, item) for item in islice(source, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def submit_in_background(function: Callable[[], Result]) -> Callable[[], Result]:
    """Start `function` in a thread, and return another function.

    The returned function waits for the end of `function`, and returns its result or raises its exception.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is used
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result
