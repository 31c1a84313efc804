"""Sends the events of a run to a Luigi scheduler (luigid), which shows them on its page."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import Queue
from typing import Any

import luigi
from luigi.rpc import RemoteScheduler, RPCError
from luigi.scheduler import RUNNING, Scheduler

from dgmd_pipeline.formatting import redact

log = logging.getLogger(__name__)
REPORTED = ("add_worker", "add_task", "ping", "announce_scheduling_failure", "set_task_status_message",
    "set_task_progress_percentage", "report_task_statistics")  # fmt: skip  # calls that report what a run does
CONNECT_TIMEOUT = 5.0  # seconds
FLUSH_SECONDS = 5.0  # maximum time that a run waits, at its end, for its last reports to be sent


def _remote(url: str) -> RemoteScheduler:
    config = luigi.configuration.get_config()
    config.set("core", "rpc_retry_attempts", "1")  # Luigi's default is three attempts, 30 s apart
    try:
        return RemoteScheduler(url, connect_timeout=CONNECT_TIMEOUT)
    finally:
        config.remove_option("core", "rpc_retry_attempts")  # Luigi warns about options that no task reads


class ReportingScheduler:
    """The local scheduler of a run. Calls that report progress are also sent to a remote scheduler.

    The local scheduler decides what runs. If the remote one cannot be reached, one warning is logged and the run
    continues without it.
    """

    def __init__(self, local: Scheduler, url: str) -> None:
        self._local, self._url = local, url
        self._remote = _remote(url)
        self._calls: Queue[Callable[[], object] | None] = Queue()
        self._is_away = False
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._local, name)
        if name not in REPORTED:
            return method

        def call(*arguments: object, **named: object) -> object:
            self._report(partial(getattr(self._remote, name), *arguments, **named))
            return method(*arguments, **named)

        return call

    def get_work(self, **named: object) -> dict[str, object]:
        """Return the next task of the local scheduler, and report to the remote scheduler that this task runs."""
        work = self._local.get_work(**named)
        if task_id := work.get("task_id"):
            add_task = getattr(self._remote, "add_task")  # noqa: B009 - Luigi creates the method at run time
            self._report(partial(add_task, task_id=task_id, status=RUNNING, worker=named["worker"]))
        return work

    def close(self) -> None:
        """Wait until all reports are sent, but at most FLUSH_SECONDS."""
        self._calls.put(None)
        self._thread.join(FLUSH_SECONDS)

    def _report(self, call: Callable[[], object]) -> None:
        if not self._is_away:
            self._calls.put(call)

    def _send(self) -> None:
        while call := self._calls.get():
            try:
                call()
            except (RPCError, OSError, ValueError) as error:
                self._is_away = True
                reason = type(getattr(error, "sub_exception", None) or error).__name__
                log.warning(
                    "The Luigi scheduler at %s cannot be reached (%s). The run continues without it.",
                    redact(self._url), reason,
                )  # fmt: skip
                return
