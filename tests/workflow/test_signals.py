import signal
import subprocess
import sys

import pytest

from dgmd_pipeline.workflow import signals

SWALLOWING = """
import hashlib, os, time
from dgmd_pipeline.workflow import signals
with signals.handle_signals():
    signals.before_end.append(lambda number: print("told of", number, flush=True))
    while True:
        try:
            print("there", flush=True)
            {busy}
        except BaseException:
            pass
"""
SLEEP = "time.sleep(600)"
# What is imported now has taken standard error away, as TensorFlow's libraries have for their first seconds.
MUTE = f"os.dup2(os.open(os.devnull, os.O_WRONLY), 2); {SLEEP}"
NATIVE = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"  # minutes in C, where no handler of Python's is run


def start(busy):
    code = SWALLOWING.format(busy=busy)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("busy", [SLEEP, NATIVE, MUTE])
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_a_process_that_does_not_listen_ends_all_the_same(busy, number, code, word):
    process = start(busy)
    process.send_signal(number)
    told, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert told.endswith(f"told of {number}\n")
    assert f"error: {word}" in said
    assert "run the same command again to resume" in said


def test_a_process_ends_although_what_it_does_before_waits_for_ever():
    process = start("signals.before_end.insert(0, lambda number: time.sleep(600)); time.sleep(600)")
    process.send_signal(signal.SIGINT)
    told, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "told of" not in told and "error: interrupted" in said


def test_a_signal_waits_for_the_end_of_a_deferring_block():
    reached = []
    with pytest.raises(KeyboardInterrupt), signals.handle_signals(), signals.deferred():
        with signals.deferred():
            pass
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")
    assert reached == ["the end"]
    with pytest.raises(KeyboardInterrupt), signals.handle_signals():
        signal.raise_signal(signal.SIGINT)
        reached.append("more")
    assert reached == ["the end"]


def test_a_second_signal_ends_it_too():
    process = start(SLEEP)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_block_that_ends_in_time_is_left_alone():
    with pytest.raises(KeyboardInterrupt), signals.handle_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        signals.check_stopped()
    with signals.handle_signals():
        signals.check_stopped()


def test_the_handlers_that_were_there_come_back():
    before = [signal.getsignal(number) for number in signals.WORDS]
    with signals.handle_signals():
        assert [signal.getsignal(number) for number in signals.WORDS] != before
    assert [signal.getsignal(number) for number in signals.WORDS] == before
    assert signal.set_wakeup_fd(-1) == -1
