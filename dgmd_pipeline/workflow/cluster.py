"""An executor that does the work on the workers of a Dask cluster. Only this module imports Dask."""

import asyncio
import functools
import ipaddress
import logging
import pickle
import socket
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dgmd_pipeline.errors import PipelineError, SettingsError, WorkerDied
from dgmd_pipeline.formatting import counted
from dgmd_pipeline.workflow import cluster_worker
from dgmd_pipeline.workflow.cluster_worker import Job

if TYPE_CHECKING:
    import distributed

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
# Maximum number of unfinished pieces for each worker. A piece is a list of items that a worker gets together. The run
# takes the results in the order of the pieces. With several pieces for each worker, the other workers still have work
# while the run waits for the result of a slow piece.
PIECES_OF_A_WORKER = 4
POLL = 2.0  # seconds between checks of the cluster
CHECK_TIMEOUT = 60.0  # seconds that a worker may take to check itself
# Seconds without any worker, after which a run fails. Dask's option distributed.scheduler.no-workers-timeout, if it is
# set, is used instead.
NO_WORKERS_TIMEOUT = 120.0
ANSWER_TIMEOUT = 30.0  # seconds that the scheduler may take to answer
SILENCE = 300.0  # seconds without a result, after which a warning is logged
# A run fails if it loses the connection to the scheduler more than MAX_LOSSES times without any result in the meantime.
# A run also fails if the scheduler does not answer MAX_LOSSES requests in a row.
MAX_LOSSES = 3


@dataclass(eq=False)
class _Piece:
    """Items that a worker gets together."""

    name: str
    verb: str
    content: bytes  # the pickled function and items
    future: "distributed.Future[bytes]"


class ClusterExecutor:
    """Applies a function to items on the workers of a Dask scheduler.

    Each Dask worker does its pieces in a `ProcessExecutor` with one process. If an image crashes this process, only the
    image is lost, and the Dask worker continues. docs/decisions/0033-dask.md explains this design.
    """

    is_cluster = True

    def __init__(self, address: str, data_dir: Path, prepare: Callable[[], None]) -> None:
        """Prepare to use the scheduler at `address`. `connect` or the first `map` connects to it.

        `data_dir` is an absolute path. Each worker calls `prepare` before its first piece.
        """
        self._address, self._data_dir, self._prepare = address, data_dir, prepare
        self._client: distributed.Client | None = None
        self._job = b""
        # Times by `time.monotonic`: when the workers were last counted, when the scheduler last had a worker, and when
        # the last result arrived.
        self._counted = self._had_workers = self._had_result = 0.0
        self._losses = self._unanswered = 0
        self._workers = 0
        self._most_workers = 0
        self._seconds = 0.0  # total time that workers have spent on pieces
        self.dashboard: str | None = None

    def connect(self) -> None:
        """Connect, wait for a worker and check all workers. Raises PipelineError."""
        if self._client:
            return
        try:
            import distributed
        except ImportError:
            raise SettingsError(
                "DASK_SCHEDULER_ADDRESS is set, but Dask is not installed. Install it with "
                "`pip install 'dgmd_pipeline[cluster]'`, or unset the variable to use this machine."
            ) from None
        _configure_logging()
        _warn_of_open_network(self._address)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Dask warns of different versions, which are compared below
                self._client = distributed.Client(self._address, name="dgmd_pipeline", set_as_default=False)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise PipelineError(
                f"The Dask scheduler at {self._address} (DASK_SCHEDULER_ADDRESS) cannot be reached: "
                f"{_first_line(error)}. Start it or correct the address. Or unset the variable to use this machine."
            ) from None
        try:
            self._check_cluster(self._client)
        except BaseException:
            self.close()
            raise
        self.dashboard = self._client.dashboard_link
        log.info("Dask cluster at %s: %s; dashboard: %s", self._address, self.describe(), self.dashboard)

    def _check_cluster(self, client: "distributed.Client") -> None:
        timeout = _no_workers_timeout()
        try:
            client.wait_for_workers(1, timeout)
        except TimeoutError:
            raise PipelineError(_no_workers(self._address, timeout)) from None
        holder = cluster_worker.holder(self._data_dir)
        job = Job(uuid.uuid4().hex, self._data_dir, holder, cluster_worker.versions(), self._prepare)
        self._job = pickle.dumps(job)
        found: Any = client.get_versions()
        here, there = job.versions, found["scheduler"]["packages"]
        if different := [name for name in ("dask", "distributed") if there[name] != here[name]]:
            theirs, ours = (" and ".join(f"{name} {each[name]}" for name in different) for each in (there, here))
            raise PipelineError(
                f"The Dask scheduler at {self._address} has {theirs}, but this run has {ours}. Start the scheduler "
                "with the image of the run."
            )
        try:
            for worker, answer in client.sync(_ask_all, client, self._job).items():
                if answer is None:
                    _check_answer(job, worker)
                elif worker in client.nthreads():  # a worker that is not listed has ended
                    raise PipelineError(f"The Dask worker {worker} {answer}")
        finally:
            for path in self._data_dir.glob(f"{cluster_worker.ANSWER}*"):
                path.unlink(missing_ok=True)
        self._had_workers = time.monotonic()
        self._count_workers()

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], chunk: int = 1
    ) -> Iterator[Result | WorkerDied]:
        """Yield `function(item)` in the order of the items. A piece has `chunk` items.

        If a process dies while it works on an item, another process tries the item again. If that process dies, too,
        the item's result is a WorkerDied.
        If a Dask worker is lost, the scheduler gives its piece to another worker, up to `allowed-failures` times (3 by
        default). If the scheduler is restarted, the run submits all unfinished pieces again. In both cases, the first
        worker may still be working on its piece. So two workers may do the same piece, even at the same time.
        Raises what `function` raises, and PipelineError if the cluster cannot do a piece.
        """
        self.connect()
        source = iter(items)
        window: deque[_Piece] = deque()
        self._had_result = self._had_workers = time.monotonic()
        first = 1
        try:
            while True:
                while len(window) < self._width() and (some := list(islice(source, chunk))):
                    window.append(self._submit(function, some, first))
                    first += len(some)
                if not window:
                    return
                succeeded, value, seconds = pickle.loads(self._wait(window))
                window.popleft()
                self._seconds += seconds
                if not succeeded:
                    raise value
                yield from value
        finally:
            # The caller has closed the iterator, or an exception was raised.
            if window and (client := self._reachable()):
                client.cancel([piece.future for piece in window])

    def describe(self) -> str:
        """Return the number of workers."""
        return counted(self._workers, "worker")

    def usage(self) -> str:
        """Return the seconds that workers spent on pieces, and the largest number of workers."""
        return (
            f"Dask cluster: {self._seconds:,.1f} s of work, {counted(self._most_workers, 'worker')}"
            if self._seconds
            else ""
        )

    def close(self) -> None:
        """Cancel the pieces under way and disconnect. Each Dask worker ends its executor after its current piece."""
        reachable = self._reachable()
        client, self._client = self._client, None
        if client is None:
            return
        import distributed

        try:
            for worker in reachable.nthreads() if reachable else ():
                # The worker runs this task after its current piece.
                ended = client.submit(
                    cluster_worker.end, worker, workers=[worker], allow_other_workers=True, pure=False
                )
                distributed.fire_and_forget(ended)
        except OSError:  # the scheduler has ended, and its workers end with it
            log.debug("The Dask scheduler ended before the run")
        client.close(timeout=5)

    def _reachable(self) -> "distributed.Client | None":
        """Return the client, or None if the scheduler does not answer.

        If the scheduler does not answer, most calls to it never return.
        """
        is_running = self._client is not None and self._client.status == "running"
        return self._client if is_running and not self._unanswered else None

    def _width(self) -> int:
        if time.monotonic() - self._counted > POLL:
            self._count_workers()
        return PIECES_OF_A_WORKER * max(self._workers, 1)

    def _count_workers(self) -> None:
        """Count the workers.

        Raises PipelineError if there has been no worker for too long, or if the scheduler does not answer MAX_LOSSES
        requests in a row.
        """
        assert self._client is not None  # noqa: S101
        self._counted = now = time.monotonic()
        try:
            # Without a timeout, this call would never return if the network drops all packets.
            found: Any = self._client.sync(self._client.nthreads, callback_timeout=ANSWER_TIMEOUT)
        except TimeoutError:
            self._unanswered += 1
            if self._unanswered == MAX_LOSSES:
                raise PipelineError(self._lost()) from None
            return
        except OSError:  # the connection is lost; `_reconnect` waits for a new one
            return
        self._workers, self._unanswered = len(found), 0
        self._most_workers = max(self._workers, self._most_workers)
        if self._workers:
            self._had_workers = now
        elif now - self._had_workers > (timeout := _no_workers_timeout()):
            raise PipelineError(_no_workers(self._address, timeout))

    def _submit(self, function: Callable[..., object], items: list[Any], first: int) -> _Piece:
        inner = function.func if isinstance(function, functools.partial) else function
        verb = getattr(inner, "__name__", "work").strip("_")
        content = pickle.dumps((function, items))
        numbers = f"item {first:,}" if len(items) == 1 else f"items {first:,} to {first + len(items) - 1:,}"
        return _Piece(f"{numbers} of {verb}", verb, content, self._start(verb, content))

    def _start(self, verb: str, content: bytes) -> "distributed.Future[bytes]":
        assert self._client is not None  # noqa: S101
        # `content` is pickled. If Dask got the list of items instead, it would search each item for futures.
        return self._client.submit(_do_piece, self._job, content, key=f"{verb}-{uuid.uuid4().hex}", pure=False)

    def _wait(self, window: Iterable[_Piece]) -> bytes:
        """Wait for the first piece in `window`, and return its pickled outcome."""
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        piece = next(iter(window))
        while True:
            try:
                outcome = piece.future.result(timeout=POLL)
            except TimeoutError:
                self._count_workers()
                self._report_silence(piece)
            except FutureCancelledError:
                self._reconnect()
                for each in window:
                    if each.future.cancelled():
                        each.future = self._start(each.verb, each.content)
            except KilledWorker as error:
                raise PipelineError(
                    f"Dask workers were lost {error.allowed_failures + 1} times while they worked on {piece.name}. The "
                    f"last one was {error.last_worker.address}. Its log may say why, for example too little memory. "
                    "Finished steps are kept: run again."
                ) from None
            except Exception as error:
                raise PipelineError(
                    f"A Dask worker could not start {piece.name} ({type(error).__name__}: {_first_line(error)}). "
                    "Start all workers with the image of the run."
                ) from error
            else:
                self._had_result, self._losses = time.monotonic(), 0
                return outcome

    def _report_silence(self, piece: _Piece) -> None:
        if time.monotonic() - self._had_result > SILENCE:
            self._had_result = time.monotonic()
            text = "No piece has ended for %.0f s. The run waits for %s on %s; dashboard: %s"
            log.warning(text, SILENCE, piece.name, self.describe(), self.dashboard)

    def _reconnect(self) -> None:
        """Wait while Dask's client reconnects. Dask's option `distributed.comm.timeouts.connect` limits the time."""
        assert self._client is not None  # noqa: S101
        while self._client.status == "connecting":
            time.sleep(0.1)
        self._losses += 1
        if self._client.status != "running" or self._losses > MAX_LOSSES:
            raise PipelineError(self._lost())
        log.warning("The Dask scheduler was restarted or could not be reached. The pieces under way are started again.")
        self._had_workers = time.monotonic()

    def _lost(self) -> str:
        return (
            f"The connection to the Dask scheduler at {self._address} is lost. Check the scheduler and the network, "
            "and run again: finished steps are kept."
        )


def _configure_logging() -> None:
    """With --verbose, write the messages of Dask's client to the log of the run. Otherwise, drop these messages."""
    verbose = log.isEnabledFor(logging.DEBUG)
    for name in ("distributed", "distributed.client", "distributed.gc", "bokeh", "tornado", "tornado.application"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.INFO if verbose else logging.CRITICAL + 1)


def _warn_of_open_network(address: str) -> None:
    """Warn if the address has no TLS and is neither on this machine nor in a private network."""
    parts = urlsplit(address)
    if parts.scheme in ("tls", "wss") or not parts.hostname:
        return
    try:
        found = {ipaddress.ip_address(entry[4][0]) for entry in socket.getaddrinfo(parts.hostname, None)}
    except OSError:  # the later attempt to connect reports the error
        return
    if not all(each.is_private or each.is_loopback for each in found):
        log.warning(
            "DASK_SCHEDULER_ADDRESS=%s has no TLS and is not in a private network: anyone who can reach the scheduler "
            "or read the traffic can run code on every worker. Use tls://",
            address,
        )


def _no_workers_timeout() -> float:
    import dask.config
    from dask.utils import parse_timedelta

    given = dask.config.get("distributed.scheduler.no-workers-timeout", None)
    return float(parse_timedelta(given)) if given is not None else NO_WORKERS_TIMEOUT


def _no_workers(address: str, timeout: float) -> str:
    return (
        f"The Dask scheduler at {address} has had no worker for {timeout:g} s. Start workers with `dask worker "
        f"{address} --nthreads 1`, and run again: finished steps are kept."
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


async def _ask_all(client: "distributed.Client", job: bytes) -> dict[str, str | None]:
    """Ask each worker to check itself. Return a dictionary: address of a worker -> why it cannot be used.

    The value is None for a worker that can be used.
    """

    async def ask(worker: str) -> str | None:
        try:
            asked = client.run(cluster_worker.check, job, workers=[worker], on_error="return")
            answer = (await asyncio.wait_for(asked, CHECK_TIMEOUT)).get(worker)
        except TimeoutError:
            return (
                f"has not answered for {CHECK_TIMEOUT:g} s. Perhaps the disk of DATA_DIR hangs. Restart or remove the "
                "worker."
            )
        if isinstance(answer, Exception):
            return f"cannot run this pipeline ({_first_line(answer)}). Start the worker with the image of the run."
        return answer

    workers = list(await client.nthreads())
    return dict(zip(workers, await asyncio.gather(*map(ask, workers)), strict=True))


def _check_answer(job: Job, worker: str) -> None:
    path = job.answer(worker)
    for _ in range(50):  # a network disk may show a new file late
        if path.exists():
            return
        time.sleep(0.1)
    raise PipelineError(
        f"The Dask worker {worker} wrote {path}, but this process does not see that file. Give the run and all "
        "workers the same disk at this path."
    )


def _do_piece(job: bytes, content: bytes) -> bytes:
    """Do a piece. Dask calls this function in a worker."""
    import distributed

    return cluster_worker.do_piece(job, content, distributed.get_worker())
