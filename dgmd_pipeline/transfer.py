"""S3 objects -> files by AWS's Common Runtime (awscrt), in C: a quarter of the CPU time of botocore's `get_object`.

It repeats for other keys a request that botocore has made with success, and answers only whether that worked: what does
not is left to botocore, which retries longer and whose errors say why. So there is nothing here about addressing,
regions, redirects or error codes. What the Common Runtime would not do as botocore does it (a proxy) it is not asked.
"""

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest

log = logging.getLogger(__name__)
FAILURES = 5  # in a row, until it is no longer tried: the first minute of a run without S3 belongs to botocore
LOOK = 0.5  # seconds between two looks at whether to stop
PATIENCE = 1.0  # seconds
SILENCE = 30.0  # seconds without a byte, as for botocore


class Transfer:
    """A way to fetch objects of one bucket, once botocore has shown it. Threads may share it."""

    def __init__(self, client: Any) -> None:
        """Watch what `client` sends."""
        self._client = client
        self._sent = threading.local()
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._known = threading.Event()  # whether it can take over
        self._runtime: Any = None
        self._failures = 0
        client.meta.events.register("before-send.s3.GetObject", self._watch)

    def _watch(self, request: "AWSPreparedRequest", **_: object) -> None:
        self._sent.request = request

    def learn(self, key: str) -> None:
        """Take over from the last `GetObject` of this thread, which was for `key` and went well."""
        with self._lock:
            if self._runtime is None and self._failures < FAILURES:
                try:
                    self._take_over(self._sent.request, _quoted(key))
                except ValueError as error:
                    log.debug("all objects are fetched by botocore: %s", error)
                    self._failures = FAILURES
                self._known.set()

    def _take_over(self, request: "AWSPreparedRequest", name: str) -> None:
        """Raises ValueError where awscrt would not do what botocore has done."""
        from botocore.httpsession import get_cert_path
        from botocore.session import Session
        from botocore.utils import get_environ_proxies
        from s3transfer.crt import BotocoreCRTCredentialsWrapper, create_s3_crt_client

        url = str(request.url)
        if not url.endswith(f"/{name}"):
            raise ValueError("the address does not end with the key")
        if get_environ_proxies(url) or self._client.meta.config.proxies:
            raise ValueError("there is a proxy on the way")
        signature = request.headers.get("Authorization", b"")
        signature = signature.decode() if isinstance(signature, bytes) else signature
        scope = signature.partition("Credential=")[2].partition(",")[0].split("/")
        if signature and (not signature.startswith("AWS4-HMAC-SHA256") or scope[-2:] != ["s3", "aws4_request"]):
            raise ValueError("requests are signed in another way")
        parts = urlsplit(url)
        self._host, self._path = parts.netloc, parts.path.removesuffix(name)
        # As boto3 hands a client's credentials to awscrt: they may be renewed during a long run.
        credentials = BotocoreCRTCredentialsWrapper(self._client._get_credentials())
        self._runtime = create_s3_crt_client(
            scope[-3] if signature else self._client.meta.region_name,
            credentials.to_crt_credentials_provider() if signature else None,
            use_ssl=parts.scheme == "https",
            verify=Session().get_config_variable("ca_bundle") or get_cert_path(True),
        )

    def fetch(self, key: str, path: Path, stopped: Callable[[], bool]) -> bool:
        """Write the object to `path` and tell whether that worked; `path` may hold anything where it did not.

        The first thread to ask is told no, and the others wait a moment for what botocore shows it.
        """
        if not self._known.is_set() and not self._first.acquire(blocking=False):
            self._known.wait(PATIENCE)
        if self._runtime is None or self._failures >= FAILURES:
            return False
        from awscrt.exceptions import AwsCrtError
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.s3 import S3RequestType

        heard = [monotonic()]
        request = self._runtime.make_request(
            type=S3RequestType.DEFAULT,  # a plain GET; GET_OBJECT asks for ranges, and 0.38.0 crashed on empty objects
            operation_name="GetObject",
            request=HttpRequest("GET", self._path + _quoted(key), HttpHeaders([("host", self._host)])),
            recv_filepath=str(path),
            on_progress=lambda progress, **_: heard.__setitem__(0, monotonic()),  # noqa: ARG005
        )
        while True:
            try:
                request.finished_future.result(LOOK)
                self._failures = 0
                return True
            except NotYet:
                if stopped() or monotonic() - heard[0] > SILENCE:
                    request.cancel()
                    heard[0] = math.inf  # until it has let go of the file
            except AwsCrtError as error:
                log.debug("awscrt did not fetch %s: %s", key, error)
                self._failures += 1
                return False


def _quoted(key: str) -> str:
    return quote(key, safe="/~")
