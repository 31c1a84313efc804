"""S3 objects -> files by AWS's Common Runtime (awscrt), in C: a quarter of the CPU time of botocore's `get_object`.

It makes for other keys the request that botocore has made with success, and answers only whether that worked: what does
not is left to botocore, which retries longer and whose errors say why; so are large objects. So there is nothing here
about addressing, regions, redirects or error codes, and where there is a proxy on the way it does not act at all.
"""

import base64
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest

log = logging.getLogger(__name__)
MAX_FAILURES = 5  # in a row, until it is no longer tried: the first minute of a run without S3 belongs to botocore
MAX_BYTES = 8_000_000  # of an object: it is held in memory until it is whole
STALL_TIMEOUT, MIN_BYTES_PER_SECOND = (
    30.0,
    10_000,
)  # seconds, and bytes a second, that an object may take: bytes are not seen as they come


class PendingTransfer(NamedTuple):
    """An object on its way."""

    key: str
    size: int  # bytes
    path: Path
    headers: dict[str, str]  # of the answer, names in lower case
    request: Any
    deadline: float  # of `monotonic`

    def cancel(self) -> None:
        """Call it off. It lands all the same, as one that did not work."""
        self.request.cancel()


class Transfer:
    """A way to fetch objects of one bucket, once botocore has shown it."""

    def __init__(self, client: Any) -> None:
        """Watch what `client` sends."""
        self._client = client
        self._sent = threading.local()
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._failures = 0
        client.meta.events.register("before-send.s3.GetObject", self._watch)

    def _watch(self, request: "AWSPreparedRequest", **_: object) -> None:
        self._sent.request = request

    def learn(self, key: str) -> None:
        """Take over from the last `GetObject` of this thread, which was for `key` and went well."""
        with self._lock:
            if not self.decided:
                try:
                    self._take_over(self._sent.request, _quoted(key))
                except (ValueError, OSError, RuntimeError, ImportError) as error:
                    log.debug("all objects are fetched by botocore: %s", error)
                    self._failures = MAX_FAILURES

    @property
    def decided(self) -> bool:
        """Whether it is known if it can take over."""
        return self._runtime is not None or self._failures >= MAX_FAILURES

    def _take_over(self, request: "AWSPreparedRequest", name: str) -> None:
        """Raises ValueError where awscrt would not do what botocore has done."""
        from botocore.httpsession import get_cert_path
        from botocore.session import Session
        from botocore.utils import get_environ_proxies
        from s3transfer.crt import BotocoreCRTCredentialsWrapper, create_s3_crt_client

        url, parts = str(request.url), urlsplit(str(request.url))
        if not url.endswith(f"/{name}"):
            raise ValueError("the address does not end with the key")
        if parts.scheme in (get_environ_proxies(url) | (self._client.meta.config.proxies or {})):
            raise ValueError("there is a proxy on the way")
        signature = request.headers.get("Authorization", b"")
        signature = signature.decode() if isinstance(signature, bytes) else signature
        scope = signature.partition("Credential=")[2].partition(",")[0].split("/")
        if signature and (not signature.startswith("AWS4-HMAC-SHA256") or scope[-2:] != ["s3", "aws4_request"]):
            raise ValueError("requests are signed in another way")
        self._host, self._path = parts.netloc, parts.path.removesuffix(name)
        # As boto3 hands a client's credentials to awscrt: they may be renewed during a long run.
        credentials = BotocoreCRTCredentialsWrapper(self._client._get_credentials())
        self._runtime = create_s3_crt_client(
            scope[-3] if signature else self._client.meta.region_name,
            credentials.to_crt_credentials_provider() if signature else None,
            use_ssl=parts.scheme == "https",
            verify=Session().get_config_variable("ca_bundle") or get_cert_path(True),
        )

    def takes(self, size: int) -> bool:
        """Whether it fetches objects of so many bytes."""
        return self._runtime is not None and self._failures < MAX_FAILURES and 0 < size <= MAX_BYTES

    def start(self, key: str, size: int, path: Path, landed: Callable[[], None]) -> PendingTransfer | None:
        """Begin to write an object of `size` bytes to `path`; `landed` is called, by another thread, when that is over.

        `takes(size)` has to be true. None: it could not begin, because of the disk, say.
        """
        from awscrt.exceptions import AwsCrtError
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.s3 import S3RequestType

        received: dict[str, str] = {}
        headers = HttpHeaders([("host", self._host), ("x-amz-checksum-mode", "ENABLED")])
        try:
            request = self._runtime.make_request(
                # A plain GET; GET_OBJECT asks for ranges, and 0.38.0 crashed on empty objects.
                type=S3RequestType.DEFAULT,
                operation_name="GetObject",
                request=HttpRequest("GET", self._path + _quoted(key), headers),
                recv_filepath=str(path),
                on_headers=lambda headers, **_: received.update((name.lower(), value) for name, value in headers),
                on_done=lambda **_: landed(),
            )
        except (AwsCrtError, OSError, ValueError, RuntimeError) as error:  # awscrt raises Python's own, too
            log.debug("awscrt did not begin with %s: %s", key, error)
            self._failures += 1
            return None
        return PendingTransfer(
            key, size, path, received, request, monotonic() + STALL_TIMEOUT + size / MIN_BYTES_PER_SECOND
        )

    def worked(self, flight: PendingTransfer) -> bool:
        """Tell whether a flight that is over brought the object whole; if not, its file may hold anything."""
        problem: object = flight.request.finished_future.exception()
        try:
            if problem is None and flight.path.stat().st_size != flight.size:
                problem = "another size"
            elif problem is None and not _is_intact(flight.path, flight.headers):
                problem = "another checksum"
        except (OSError, ValueError) as error:  # a checksum that is none, say
            problem = error
        if problem is None:
            self._failures = 0
            return True
        log.debug("awscrt did not fetch %s: %s", flight.key, problem)
        self._failures += 1
        return False


def _is_intact(path: Path, headers: Mapping[str, str]) -> bool:
    """Compare a file with the checksum that came with it, if one did, as botocore does."""
    from awscrt import checksums

    functions: dict[str, Callable[[bytes], bytes]] = {
        "crc32": lambda content: checksums.crc32(content).to_bytes(4, "big"),
        "crc32c": lambda content: checksums.crc32c(content).to_bytes(4, "big"),
        "crc64nvme": lambda content: checksums.crc64nvme(content).to_bytes(8, "big"),
        "sha256": lambda content: hashlib.sha256(content).digest(),
    }
    for name, function in functions.items():
        stated = headers.get(f"x-amz-checksum-{name}", "-")
        if "-" not in stated:  # with a number of parts behind it, it is one of checksums
            return base64.b64decode(stated) == function(path.read_bytes())
    return True


def _quoted(key: str) -> str:
    return quote(key, safe="/~")
