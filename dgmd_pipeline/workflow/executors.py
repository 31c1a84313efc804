"""Items of work -> their results, computed in processes or threads on all cores."""

import contextlib
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from dgmd_pipeline.errors import PipelineError, WorkerDied
from dgmd_pipeline.workflow import machine, worker

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNKS_OF_A_WORKER = 2  # one that it works on, and one that waits


class ProcessExecutor:
    """Worker processes. They start when there is work for them, and exist until the end of the run.

    docs/decisions/0009-processes-and-threads.md says why this is no `concurrent.futures.ProcessPoolExecutor`.
    """

    def __init__(self, processes: int | None = None, memory: int | None = None) -> None:
        """Use so many processes and bytes of memory at most; by default as many as the machine or container has.

        Half of the memory is for the processes: the other half is for this one, which may load TensorFlow meanwhile.
        """
        budget = (memory or machine.memory()) // 2
        at_most = max(budget // (worker.OWN_MEMORY + worker.MIN_UNIT), 1)
        self._processes = min(processes or machine.cores(), at_most)
        self._memory = max(budget - self._processes * worker.OWN_MEMORY, 0)
        self._budget: worker.Budget | None = None
        self._workers: list[_Worker] = []

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], chunk: int = 1
    ) -> Iterator[Result | WorkerDied]:
        """Yield `function(item)` in the order of the items, which a worker gets in chunks and only when it needs them.

        If a worker ends while it works on an item, all workers are started again. The item is then tried once more,
        while no other is worked on, because it may have had too little memory next to others. If its worker ends
        again, or if it was ended by a timer for processor time, the WorkerDied is the item's result.
        Raises what `function` raises, and PipelineError if workers do not start. Close one iterator before the next.
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
                first = window[0]
                while not first.outcomes and not first.is_done:
                    self._receive()
                    self._assign(function, window)
                while first.outcomes:
                    succeeded, value = first.outcomes.popleft()
                    if not succeeded:
                        raise value
                    yield value
                if first.is_done:
                    window.popleft()
        finally:
            if window:  # the iterator was closed, or something was raised
                self.close()

    def close(self) -> None:
        """Terminate the processes, even if they are working."""
        for each in self._workers:
            each.process.terminate()
        for each in self._workers:
            each.process.join()
            each.connection.close()
            for chunk in each.chunks:
                chunk.is_assigned = False
        self._workers = []
        if self._budget:
            self._budget.close()
        self._budget = None

    def _assign(self, function: Callable[..., object], window: Iterable["_Chunk"]) -> None:
        """Send the chunks that no worker has; after the end of a worker, the item that it worked on first and alone."""
        for chunk in window:
            if chunk.is_suspect and chunk.is_assigned:
                return
        waiting = [chunk for chunk in window if not chunk.is_assigned and not chunk.is_done]
        suspects = [chunk for chunk in waiting if chunk.is_suspect]
        for chunk in suspects or waiting:
            free = min(self._workers, key=lambda each: len(each.chunks), default=None)
            if (free is None or free.chunks) and len(self._workers) < self._processes:
                free = self._start_worker()
            if free is None or len(free.chunks) >= CHUNKS_OF_A_WORKER:
                return
            free.send(function, chunk)
            if chunk.is_suspect:
                return

    def _start_worker(self) -> "_Worker":
        self._budget = self._budget or worker.Budget.of(self._memory)
        self._workers.append(_Worker(self._budget))
        return self._workers[-1]

    def _receive(self) -> None:
        """Wait for outcomes, and store them with their chunks."""
        ready = wait([each.connection for each in self._workers])
        for each in [each for each in self._workers if each.connection in ready]:
            if not each.receive():
                each.process.join()
                self._mourn([each for each in self._workers if not each.process.is_alive()])
                return

    def _mourn(self, dead: "list[_Worker]") -> None:
        """End all workers, and decide about the items that the dead ones worked on."""
        for each in dead:
            while each.receive():  # what it sent before its end
                pass
        self.close()
        for each in dead:
            death = WorkerDied(each.process.exitcode or 0)
            if not each.is_started:
                raise PipelineError(
                    f"A worker process did not start: {death}. Give the pipeline more memory or fewer cores, and run "
                    "it again: finished steps are kept."
                )
            if each.chunks:
                each.chunks[0].lose(death)


class _Chunk:
    """Some items, and the outcomes that have come for them."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items  # without outcome
        self.outcomes: deque[tuple[bool, Any]] = deque()  # whether it succeeded, and the result or the exception
        self.is_assigned = False
        self.is_suspect = False  # the worker of the first item has ended

    @property
    def is_done(self) -> bool:
        return not self.items

    def add(self, outcome: tuple[bool, Any]) -> None:
        del self.items[0]
        self.outcomes.append(outcome)
        self.is_suspect = False

    def lose(self, death: WorkerDied) -> None:
        """Note that the worker of the first item died: the second time and after a timer, this is its outcome."""
        if self.is_suspect or death.by_timer:
            self.add((True, death))
        else:
            self.is_suspect = True


class _Worker:
    """A worker process, its chunks, and how many outcomes it still owes for the first of them."""

    def __init__(self, budget: worker.Budget) -> None:
        # Never fork: TensorFlow may be imported by now, and its threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=worker.run, args=(far_end, budget), daemon=True)
        self.process.start()
        far_end.close()
        self.is_started = False
        self.chunks: deque[_Chunk] = deque()
        self._owed: deque[int] = deque()

    def send(self, function: Callable[..., object], chunk: _Chunk) -> None:
        items = chunk.items[:1] if chunk.is_suspect else chunk.items
        chunk.is_assigned = True
        self.chunks.append(chunk)
        self._owed.append(len(items))
        with contextlib.suppress(OSError):  # if it has ended, `_receive` finds it
            self.connection.send((function, items))

    def receive(self) -> bool:
        """Wait for an outcome, and store it with its chunk. Return False if the process has ended."""
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            return False
        if outcome is None:
            self.is_started = True
            return True
        self.chunks[0].add(outcome)
        self._owed[0] -= 1
        if not self._owed[0]:
            self._owed.popleft()
            self.chunks.popleft().is_assigned = False
        return True


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, with a thread per core, for work that releases the GIL."""
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
    """Start `function` in a thread; return a function that waits for the result and returns (or raises) it."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is used
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result
