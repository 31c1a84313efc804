"""Downloads objects of the bucket into raw/."""

import shutil
import socket
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import NamedTuple

from dgmd_pipeline.errors import NoUsableInput, PipelineError, WorkerDied
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import errors, throttling
from dgmd_pipeline.s3.client import Client, Place, connect, place
from dgmd_pipeline.s3.crt import CrtTransfer, PendingTransfer
from dgmd_pipeline.s3.throttling import Gate
from dgmd_pipeline.s3.transfer import BotocoreTransfer, Throttled
from dgmd_pipeline.workflow import disk

# Folder of unfinished files. Each file has a number as its name, so that no name is too long or conflicts with a key.
PARTS = ".part"
PROBE_TIMEOUT = 1.0  # seconds to wait for the first object, which shows if awscrt can be used
POLL_INTERVAL = 0.5  # seconds between two checks for stalled transfers
CHUNK_OBJECTS, CHUNK_BYTES = 500, 200_000_000  # limits of a chunk, which a worker fetches in one call
SHUTDOWN_TIMEOUT = 5.0  # seconds that `close` waits for transfers to end; then it abandons the remaining threads


def download(
    client: Client, bucket: str, objects: Iterable[SourceObject], folder: Path, threads: int = 32
) -> Generator[SourceObject | Rejected]:
    """Write each object to its path in `folder`, and yield the object when its file is complete, in any order.

    Yields a Rejected for an object that cannot be fetched. Its reason is one of these:

    - "gone": the object was deleted
    - "archived": its storage class requires that it is restored first
    - "changed": its size or ETag differs from the listing, or its bytes do not match the MD5 sum or checksum from S3
    - "refused": S3 does not permit reading it
    - "failed": S3 does not send it, or breaks off every transfer

    If a failure may be temporary, makes up to four attempts to fetch the object.

    Fetches up to `threads` objects at a time. Unfinished files are in `folder/.part`, so every other file in `folder`
    is complete, even after a kill. `folder/.part` is removed at the start and at the end. Closing the generator cancels
    the transfers in progress.

    Raises NoUsableInput if S3 does not accept the credentials, does not have the bucket or does not answer at all, and
    OSError for errors of the disk.
    """
    with _parts(folder) as parts:
        yield from _download(client, bucket, objects, folder, parts, threads)


@contextmanager
def _parts(folder: Path) -> Iterator[Path]:
    """Provide a folder for unfinished files. No other run knows its name.

    Workers of a killed run may still be downloading. This function removes their folder, so these workers fail. They
    do not add any more files to `folder`.
    """
    parts = folder / PARTS / uuid.uuid4().hex
    disk.remove(parts.parent)
    parts.mkdir(parents=True)
    try:
        yield parts
    finally:
        disk.remove(parts.parent)


def _download(
    client: Client, bucket: str, objects: Iterable[SourceObject], folder: Path, parts: Path, threads: int = 32
) -> Generator[SourceObject | Rejected]:
    """Do what `download` does, with unfinished files in the folder `parts`."""
    free = [parts / str(number) for number in range(threads)]
    remaining = iter(objects)
    started, stop = monotonic(), Event()
    with throttling.gate(client, stop) as gate:
        downloader = _Downloader(client, bucket, gate, stop)
        try:
            while True:
                limit = threads if downloader.crt.decided or monotonic() > started + PROBE_TIMEOUT else 1
                while threads - len(free) < limit and (source := next(remaining, None)):
                    downloader.start(source, free.pop())
                if len(free) == threads:
                    break
                if completed := downloader.next_completed():
                    free.append(completed.part)
                    if completed.throttled and next(remaining, None):
                        raise completed.throttled
                    yield completed.rejected or _move(completed.source, completed.part, folder)
        finally:
            downloader.close()


class Chunk(NamedTuple):
    """Objects that a worker fetches in one call."""

    place: Place
    bucket: str
    objects: Sequence[SourceObject]
    folder: Path
    parts: Path  # each attempt to download the chunk creates a subfolder in this folder


Map = Callable[
    [Callable[[Chunk], list[SourceObject | Rejected]], Iterable[Chunk]],
    Iterator[list[SourceObject | Rejected] | WorkerDied],
]


def download_in_chunks(
    client: Client, bucket: str, objects: Iterable[SourceObject], folder: Path, map: Map
) -> Generator[SourceObject | Rejected]:
    """Do what `download` does, in chunks of objects, which workers fetch.

    `map` works like the builtin `map`, but calls the function in worker processes, possibly on other machines. It
    yields a WorkerDied for a chunk that it gives up because the worker died. In this case, this function raises
    PipelineError.

    The workers read S3 with the credentials of their own environment.
    """
    with _parts(folder) as parts:
        chunks = (Chunk(place(client), bucket, some, folder, parts) for some in _chunks(objects))
        for done in map(download_chunk, chunks):
            if isinstance(done, WorkerDied):
                raise PipelineError(f"Downloading from s3://{bucket} failed on a worker: {done}. Run again.")
            yield from done


def download_chunk(chunk: Chunk) -> list[SourceObject | Rejected]:
    """Return what `download` yields for a chunk. Several attempts for the same chunk may run at the same time.

    Raises NoUsableInput like `download`. Also raises NoUsableInput if S3 refuses an object and this worker has no
    credentials, although the run has credentials.
    """
    client, parts = _client(chunk.place), chunk.parts / uuid.uuid4().hex
    parts.mkdir()  # raises OSError if the run has ended
    try:
        done = list(_download(client, chunk.bucket, chunk.objects, chunk.folder, parts))
    except Throttled as error:
        raise NoUsableInput(str(error)) from None  # a Throttled cannot be pickled
    finally:
        shutil.rmtree(parts, ignore_errors=True)  # the run may remove it at the same time
    refused = [row for row in done if isinstance(row, Rejected) and row.reason == errors.REFUSED]
    if refused and chunk.place.is_signed and not place(client).is_signed:
        raise NoUsableInput(
            f"S3 refuses s3://{chunk.bucket}/{refused[0].path} to the worker on {socket.gethostname()}, which has no "
            "AWS credentials. The run has credentials, but does not send them to workers. Configure them for the "
            "worker too: in its environment, in a file or by a role."
        )
    return done


@lru_cache(1)
def _client(default: Place) -> Client:
    return connect(default=default)


def _chunks(objects: Iterable[SourceObject]) -> Iterator[list[SourceObject]]:
    chunk: list[SourceObject] = []
    size = 0
    for source in objects:
        if chunk and (len(chunk) == CHUNK_OBJECTS or size + source.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(source)
        size += source.size
    if chunk:
        yield chunk


class _Completed(NamedTuple):
    """A transfer that has ended."""

    source: SourceObject
    part: Path  # file with the object's whole content, unless the object was rejected
    rejected: Rejected | None
    throttled: Throttled | None  # the error if S3 throttles every request, not only the one for this object


class _Downloader:
    """Fetches objects with awscrt if possible, else with botocore in threads, which start when they are needed."""

    def __init__(self, client: Client, bucket: str, gate: Gate, stop: Event) -> None:
        self.crt = CrtTransfer(client, bucket, gate)
        self._botocore = BotocoreTransfer(client, bucket, gate, stop)
        self._transfers: dict[Path, PendingTransfer] = {}  # transfers of awscrt; a key is the unfinished file
        self._queue: SimpleQueue[tuple[SourceObject, Path] | None] = SimpleQueue()  # objects for the threads
        self._completed: SimpleQueue[tuple[SourceObject, Path, Rejected | Exception | None]] = SimpleQueue()
        self._threads: list[Thread] = []
        self._queued = 0  # number of objects that threads fetch or will fetch
        self._failed: set[Path] = set()  # unfinished files of objects that awscrt failed to fetch
        self._gate, self._stop = gate, stop

    def start(self, source: SourceObject, part: Path) -> None:
        """Start to write an object to the file `part`."""
        if self.crt.accepts(source.size):
            completed = partial(self._completed.put, (source, part, None))
            if transfer := self.crt.start(source, part, completed):
                self._transfers[part] = transfer
                return
        self._start_in_thread(source, part)

    def _start_in_thread(self, source: SourceObject, part: Path) -> None:
        self._queue.put((source, part))
        self._queued += 1
        if self._queued > len(self._threads):
            # The process can exit while a daemon thread reads from a silent server. A ThreadPoolExecutor would wait for
            # the thread.
            self._threads.append(Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None and not self._stop.is_set():
            source, part = item
            result: Rejected | Exception | None
            try:
                result = self._botocore.fetch(source, part)
                if result is None:
                    self.crt.adopt(source.key)
            except Exception as error:  # noqa: BLE001 - `next_completed` raises it
                result = error
            self._completed.put((source, part, result))

    def next_completed(self) -> _Completed | None:
        """Wait until a transfer ends, and return the fetched or rejected object.

        Returns None if no transfer ends within POLL_INTERVAL. Also returns None if awscrt has failed to fetch the
        object; a thread then fetches the object with botocore.
        If a thread got an exception other than Throttled, raises this exception.
        """
        try:
            source, part, result = self._completed.get(timeout=POLL_INTERVAL)
        except Empty:
            for pending in self._transfers.values():
                if monotonic() > pending.deadline:
                    pending.cancel()
            return None
        transfer = self._transfers.pop(part, None)
        if transfer is None:
            self._queued -= 1
        elif not self.crt.is_complete(transfer):
            if self._gate.is_open:  # a failure while S3 throttles does not count
                self._failed.add(part)
            self._start_in_thread(source, part)
            return None
        if part in self._failed:
            self._failed.remove(part)
            if result is None:
                self.crt.count_failure()
        if isinstance(result, Throttled):
            return _Completed(source, part, result.rejected, result)
        if isinstance(result, Exception):
            raise result
        return _Completed(source, part, result, None)

    def close(self) -> None:
        """Cancel all transfers, and wait up to SHUTDOWN_TIMEOUT until they no longer write to their files."""
        self._stop.set()
        for transfer in self._transfers.values():
            transfer.cancel()
        for _ in self._threads:
            self._queue.put(None)
        deadline = monotonic() + SHUTDOWN_TIMEOUT
        while self._transfers and (left := deadline - monotonic()) > 0:
            with suppress(Empty):
                self._transfers.pop(self._completed.get(timeout=left)[1], None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))


def _move(source: SourceObject, part: Path, folder: Path) -> SourceObject:
    """Move a complete file to its place."""
    target = folder / source.path
    try:
        part.replace(target)
    except FileNotFoundError:
        part.stat()  # raises OSError if the run has ended and removed `part`; then no folder is made
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    return source
