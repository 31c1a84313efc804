"""Fetches S3 objects with AWS's Common Runtime (awscrt), in a quarter of the CPU time of botocore's `get_object`.

`CrtTransfer` takes a successful request of botocore and sends the same request for other keys. So addressing, regions
and redirects need no code here. botocore fetches every object that awscrt cannot fetch, because botocore retries longer
and reports the cause of a failure. botocore also fetches large objects, and all objects if there is a proxy.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.integrity import file_difference
from dgmd_pipeline.s3.throttling import STATUSES, Gate

if TYPE_CHECKING:
    from awscrt.s3 import S3Client, S3Request
    from botocore.awsrequest import AWSPreparedRequest

log = logging.getLogger(__name__)
MAX_FAILURES = 5  # objects in a row that awscrt could not fetch; after them, awscrt is not used again
MAX_BYTES = 8_000_000  # maximum size of an object that awscrt fetches; awscrt holds the whole object in memory
# awscrt reports no progress, so an object has a time limit: STALL_TIMEOUT seconds plus its size / MIN_BYTES_PER_SECOND.
STALL_TIMEOUT = 30.0
MIN_BYTES_PER_SECOND = 10_000


class PendingTransfer(NamedTuple):
    """A transfer in progress."""

    source: SourceObject
    path: Path
    headers: dict[str, str]  # headers of the response; their names are in lower case
    request: "S3Request"
    deadline: float  # on the clock of `time.monotonic`

    def cancel(self) -> None:
        """Cancel the transfer. It then completes as a failed transfer."""
        self.request.cancel()


class CrtTransfer:
    """Fetches objects of one bucket with awscrt, after botocore has fetched one object."""

    def __init__(self, client: Client, bucket: str, gate: Gate) -> None:
        """Register a handler that stores the last `GetObject` request of each thread. `adopt` uses this request."""
        self._client, self._bucket, self._gate = client, bucket, gate
        self._sent = threading.local()
        self._lock = threading.Lock()
        self._runtime: S3Client | None = None
        self._failures = 0
        client.meta.events.register("before-send.s3.GetObject", self._remember)

    def _remember(self, request: "AWSPreparedRequest", **_: object) -> None:
        self._sent.request = request

    def adopt(self, key: str) -> None:
        """Prepare awscrt to send requests like this thread's last `GetObject` request, which fetched `key`."""
        with self._lock:
            if not self.decided:
                try:
                    self._adopt(self._sent.request, _quoted(key))
                except (ValueError, OSError, RuntimeError, ImportError) as error:
                    log.debug("botocore fetches all objects: %s", error)
                    self._failures = MAX_FAILURES

    @property
    def decided(self) -> bool:
        """Whether it is known if awscrt can be used."""
        return self._runtime is not None or self._failures >= MAX_FAILURES

    def _adopt(self, request: "AWSPreparedRequest", quoted_key: str) -> None:
        """Create the awscrt client. Raises ValueError if awscrt cannot send requests like botocore's `request`."""
        from botocore.httpsession import get_cert_path
        from botocore.utils import get_environ_proxies
        from s3transfer.crt import BotocoreCRTCredentialsWrapper, create_s3_crt_client

        url, parts = str(request.url), urlsplit(str(request.url))
        if not url.endswith(f"/{quoted_key}"):
            raise ValueError("the URL does not end with the key")
        if parts.scheme in (get_environ_proxies(url) | (self._client.meta.config.proxies or {})):
            raise ValueError("there is a proxy")
        signature = request.headers.get("Authorization", b"")
        signature = signature.decode() if isinstance(signature, bytes) else signature
        scope = signature.partition("Credential=")[2].partition(",")[0].split("/")
        if signature and (not signature.startswith("AWS4-HMAC-SHA256") or scope[-2:] != ["s3", "aws4_request"]):
            raise ValueError("requests have another kind of signature")
        self._host, self._path = parts.netloc, parts.path.removesuffix(quoted_key)
        # boto3 itself uses this wrapper. It renews credentials that expire during a long run.
        credentials = BotocoreCRTCredentialsWrapper(self._client._get_credentials())
        self._runtime = create_s3_crt_client(
            scope[-3] if signature else self._client.meta.region_name,
            credentials.to_crt_credentials_provider() if signature else None,
            use_ssl=parts.scheme == "https",
            verify=get_cert_path(self._client._endpoint.http_session._verify),
        )

    def accepts(self, size: int) -> bool:
        """Return whether awscrt fetches an object of `size` bytes now. It fetches no object while S3 throttles."""
        usable = self._runtime is not None and self._failures < MAX_FAILURES
        return usable and 0 < size <= MAX_BYTES and self._gate.is_open

    def start(self, source: SourceObject, path: Path, completed: Callable[[], None]) -> PendingTransfer | None:
        """Start to write an object to `path`; another thread calls `completed` when the transfer ends.

        Returns None if the transfer cannot start, for example because of a disk error. `accepts(source.size)` must be
        true.
        """
        from awscrt.exceptions import AwsCrtError
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.s3 import S3RequestType

        if self._runtime is None:
            return None
        received: dict[str, str] = {}
        headers = HttpHeaders([("host", self._host), ("x-amz-checksum-mode", "ENABLED")])
        try:
            request = self._runtime.make_request(
                # A plain GET. With GET_OBJECT, awscrt would send range requests, and awscrt 0.38.0 crashes on a range
                # request for an empty object.
                type=S3RequestType.DEFAULT,
                operation_name="GetObject",
                request=HttpRequest("GET", self._path + _quoted(source.key), headers),
                recv_filepath=str(path),
                on_headers=lambda headers, **_: received.update((name.lower(), value) for name, value in headers),
                on_done=lambda **_: completed(),
            )
        except (AwsCrtError, OSError, ValueError, RuntimeError) as error:  # awscrt also raises built-in errors
            log.debug("awscrt could not start to fetch %s: %s", source.key, error)
            self._failures += 1
            return None
        deadline = monotonic() + STALL_TIMEOUT + source.size / MIN_BYTES_PER_SECOND
        return PendingTransfer(source, path, received, request, deadline)

    def is_complete(self, transfer: PendingTransfer) -> bool:
        """Return whether a completed transfer wrote the listed object. If not, the file's content is undefined."""
        problem: object = transfer.request.finished_future.exception()
        if problem is None:
            try:
                problem = file_difference(self._bucket, transfer.source, transfer.headers, transfer.path)
            except (OSError, ValueError) as error:
                problem = error
        elif (status := getattr(problem, "status_code", None)) in STATUSES:
            self._gate.slow_down(str(status))
        if problem is None:
            self._failures = 0
            self._gate.accepted()
            return True
        log.debug("awscrt did not fetch %s: %s", transfer.source.key, problem)
        return False

    def count_failure(self) -> None:
        """Count an object that botocore could fetch and awscrt could not. A success of awscrt resets the count."""
        self._failures += 1


def _quoted(key: str) -> str:
    return quote(key, safe="/~")
