"""The heavy work on a real Dask scheduler and workers: results, checks and faults."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from support import work
from support.dask_cluster import cluster

from dgmd_pipeline.errors import WorkerDied
from dgmd_pipeline.workflow import cluster as dask_executor
from dgmd_pipeline.workflow import folders

FAULTS = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": 1, "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("dask"), **FAULTS) as found:
        yield found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with folders.lock(folder):
        yield folder


@pytest.fixture
def executor(running, data_dir):
    executor = dask_executor.ClusterExecutor(running.address, data_dir, work.nothing)
    executor.connect()
    yield executor
    executor.close()


def test_results_come_in_order_and_workers_are_shown(executor, running):
    assert list(executor.map(work.square, range(100), 7)) == [number * number for number in range(100)]
    assert executor.describe() in ("1 worker", "2 workers")
    assert "s of work" in executor.usage()
    assert executor.dashboard.startswith("http://127.0.0.1:")


def test_items_are_taken_as_they_are_needed(executor):
    taken = []

    def items():
        for number in range(10_000):
            taken.append(number)
            yield number

    results = executor.map(work.square, items(), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(taken) <= 5 + 2 * 2 * dask_executor.PIECES_OF_A_WORKER
    results.close()


def test_what_the_work_raises_comes_through_with_its_traceback(executor):
    with pytest.raises(ValueError, match="not 0") as raised:
        list(executor.map(work.fail, range(100), 7))
    assert "in fail" in raised.value.__notes__[0]


def test_an_item_whose_process_dies_twice_costs_this_item_only(executor, tmp_path):
    results = list(executor.map(partial(work.die_at, bad=5, folder=tmp_path), range(12), 4))
    assert isinstance(results[5], WorkerDied)
    assert str(results[5]) == "the process was ended by SIGKILL, most likely because memory ran out"
    assert results[:5] + results[6:] == [*range(5), *range(6, 12)]
    assert (tmp_path / "5").read_text() == "xx"


def begun(go):
    """How many pieces of `work.wait_for` have begun."""
    file = go.with_suffix(".begun")
    return len(file.read_text()) if file.exists() else 0


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_is_killed_costs_nothing(executor, running, tmp_path):
    go = tmp_path / "go"
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, executor.map(work.wait_for, 8 * [go]))
        wait_until(lambda: begun(go) == 2)
        running.worker_processes()[0].kill()
        wait_until(lambda: begun(go) == 3)
        go.touch()
        assert results.result() == 8 * ["go"]
