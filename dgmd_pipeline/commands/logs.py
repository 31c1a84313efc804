"""Log lines on a stream, without secrets."""

import io
import logging
import sys
import traceback
from typing import TextIO

log = logging.getLogger("dgmd_pipeline")


def start(stream: TextIO, verbose: bool) -> None:
    """Log to `stream`; `verbose` adds the package's debug lines. Uncaught exceptions are logged, too."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a line with a file name that is not UTF-8 would be lost
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines("%(message)s" if stream.isatty() else "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.raiseExceptions = False  # no traceback about a closed pipe, as with `pipeline.py plan | head`
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    sys.excepthook = _log_exception


class _Lines(logging.Formatter):
    """Removes secrets, and marks warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        from dgmd_pipeline.formatting import redact

        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def _log_exception(_: type[BaseException], error: BaseException, __: object) -> None:
    log.error("%s", "".join(traceback.format_exception(error)))
