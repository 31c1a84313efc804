import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.workflow import executors


@pytest.fixture
def pool():
    pool = executors.ProcessExecutor(2)
    yield pool
    pool.close()


def square(number):
    return number * number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    raise ValueError(f"not {number}")


def test_results_come_in_order_from_other_processes(pool):
    assert list(pool.map(square, range(100))) == [number * number for number in range(100)]
    assert os.getpid() not in set(pool.map(process_id, range(8)))


def process_id(_):
    return os.getpid()


def test_pieces_are_taken_as_they_are_needed(pool):
    taken = []
    results = pool.map(square, (taken.append(number) or number for number in range(1000)))
    next(results)
    assert len(taken) < 10


def test_an_exception_of_the_work_comes_through(pool):
    with pytest.raises(ValueError, match="not 3"):
        list(pool.map(fail, [3]))


def test_a_killed_process_is_explained(pool):
    with pytest.raises(PipelineError, match="worker process was killed.*memory ran out"):
        list(pool.map(die, range(3)))


def test_closing_ends_the_processes_whatever_they_do():
    pool = executors.ProcessExecutor(2)
    results = pool.map(time.sleep, [0, 600, 600])
    next(results)
    pool.close()
    assert multiprocessing.active_children() == []


def test_processes_end_when_their_parent_is_killed(tmp_path):
    code = """
from dgmd_pipeline.workflow import executors
from tests_work import report
if __name__ == "__main__":
    list(executors.ProcessExecutor(2).map(report, [0, 1]))
"""
    (tmp_path / "tests_work.py").write_text(
        "import os, pathlib, time\n"
        "def report(n):\n    pathlib.Path(f'{n}.pid').write_text(str(os.getpid())); time.sleep(600)\n"
    )
    (tmp_path / "main.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment)
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    while not all(file.exists() and file.read_text() for file in files):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    children = [Path("/proc") / file.read_text() for file in files]
    deadline = time.monotonic() + 20
    while any(running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(process):
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except FileNotFoundError:
        return False


def test_threads_yield_in_order_and_take_the_pieces_as_they_are_needed():
    taken = []

    def pieces():
        for number in range(1000):
            taken.append(number)
            yield number

    results = executors.in_threads(lambda number: -number, pieces())
    assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
    assert len(taken) <= 5 + 2 * executors.cores()
    results.close()


def test_what_a_thread_raises_is_raised_where_its_result_is_asked_for():
    with pytest.raises(ZeroDivisionError):
        list(executors.in_threads(lambda number: 1 // number, [1, 0, 1]))
    result = executors.submit_in_background(lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            result()
    assert executors.submit_in_background(lambda: "done")() == "done"
