"""Sends the outcome of a run, a promotion or a rollback to NOTIFY_URL, as a short JSON document."""

import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dgmd_pipeline.commands import status

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)
TIMEOUT = 5.0  # seconds, for the whole request


def tell(values: "Settings", what: status.Status) -> None:
    """Send a status to NOTIFY_URL if the URL is set and NOTIFY_ON includes the outcome."""
    if values.notify_url and what.outcome in status.TOLD[values.notify_on]:
        text = f"{values.model_name}: {what.outcome}. {what.message}"
        post(values.notify_url.get_secret_value(), {"text": text, **asdict(what)})


def post(url: str, body: Mapping[str, object]) -> None:
    """Send `body` as JSON by POST. A failure is logged as a warning, without the URL's path, which may be a secret."""
    # The request is made in a thread, because a socket's timeout does not cover the look-up of the host's name.
    thread = threading.Thread(target=_post, args=(url, body), daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if thread.is_alive():
        log.warning("NOTIFY_URL: %s has not answered within %.0f s.", urlsplit(url).hostname, TIMEOUT)


def _post(url: str, body: Mapping[str, object]) -> None:
    host = urlsplit(url).hostname
    headers = {"Content-Type": "application/json", "User-Agent": "dgmd_pipeline"}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - settings allow http(s)
        urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        log.warning("NOTIFY_URL: %s did not accept the message (HTTP %d).", host, error.code)
    except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: a host like "a..b"
        reason = getattr(error, "reason", type(error).__name__)
        log.warning("NOTIFY_URL: %s did not accept the message (%s).", host, reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error, because urllib would follow the redirect without sending the message."""

    def redirect_request(self, *_: object) -> None:
        return None
