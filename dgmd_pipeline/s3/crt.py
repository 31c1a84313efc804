"""S3 objects -> files by AWS's Common Runtime (awscrt), in C: a quarter of the CPU time of botocore's `get_object`.

`CrtTransfer` repeats a successful botocore request for other keys, so addressing, regions and redirects need no code
here. botocore fetches every object that awscrt cannot fetch; it retries longer and reports the cause. botocore also
fetches large objects, and all objects if there is a proxy.
"""

import base64
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from dgmd_pipeline.s3.client import Client

if TYPE_CHECKING:
    from awscrt.s3 import S3Client, S3Request
    from botocore.awsrequest import AWSPreparedRequest

log = logging.getLogger(__name__)
MAX_FAILURES = 5  # in a row; then awscrt is not used again
MAX_BYTES = 8_000_000  # of an object: awscrt holds it in memory until it is complete
# An object may take STALL_TIMEOUT seconds plus its size / MIN_BYTES_PER_SECOND: awscrt reports no progress.
STALL_TIMEOUT = 30.0
MIN_BYTES_PER_SECOND = 10_000


class PendingTransfer(NamedTuple):
    """A transfer in progress."""

    key: str
    size: int  # bytes
    path: Path
    headers: dict[str, str]  # of the response; names in lower case
    request: "S3Request"
    deadline: float  # on the clock of `time.monotonic`

    def cancel(self) -> None:
        """Cancel the transfer. It still completes, as a failed one."""
        self.request.cancel()


class CrtTransfer:
    """Fetches objects of one bucket by awscrt, after botocore has fetched one."""

    def __init__(self, client: Client) -> None:
        """Observe the requests that `client` sends."""
        self._client = client
        self._sent = threading.local()
        self._lock = threading.Lock()
        self._runtime: S3Client | None = None
        self._failures = 0
        client.meta.events.register("before-send.s3.GetObject", self._remember)

    def _remember(self, request: "AWSPreparedRequest", **_: object) -> None:
        self._sent.request = request

    def adopt(self, key: str) -> None:
        """Adopt the form of this thread's last `GetObject` request, which fetched `key` successfully."""
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
        """Create the awscrt client. Raises ValueError if awscrt would send a different request."""
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
        # The wrapper that boto3 itself uses: credentials may be renewed during a long run.
        credentials = BotocoreCRTCredentialsWrapper(self._client._get_credentials())
        self._runtime = create_s3_crt_client(
            scope[-3] if signature else self._client.meta.region_name,
            credentials.to_crt_credentials_provider() if signature else None,
            use_ssl=parts.scheme == "https",
            verify=get_cert_path(self._client._endpoint.http_session._verify),
        )

    def accepts(self, size: int) -> bool:
        """Return whether an object of `size` bytes can be fetched."""
        return self._runtime is not None and self._failures < MAX_FAILURES and 0 < size <= MAX_BYTES

    def start(self, key: str, size: int, path: Path, completed: Callable[[], None]) -> PendingTransfer | None:
        """Start to write an object of `size` bytes to `path`; another thread calls `completed` at the end.

        Returns None if the transfer cannot start, for example because of a disk error. `accepts(size)` must be true.
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
                # A plain GET. GET_OBJECT sends range requests, and 0.38.0 crashed on empty objects.
                type=S3RequestType.DEFAULT,
                operation_name="GetObject",
                request=HttpRequest("GET", self._path + _quoted(key), headers),
                recv_filepath=str(path),
                on_headers=lambda headers, **_: received.update((name.lower(), value) for name, value in headers),
                on_done=lambda **_: completed(),
            )
        except (AwsCrtError, OSError, ValueError, RuntimeError) as error:  # awscrt also raises built-in errors
            log.debug("awscrt could not start to fetch %s: %s", key, error)
            self._failures += 1
            return None
        deadline = monotonic() + STALL_TIMEOUT + size / MIN_BYTES_PER_SECOND
        return PendingTransfer(key, size, path, received, request, deadline)

    def is_complete(self, transfer: PendingTransfer) -> bool:
        """Return whether a completed transfer wrote the whole object. If not, the file's content is undefined."""
        problem: object = transfer.request.finished_future.exception()
        try:
            if problem is None and transfer.path.stat().st_size != transfer.size:
                problem = "the size differs"
            elif problem is None and not _is_intact(transfer.path, transfer.headers):
                problem = "the checksum differs"
        except (OSError, ValueError) as error:  # ValueError: a malformed checksum
            problem = error
        if problem is None:
            self._failures = 0
            return True
        log.debug("awscrt did not fetch %s: %s", transfer.key, problem)
        self._failures += 1
        return False


def _is_intact(path: Path, headers: Mapping[str, str]) -> bool:
    """Return whether a file matches the checksum in the response, as botocore does; true if there is none."""
    from awscrt import checksums

    functions: dict[str, Callable[[bytes], bytes]] = {
        "crc32": lambda content: checksums.crc32(content).to_bytes(4, "big"),
        "crc32c": lambda content: checksums.crc32c(content).to_bytes(4, "big"),
        "crc64nvme": lambda content: checksums.crc64nvme(content).to_bytes(8, "big"),
        "sha256": lambda content: hashlib.sha256(content).digest(),
    }
    for name, function in functions.items():
        expected = headers.get(f"x-amz-checksum-{name}", "-")
        if "-" not in expected:  # "<checksum>-<parts>" is a checksum of the parts' checksums
            return base64.b64decode(expected) == function(path.read_bytes())
    return True


def _quoted(key: str) -> str:
    return quote(key, safe="/~")
