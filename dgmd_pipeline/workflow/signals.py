"""SIGINT and SIGTERM -> Stopped where Python runs, and the end of the process where it does not listen.

Python calls a signal's handler between two of its instructions, and what the handler raises can be lost in a library:
TensorFlow swallows it while it is imported or traces a function, and a long call of native code delays it. So a signal
is remembered as well as raised, and a thread that hears of it at once ends the process when it is still there after
GRACE seconds. What it was writing is a draft, which the next run sweeps away or goes on with.
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
received: list[int] = []  # since `caught` began


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Raise Stopped inside the block when a signal comes; end the process when that does not end the block."""
    received.clear()
    reader, writer = os.pipe()
    screen = os.dup(2)  # the process's own leads nowhere while TensorFlow is imported
    os.set_blocking(writer, False)
    former = {number: signal.signal(number, _remember) for number in WORDS}
    # Written by Python's C code the moment the signal comes, whatever the main thread is doing.
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
    """Raise Stopped if a signal came, as the handler did: that may have been swallowed."""
    if received:
        raise Stopped


def stop_message(number: int) -> str:
    """Return what is said of a run that a signal ended."""
    return f"{WORDS[signal.Signals(number)]}; the same command goes on from there"


def _remember(number: int, _: object) -> None:
    received.append(number)
    check_stopped()


def _watch(reader: int, screen: int) -> None:
    while heard := os.read(reader, 1):
        if heard[0] in WORDS:
            again, _, _ = select.select([reader], [], [], GRACE)
            if again and not os.read(reader, 1):
                break  # the block has ended
            _, writable, _ = select.select([], [screen], [], 0)  # a pipe that nobody empties would block
            with contextlib.suppress(OSError):  # nobody reads any more
                os.write(screen, f"error: {stop_message(heard[0])}\n".encode() if writable else b"")
            os._exit(128 + heard[0])
    os.close(reader)
    os.close(screen)
