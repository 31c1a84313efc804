"""SIGINT and SIGTERM raise Stopped in the main thread. If the run does not end in time, the process is ended.

A library can suppress the exception that the signal handler raises: TensorFlow does so while it is imported and while
it traces a function. So the handler also stores the signal, for `check_stopped`.

Python calls a signal handler only between two instructions, so a long call of native code delays the handler. A
thread notices the signal without this delay. If the process still runs GRACE seconds later, the thread ends the
process. The step that was running then leaves only a draft, which the next run removes or resumes.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

from dgmd_pipeline.errors import Stopped

# After a signal, the block of `handle_signals` has GRACE seconds to end. If it does not end, the functions in
# `before_end` have ENDING seconds. The sum is less than the ten seconds after which `docker stop` kills the
# process.
GRACE, ENDING = 3.0, 5.0
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
received: list[int] = []  # numbers of the signals that have arrived since `handle_signals` began
_deferring: list[None] = []  # one entry for each `deferred` block that the main thread is in
# Functions that are called with the number of the signal before the process is ended.
before_end: list[Callable[[int], None]] = []


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """When a signal arrives, raise Stopped in the block. If the block then does not end in time, end the process."""
    received.clear()
    before_end.clear()
    reader, writer = os.pipe()
    screen = os.dup(2)  # file descriptor 2 is /dev/null while TensorFlow is imported
    os.set_blocking(writer, False)
    former = {number: signal.signal(number, _remember) for number in WORDS}
    # Python's C code writes to this pipe as soon as a signal arrives, even if the main thread is busy.
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
    """Raise Stopped if a signal has arrived. A library may have suppressed the exception that the handler raised."""
    if received:
        raise Stopped


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """If a signal arrives in the block, raise Stopped only after the block. Call this only in the main thread.

    The block may contain a transaction of a database. An exception in the middle of the transaction would leave two
    locks unreleased for ever: the lock of the database, and a lock in the library that uses the database.
    """
    _deferring.append(None)
    try:
        yield
    finally:
        _deferring.pop()
    check_stopped()


def stop_message(number: int) -> str:
    """Return the message for a run that was ended by a signal."""
    return f"{WORDS[signal.Signals(number)]}; run the same command again to resume"


def _remember(number: int, _: object) -> None:
    received.append(number)
    if not _deferring:
        check_stopped()


def _watch(reader: int, screen: int) -> None:
    while heard := os.read(reader, 1):
        if heard[0] in WORDS:
            again, _, _ = select.select([reader], [], [], GRACE)
            if again and not os.read(reader, 1):
                break  # the block has ended
            _, writable, _ = select.select([], [screen], [], 0)  # writing to a full pipe would block
            with contextlib.suppress(OSError):  # the process that reads the error output has ended
                os.write(screen, f"error: {stop_message(heard[0])}\n".encode() if writable else b"")
            # A function in `before_end` could wait for ever for a lock that the main thread holds. So these functions
            # run in a separate thread, and the process ends after at most ENDING seconds even if they do not return.
            ending = threading.Thread(target=_call_before_end, args=(heard[0],), daemon=True)
            ending.start()
            ending.join(ENDING)
            os._exit(128 + heard[0])
    os.close(reader)
    os.close(screen)


def _call_before_end(number: int) -> None:
    for call in before_end:
        call(number)
