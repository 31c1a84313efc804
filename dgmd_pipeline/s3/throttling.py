"""Limits the rate of requests to a server that answers "slow down".

If a request gets this answer, botocore and awscrt repeat it a few times, and do not slow other requests down. A `Gate`
slows all requests of a client down together, and repeats them for much longer.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock
from time import monotonic
from typing import TYPE_CHECKING, Any

from dgmd_pipeline.s3.client import Client, endpoint_host

if TYPE_CHECKING:
    from botocore.awsrequest import AWSResponse

log = logging.getLogger(__name__)
STATUSES = (429, 503)  # HTTP statuses that mean "slow down"; S3 sends 503 SlowDown, and proxies often send an empty 503
PATIENCE = 120.0  # seconds to continue while the only answer is "slow down"
MAX_ATTEMPTS = 50  # maximum number of times that a request is sent while the server accepts other requests
FIRST_INTERVAL, LONGEST_INTERVAL = 0.05, 4.0  # seconds between two requests
RECOVERY = 0.7  # the interval is multiplied by this number after an accepted request, and doubled after "slow down"
SECONDS_BETWEEN_LINES = 30.0  # between two log lines about throttling


class Gate:
    """Sets the interval between the requests of all threads. It is 0 until the server answers "slow down"."""

    def __init__(self, host: str, stop: Event) -> None:
        """`host` is the name of the server in the log. Setting `stop` ends all waits."""
        self._host, self._stop = host, stop
        self._lock = Lock()
        self._interval = 0.0  # seconds
        self._next = 0.0  # when the next request may be sent, on the clock of `time.monotonic`
        self._slowed = 0.0  # when the interval was last increased
        self._since: float | None = None  # when the server began to answer nothing but "slow down"
        self._logged: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests may be sent without waiting."""
        return not self._interval

    @property
    def exhausted(self) -> bool:
        """Whether the server has answered nothing but "slow down" for PATIENCE seconds."""
        since = self._since
        return since is not None and monotonic() - since >= PATIENCE

    def wait(self) -> None:
        """Wait until the next request may be sent."""
        while not (self.is_open or self.exhausted or self._stop.is_set()):
            with self._lock:
                now = monotonic()
                if now >= self._next:
                    self._schedule(now)
                    return
                delay = self._next - now
            self._stop.wait(delay)

    def slow_down(self, answer: str) -> None:
        """Send requests at a lower rate, because the server answered "slow down". The log message contains `answer`."""
        now = monotonic()
        with self._lock:
            if self._since is None:
                self._since = now
            if now - self._slowed >= self._interval:  # several requests that were sent together count once
                self._interval = min(max(2 * self._interval, FIRST_INTERVAL), LONGEST_INTERVAL)
                self._slowed = now
                self._schedule(now)
            due = self._logged is None or now - self._logged >= SECONDS_BETWEEN_LINES
            if due:
                self._logged = now
        if due:
            log.warning("  S3 is throttling: %s answers %s. Requests are sent at a lower rate.", self._host, answer)

    def accepted(self) -> None:
        """Send requests at a higher rate, because the server accepted one."""
        if self._since is None and self.is_open:  # the normal case, which needs no lock
            return
        with self._lock:
            self._since = None
            self._interval *= RECOVERY
            if self._interval < FIRST_INTERVAL / 100:
                self._interval = 0.0
            self._next = min(self._next, monotonic() + self._interval)

    def _schedule(self, now: float) -> None:
        self._next = now + self._interval * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret

    def _observe(self, response: "tuple[AWSResponse, dict[str, Any]] | None", attempts: int, **_: object) -> int | None:
        """Handle the event "needs-retry" of botocore. Return 0 if the request must be repeated, else None.

        0 is the delay of the repetition in seconds. There is no delay here, because every request waits in `wait`.
        """
        if response is None:
            return None
        if response[0].status_code in STATUSES:
            code = response[1].get("Error", {}).get("Code", "")
            self.slow_down(" ".join(dict.fromkeys((str(response[0].status_code), str(code)[:50]))))
            return None if self.exhausted or attempts >= MAX_ATTEMPTS or self._stop.is_set() else 0
        if response[0].status_code < 500:
            self.accepted()
        return None


@contextmanager
def gate(client: Client, stop: Event | None = None) -> Iterator[Gate]:
    """Let all requests of `client` pass through one gate."""
    gate = Gate(endpoint_host(client), stop or Event())
    events = client.meta.events

    def wait(**_: object) -> None:
        gate.wait()

    events.register_first("request-created.s3", wait)  # before the request is signed
    # botocore uses the first delay that a handler returns. It calls the handler of its own retries first,
    # and this handler last. So this handler decides only if botocore would not repeat the request.
    events.register_last("needs-retry.s3", gate._observe)
    try:
        yield gate
    finally:
        events.unregister("request-created.s3", wait)
        events.unregister("needs-retry.s3", gate._observe)
