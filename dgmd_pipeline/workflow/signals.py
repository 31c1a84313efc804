"""SIGINT and SIGTERM -> Stopped in the main thread, and the end of the process where that is not raised in time.

Python calls a signal handler between two instructions, and a library can lose the exception that the handler raises:
TensorFlow swallows it while it is imported or traces a function. A long call of native code delays it. So a signal is
remembered as well as raised, and a thread that notices it at once ends the process when it still runs GRACE seconds
later. What the process was writing is a draft, which the next run removes or resumes.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

from dgmd_pipeline.errors import Stopped

GRACE = 3.0  # seconds; `docker stop` kills after ten
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
received: list[int] = []  # since `handle_signals` began


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Raise Stopped in the block when a signal arrives; end the process when that does not end the block."""
    received.clear()
    reader, writer = os.pipe()
    screen = os.dup(2)  # file descriptor 2 is /dev/null while TensorFlow is imported
    os.set_blocking(writer, False)
    former = {number: signal.signal(number, _remember) for number in WORDS}
    # Python's C code writes to it the moment a signal arrives, whatever the main thread does.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, screen), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)


def check_stopped() -> None:
    """Raise Stopped if a signal has arrived: the exception of the handler may have been lost."""
    if received:
        raise Stopped


def stop_message(number: int) -> str:
    """Return the message of a run that a signal ended."""
    return f"{WORDS[signal.Signals(number)]}; run the same command again to resume"


def _remember(number: int, _: object) -> None:
    received.append(number)
    check_stopped()


def _watch(reader: int, screen: int) -> None:
    while heard := os.read(reader, 1):
        if heard[0] in WORDS:
            again, _, _ = select.select([reader], [], [], GRACE)
            if again and not os.read(reader, 1):
                break  # the block has ended
            _, writable, _ = select.select([], [screen], [], 0)  # a full pipe would block
            with contextlib.suppress(OSError):  # the reader has ended
                os.write(screen, f"error: {stop_message(heard[0])}\n".encode() if writable else b"")
            os._exit(128 + heard[0])
    os.close(reader)
    os.close(screen)
