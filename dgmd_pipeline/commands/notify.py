"""What a run came to -> a short JSON, sent by POST to somebody's URL."""

import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger(__name__)
TIMEOUT = 5.0  # seconds, for all of it


def post(url: str, body: Mapping[str, Any]) -> None:
    """Send `body` as JSON. What goes wrong is a warning, without the path of the URL, which may be a secret."""
    # A thread, because the time-out of a socket knows nothing of a name server that does not answer.
    sending = threading.Thread(target=_post, args=(url, body), daemon=True)
    sending.start()
    sending.join(TIMEOUT)
    if sending.is_alive():
        log.warning("NOTIFY_URL: %s has not answered within %.0f s.", urlsplit(url).hostname, TIMEOUT)


def _post(url: str, body: Mapping[str, Any]) -> None:
    host = urlsplit(url).hostname
    headers = {"Content-Type": "application/json", "User-Agent": "dgmd_pipeline"}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - http(s), see settings
        urllib.request.build_opener(_Straight).open(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        log.warning("NOTIFY_URL: %s did not take the message (HTTP %d).", host, error.code)
    except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: of a host like "a..b"
        reason = getattr(error, "reason", type(error).__name__)
        log.warning("NOTIFY_URL: %s did not take the message (%s).", host, reason)


class _Straight(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would follow it without the message."""

    def redirect_request(self, *_: Any) -> None:
        return None
