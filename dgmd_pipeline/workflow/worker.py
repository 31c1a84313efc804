"""A worker process: it receives chunks of items, and sends their outcomes back.

All workers of an executor share one budget of memory. Before a worker starts an item that needs memory, it takes a part
of the budget. If too little is free, the worker waits until other workers return their parts.
"""

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from dgmd_pipeline.errors import TooLittleMemory

OWN_MEMORY = 90_000_000  # bytes of a worker before its first image: Python, NumPy, Pillow
LARGEST_ITEM = 1_300_000_000  # bytes that an item may need: the largest accepted image, and its TFRecord
# Maximum number of units that a budget is divided into. A pipe holds one byte for each free unit. Linux may limit each
# pipe of an unprivileged user to one page of memory, which is 4,096 bytes.
MAX_UNITS = 4096
MIN_UNIT = 16_000_000  # minimum bytes of memory in a unit
# Bytes that a worker may allocate in addition to the memory that it has taken from the budget. A worker takes as much
# as an item is expected to use. A process may allocate more memory than it uses, and Linux limits the allocated memory.
SLACK = 64_000_000


@dataclass
class Budget:
    """Memory that the workers share. A pipe holds one byte for each free unit, as in the job server of GNU make.

    If a worker is killed, its units are lost. All workers then end, and the executor creates a new budget. The budget
    is not a semaphore, because a semaphore would need /dev/shm.
    """

    units: int  # number of units, free or taken
    unit: int  # bytes of memory in a unit
    free: tuple[Connection, Connection]  # a pipe with one byte for each free unit
    # A pipe with one byte. A worker keeps the byte while it takes units, so that no other worker can overtake it.
    turn: tuple[Connection, Connection]

    @classmethod
    def of(cls, memory: int) -> "Budget":
        """Return a budget of `memory` bytes, all of them free."""
        unit = max(MIN_UNIT, math.ceil(memory / MAX_UNITS))
        budget = cls(max(memory // unit, 1), unit, *(multiprocessing.Pipe(duplex=False) for _ in range(2)))
        os.write(budget.free[1].fileno(), bytes(budget.units))
        os.write(budget.turn[1].fileno(), b"\0")
        return budget

    @contextlib.contextmanager
    def take(self, needed: int) -> Iterator[int]:
        """Wait for `needed` bytes, and release them after the block. Yield how many bytes were taken.

        Raises TooLittleMemory if the whole budget is smaller than `needed`.
        """
        units = max(math.ceil(needed / self.unit), 1)
        if units > self.units:
            raise TooLittleMemory(
                f"needs {needed / 1e6:,.0f} MB of memory, and the worker processes may use "
                f"{self.units * self.unit / 1e6:,.0f} MB together (half of the memory, minus what idle workers use)"
            )
        taken = 0
        os.read(self.turn[0].fileno(), 1)
        while taken < units:
            taken += len(os.read(self.free[0].fileno(), units - taken))
        os.write(self.turn[1].fileno(), b"\0")
        try:
            yield units * self.unit
        finally:
            os.write(self.free[1].fileno(), bytes(units))

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        for connection in (*self.free, *self.turn):
            connection.close()


_budget: Budget | None = None  # the budget that all workers share; None if this process is not a worker
_statm = 0  # file descriptor of /proc/self/statm; 0 before the file is opened


@contextlib.contextmanager
def reserve_memory(needed: int) -> Iterator[None]:
    """In a worker, wait for `needed` bytes of the budget, and hold them for the block. Elsewhere, do nothing.

    Within the block, `limit_memory` keeps the process from allocating much more than these bytes. Otherwise, the memory
    of the machine could run out, and Linux would kill a process.
    Raises TooLittleMemory if the whole budget is smaller than `needed`.
    """
    if _budget is None:
        yield
        return
    with _budget.take(needed) as taken, limit_memory(taken + SLACK):
        yield


@contextlib.contextmanager
def limit_memory(more: int) -> Iterator[None]:
    """Within the block, limit this process to `more` additional bytes. Larger allocations raise MemoryError."""
    global _statm  # noqa: PLW0603 - opening the file for each image would take longer than the rest of this function
    try:
        _statm = _statm or os.open("/proc/self/statm", os.O_RDONLY)
        pages = int(os.pread(_statm, 200, 0).split()[5])  # private, writable pages. Source: man 5 proc
    except OSError:  # not Linux
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + more
    if before[0] == resource.RLIM_INFINITY or limit < before[0]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def run(connection: Connection, progress: Connection, budget: Budget) -> None:
    """Work on the chunks that arrive over a connection, until the parent ends.

    After each item, write a byte to `progress`. If this process dies, the parent counts these bytes to find the item
    that this process was working on.
    """
    _initialize(budget)
    chunks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, chunks), daemon=True).start()
    connection.send(None)  # started
    while True:
        function, items = chunks.get()
        outcomes: list[tuple[bool, Any]] = []
        for item in items:
            try:
                outcomes.append((True, function(item)))
            except Exception as error:  # noqa: BLE001 - raised where the result is used
                error.add_note("In a worker process:\n" + traceback.format_exc())
                outcomes.append((False, error))
            os.write(progress.fileno(), b"\0")
        try:
            connection.send(outcomes)
        except Exception as error:  # noqa: BLE001 - an outcome cannot be sent
            connection.send([(False, error)])


def _initialize(budget: Budget) -> None:
    global _budget  # noqa: PLW0603 - a worker has one budget
    # Ctrl-C sends SIGINT to the whole process group. Workers ignore it: the parent decides when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A new process ignores the signals that its parent ignores. Workers must not ignore these three.
    for number in (signal.SIGTERM, signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    # Make Linux kill a worker, and not the parent, if memory runs out. The parent continues without the item.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")
    _budget = budget


def _receive(connection: Connection, chunks: "SimpleQueue[Any]") -> None:
    """Receive chunks while the worker is busy, so that the worker and its parent never wait for each other."""
    while True:
        try:
            chunks.put(connection.recv())
        except (EOFError, ConnectionError):
            os._exit(1)  # the parent has ended
        except Exception as error:  # noqa: BLE001 - the function or an item cannot be unpickled here
            chunks.put((_raise, [error]))


def _raise(error: Exception) -> None:
    raise error
