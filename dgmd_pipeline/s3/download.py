"""Objects in the bucket -> files below raw/."""

import logging
import shutil
from collections.abc import Generator, Iterable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import errors
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.crt import PendingTransfer, Transfer

log = logging.getLogger(__name__)
PARTS = (
    ".part"  # the folder of unfinished files: one file a thread, so no name is too long and none can clash with a key
)
CHUNK = 1 << 16  # bytes between two looks at whether to stop; larger ones save no measurable CPU time
READ_ATTEMPTS = 4
PROBE_TIMEOUT = (
    1.0  # seconds that the first object may take before others begin, until it is known how they are fetched
)
POLL_INTERVAL = 0.5  # seconds between two looks at whether something takes too long
SHUTDOWN_TIMEOUT = (
    5.0  # seconds for the threads to end; one that waits for a silent server longer is left behind, as a daemon
)


def download(
    client: Client, bucket: str, objects: Iterable[SourceObject], folder: Path, threads: int = 32
) -> Generator[SourceObject | Rejected]:
    """Write every object to `folder / path`, whole or not at all, and yield each when it is done, in any order.

    A Rejected stands for an object that is "gone" or "changed" (its size) since the listing, or "archived" (in a
    storage class that has to be restored first). `threads` objects are fetched at a time. Unfinished files lie in
    `folder/.part`, removed at the start and at the end: whatever else is in `folder`, after a kill too, is complete.
    Whoever stops early closes the generator: what is under way is called off.

    Raises NoUsableInput where S3 denies access or cannot be reached, and the disk's OSError as it is.
    """
    parts = folder / PARTS
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    free = [parts / str(number) for number in range(threads)]
    waiting = iter(objects)
    begun = monotonic()
    ways = _Downloader(client, bucket)
    try:
        while True:
            at_once = threads if ways.transfer.decided or monotonic() > begun + PROBE_TIMEOUT else 1
            while threads - len(free) < at_once and (source := next(waiting, None)):
                ways.start(source, free.pop())
            if len(free) == threads:
                break
            if landed := ways.landed():
                source, part, result = landed
                free.append(part)
                yield result or _put(source, part, folder)
    finally:
        ways.close()
        shutil.rmtree(parts, ignore_errors=True)


class _Downloader:
    """The two ways for an object to become a file: awscrt's, and botocore's in threads that begin when needed."""

    def __init__(self, client: Client, bucket: str) -> None:
        self.client, self.bucket = client, bucket
        self.transfer = Transfer(client)
        self._flights: dict[Path, PendingTransfer] = {}
        self._todo: SimpleQueue[tuple[SourceObject, Path] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[SourceObject, Path, Rejected | Exception | None]] = SimpleQueue()
        self._workers: list[Thread] = []
        self._busy = 0  # of these
        self._stop = Event()

    def start(self, source: SourceObject, part: Path) -> None:
        """Begin to write an object to the file `part`."""
        if self.transfer.takes(source.size):
            landed = partial(self._done.put, (source, part, None))
            if flight := self.transfer.start(source.key, source.size, part, landed):
                self._flights[part] = flight
                return
        self._leave_to_botocore(source, part)

    def _leave_to_botocore(self, source: SourceObject, part: Path) -> None:
        self._todo.put((source, part))
        self._busy += 1
        if self._busy > len(self._workers):
            # A daemon, unlike a ThreadPoolExecutor's: at exit none is waited for that reads from a silent server.
            self._workers.append(Thread(target=self._work, daemon=True))
            self._workers[-1].start()

    def _work(self) -> None:
        while (item := self._todo.get()) is not None and not self._stop.is_set():
            source, part = item
            result: Rejected | Exception | None
            try:
                result = _fetch(self.client, self.bucket, source, part, self._stop)
                if result is None:
                    self.transfer.learn(source.key)
            except Exception as error:  # noqa: BLE001 - raised again where the results are read
                result = error
            self._done.put((source, part, result))

    def landed(self) -> tuple[SourceObject, Path, Rejected | None] | None:
        """Wait a moment and return the next that is done, with None where the object is in the file, whole."""
        try:
            source, part, result = self._done.get(timeout=POLL_INTERVAL)
        except Empty:
            for late in self._flights.values():
                if monotonic() > late.deadline:
                    late.cancel()
            return None
        flight = self._flights.pop(part, None)
        if flight is None:
            self._busy -= 1
        elif not self.transfer.worked(flight):
            self._leave_to_botocore(source, part)
            return None
        if isinstance(result, Exception):
            raise result
        return source, part, result

    def close(self) -> None:
        """Call off what is under way, and wait a while until it has let go of its files."""
        self._stop.set()
        for flight in self._flights.values():
            flight.cancel()
        for _ in self._workers:
            self._todo.put(None)
        deadline = monotonic() + SHUTDOWN_TIMEOUT
        while self._flights and (left := deadline - monotonic()) > 0:
            with suppress(Empty):
                self._flights.pop(self._done.get(timeout=left)[1], None)
        for worker in self._workers:
            worker.join(max(0.0, deadline - monotonic()))


def _fetch(client: Client, bucket: str, source: SourceObject, part: Path, stop: Event) -> Rejected | None:
    """Write one object to the file `part`, whole unless `stop` was set meanwhile."""
    import urllib3
    from botocore import exceptions as boto

    # botocore repeats a request that fails, not a body that breaks off.
    broken = (
        boto.HTTPClientError,
        boto.ResponseStreamingError,
        boto.IncompleteReadError,
        boto.FlexibleChecksumError,
        urllib3.exceptions.HTTPError,
    )
    label = source.path.partition("/")[0]
    for attempt in range(READ_ATTEMPTS):
        if stop.wait(attempt and 0.1 * 4**attempt):
            return None
        try:
            response = client.get_object(Bucket=bucket, Key=source.key)
        except (boto.BotoCoreError, boto.ClientError) as error:
            code = error.response.get("Error", {}).get("Code") if isinstance(error, boto.ClientError) else None
            if code in ("NoSuchKey", "404"):
                return Rejected(source.key, label, "gone", "deleted from the bucket since it was listed")
            if code == "InvalidObjectState":
                return Rejected(
                    source.key, label, "archived", "its storage class has to be restored before it can be read"
                )
            raise errors.explain(error, client, bucket, source.key) from error
        try:
            with closing(response["Body"]) as body:
                size = _copy(body, part, stop)
        except broken:
            continue
        if size != source.size and not stop.is_set():
            return Rejected(source.key, label, "changed", f"{source.size} bytes when it was listed, now {size}")
        return None
    raise NoUsableInput(
        f"The transfer of s3://{bucket}/{source.key} from {errors.endpoint_host(client)} broke off {READ_ATTEMPTS} "
        "times: see to the network and run again."
    )


def _put(source: SourceObject, part: Path, folder: Path) -> SourceObject:
    target = folder / source.path
    try:
        part.replace(target)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    return source


def _copy(body: Any, part: Path, stop: Event) -> int:
    """Write what comes to `part`, until `stop` is set, and return how many bytes."""
    size = 0
    with part.open("wb") as file:
        for chunk in body.iter_chunks(CHUNK):
            if stop.is_set():
                break
            size += file.write(chunk)
    return size
