import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT

from dgmd_pipeline.data import limits
from dgmd_pipeline.errors import PipelineError, TooLittleMemory, WorkerDied
from dgmd_pipeline.workflow import executors, machine
from dgmd_pipeline.workflow.worker import Budget, reserve_memory


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


def test_a_traceback_of_the_worker_comes_with_the_exception(pool):
    with pytest.raises(ValueError) as raised:
        list(pool.map(fail, [3]))
    assert "in fail" in raised.value.__notes__[0]


class Fails:
    """An item that cannot be unpickled."""

    def __reduce__(self):
        return fail, (7,)


def return_a_function(_):
    return lambda: None


def test_items_and_results_that_cannot_be_sent_are_errors(pool):
    with pytest.raises(ValueError, match="not 7"):
        list(pool.map(square, [1, 2, Fails()], 3))
    with pytest.raises(Exception, match="pickle"):
        list(pool.map(return_a_function, range(3), 3))
    assert list(pool.map(square, [3])) == [9]


@pytest.mark.parametrize("chunk", [1, 4])
def test_an_item_whose_process_dies_twice_costs_this_item_only(chunk, pool, tmp_path):
    results = list(pool.map(partial(die_at, folder=tmp_path, numbers=(5, 6), number_of_signal=9), range(12), chunk))
    dead = {index: result for index, result in enumerate(results) if isinstance(result, WorkerDied)}
    assert list(dead) == [5, 6]
    assert str(dead[5]) == "the process was ended by SIGKILL, most likely because memory ran out"
    assert [result for index, result in enumerate(results) if index not in dead] == [0, 1, 2, 3, 4, *range(7, 12)]
    assert set(attempts(tmp_path).values()) <= {2, 3}  # one of them may have been ended because of the other


def test_an_item_whose_process_dies_once_is_tried_again_alone(pool, tmp_path):
    assert list(pool.map(partial(die_once, folder=tmp_path), range(12), 3)) == list(range(12))
    assert list(pool.map(square, range(3))) == [0, 1, 4]


def test_an_item_that_is_ended_by_a_timer_is_not_tried_again(pool, tmp_path):
    function = partial(die_at, folder=tmp_path, numbers=(1,), number_of_signal=signal.SIGPROF)
    zero, dead, *rest = pool.map(function, range(4), 2)
    assert (zero, rest, dead.by_timer) == (0, [2, 3], True)
    assert attempts(tmp_path) == {1: 1}


def die_at(number, folder, numbers, number_of_signal):
    if number in numbers:
        with (folder / str(number)).open("a") as file:
            file.write("x")
        os.kill(os.getpid(), number_of_signal)
        time.sleep(60)
    return number


def attempts(folder):
    return {int(file.name): len(file.read_text()) for file in folder.iterdir()}


def die_once(number, folder):
    if number in (2, 7) and not (folder / str(number)).exists():
        (folder / str(number)).touch()
        os._exit(3)
    return number


def test_processes_that_do_not_start_are_explained(pool, monkeypatch):
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
    with pytest.raises(PipelineError, match="did not start: the process ended with exit code 1.*more memory"):
        list(pool.map(square, range(3)))


def test_as_many_processes_start_as_memory_and_work_allow():
    little, much = (executors.ProcessExecutor(8, memory) for memory in (500_000_000, 64_000_000_000))
    assert len(set(little.map(process_id, range(30)))) == 1
    assert len(set(much.map(process_id, range(3)))) == 3
    little.close()
    much.close()


@pytest.mark.parametrize(
    ("gigabytes", "cores", "processes"), [(1.5, 64, 2), (3, 2, 2), (4, 64, 7), (8, 64, 30), (64, 64, 64)]
)
def test_many_cores_leave_memory_for_the_largest_image(gigabytes, cores, processes):
    pool = executors.ProcessExecutor(cores, int(gigabytes * 1e9))
    assert pool._processes == processes
    assert pool._memory >= min(limits.MAX_MEMORY, gigabytes * 0.375e9)


# Memory


def test_memory_is_shared_in_turn():
    budget = Budget.of(10 * 16_000_000)
    order = []

    def take(name, memory):
        with budget.take(memory):
            order.append(name)

    with budget.take(9 * 16_000_000):
        threads = []
        for name, units in (("large", 10), ("small", 1)):  # the small one would fit earlier, and does not overtake
            threads.append(threading.Thread(target=take, args=(name, units * 16_000_000)))
            threads[-1].start()
            while select.select([budget.turn[0].fileno()], [], [], 0)[0]:
                time.sleep(0.01)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]
    with budget.take(10 * 16_000_000) as taken:
        assert taken == 10 * 16_000_000
    with pytest.raises(TooLittleMemory, match="needs 161 MB of memory, and the worker processes may use 160 MB"):
        budget.take(161_000_000).__enter__()
    budget.close()


def test_a_process_cannot_use_much_more_than_it_reserved(pool):
    assert list(pool.map(partial(allocate, reserved=16_000_000), [8_000_000])) == [8_000_000]
    with pytest.raises(MemoryError):
        list(pool.map(partial(allocate, reserved=16_000_000), [400_000_000]))
    assert list(pool.map(partial(allocate, reserved=420_000_000), [400_000_000])) == [400_000_000]
    assert allocate(400_000_000, 0) == 400_000_000  # not in a worker


def allocate(size, reserved):
    with reserve_memory(reserved):
        return len(bytearray(size))


def test_the_end_of_a_process_gives_its_memory_back():
    pool = executors.ProcessExecutor(1, 400_000_000)  # 110 MB for items
    zero, dead, two = pool.map(hold_and_die, range(3))
    pool.close()
    assert (zero, two) == (0, 2)
    assert isinstance(dead, WorkerDied)


def hold_and_die(number):
    with reserve_memory(90_000_000):
        if number == 1:
            die(number)
        return number


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
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
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
    assert len(taken) <= 5 + 2 * machine.cores()
    results.close()


def test_what_a_thread_raises_is_raised_where_its_result_is_asked_for():
    with pytest.raises(ZeroDivisionError):
        list(executors.in_threads(lambda number: 1 // number, [1, 0, 1]))
    result = executors.submit_in_background(lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            result()
    assert executors.submit_in_background(lambda: "done")() == "done"
