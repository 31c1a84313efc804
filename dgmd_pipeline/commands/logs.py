"""Logs lines without secrets, and wraps them on a terminal. A standard stream that fails does not stop a run."""

import errno
import io
import logging
import os
import select
import shutil
import sys
import textwrap
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from dgmd_pipeline import formatting

log = logging.getLogger("dgmd_pipeline")
# Control characters, which a file name or the answer of a server may contain, would change what a terminal shows.
ESCAPED = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Output(io.FileIO):
    """A standard stream that discards data that cannot be written, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that another process has made non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Replace the standard streams by streams that do not raise if a pipe is closed or a disk is full.

    A closed stream becomes /dev/null. Otherwise, the next file that is opened would get the file descriptor of the
    stream, and libraries would write their messages into this file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _protected(1, sys.stdout), _protected(2, sys.stderr)


def _protected(number: int, stream: TextIO | None) -> TextIO:
    raw = _Output(number, "w", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):  # the stream was closed when Python started
        raw.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
    lines = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=lines)


def lost_output() -> str | None:
    """Return why lines are missing on the standard streams, or None. A closed pipe is not an error."""
    problems = []
    for name, stream in (("standard output", sys.stdout), ("standard error", sys.stderr)):
        stream.flush()
        error = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "error", None)
        if isinstance(error, OSError) and error.errno != errno.EPIPE:
            problems.append(f"{name}: {error.strerror}")
    return "; ".join(problems) or None


def start(stream: TextIO, verbose: bool, colours: bool = False, times: bool = True) -> None:
    """Log to `stream`; `verbose` adds the package's debug lines. Uncaught exceptions are logged, too.

    Lines begin with the time if `times` is set. A terminal shows warnings and errors in colour if `colours` is set.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # else a line with a file name that is not UTF-8 would be lost
    handler = logging.StreamHandler(stream)
    lines = _Lines("%(asctime)s %(message)s" if times else "%(message)s")
    handler.setFormatter(_TerminalLines(colours, times) if stream.isatty() else lines)
    logging.raiseExceptions = False  # no traceback about a log line that cannot be written
    # TensorFlow warns about functions that it traces again. Keras uses absl to warn about an old file format. These
    # warnings do not help an operator.
    for name in ("urllib3", *(() if verbose else ("tensorflow", "absl"))):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    sys.excepthook = _log_exception


class _Lines(logging.Formatter):
    """Removes secrets and control characters, and marks warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        return formatting.redact(super().format(record)).translate(ESCAPED)

    def formatTime(self, record: logging.LogRecord, _: str | None = None) -> str:  # noqa: N802
        return formatting.local_time(datetime.fromtimestamp(record.created, UTC))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _TerminalLines(_Lines):
    """Wraps a message between words. If `times` is set, the message begins with the time of day.

    A record may have one of these attributes:
    `table`: the line is a row of a table. The value is the column at which the last cell begins. The row gets no time.
    `verbatim`: the lines are for copying. They get no time and are not wrapped.
    `result`: the line is the result of a run. The line is bold.
    """

    STYLES = ((logging.ERROR, "31"), (logging.WARNING, "33"))  # codes of SGR: red and yellow
    RESULT = "1"  # bold

    def __init__(self, colours: bool, times: bool) -> None:
        super().__init__("%(message)s")
        self._colours, self._times = colours, times

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "verbatim", False):
            return super().format(record)
        column = getattr(record, "table", None)
        timed = self._times and not column
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S ") if timed else ""
        width = max(60, shutil.get_terminal_size().columns) - len(time)
        text = "\n".join(_wrap(line, width, column) for line in super().format(record).split("\n"))
        text = text.replace("\n", "\n" + " " * len(time))
        style = next((code for level, code in self.STYLES if record.levelno >= level), None)
        style = style or (self.RESULT if getattr(record, "result", False) else None)
        return f"{time}\x1b[{style}m{text}\x1b[0m" if style and self._colours else time + text


def _wrap(line: str, width: int, column: int | None) -> str:
    """Break a line between words. Indent every part except the first one to `column`.

    If `column` is None, indent these parts by two characters more than the line.
    """
    indent = " " * (len(line) - len(line.lstrip()) + 2 if column is None else column)
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=indent, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(line) or line


def _log_exception(_: type[BaseException], error: BaseException, __: object) -> None:
    log.error("%s", "".join(traceback.format_exception(error)))
