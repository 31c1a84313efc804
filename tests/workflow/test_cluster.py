"""The heavy work on a real Dask scheduler and workers: results, checks and faults."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import boto3
import dask
import pytest
from conftest import CREDENTIALS, ROOT, run_pipeline
from support import work
from support.dask_cluster import cluster

from dgmd_pipeline.commands import demo
from dgmd_pipeline.errors import PipelineError, WorkerDied
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
    executor = connection(running.address, data_dir)
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


def test_a_piece_whose_workers_are_lost_again_and_again_is_named(executor):
    addresses = "|".join(executor._client.nthreads())
    with pytest.raises(
        PipelineError, match=rf"worked on items 9 to 12 of kill_worker_at were lost, 2 of 2.*{addresses}"
    ):
        list(executor.map(partial(work.kill_worker_at, bad=9), range(12), 4))


def test_a_worker_that_hangs_costs_nothing(executor, running, tmp_path):
    go = tmp_path / "go"
    wait_until(lambda: len(running.worker_processes()) == 2)
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, executor.map(work.wait_for, 4 * [go]))
        wait_until(lambda: begun(go) == 2)
        running.worker_processes()[0].suspend()
        wait_until(lambda: begun(go) == 3)  # after worker-ttl
        go.touch()
        assert results.result() == 4 * ["go"]


DIGITS = 600


@pytest.fixture(scope="module")
def digits(s3_endpoint):
    """The variables of a run on 600 digits."""
    from sklearn.datasets import load_digits

    client = boto3.client("s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x")
    client.create_bucket(Bucket="digits")
    given = load_digits()
    for number, (image, label) in enumerate(zip(given.images[:DIGITS], given.target, strict=False)):
        extension, kind = demo.FORMATS[number % len(demo.FORMATS)]
        body = demo.encode_digit(image, 24 + 8 * (number % 6), kind)
        client.put_object(Bucket="digits", Key=f"p/{label}/{number}.{extension}", Body=body)
    client.put_object(Bucket="digits", Key="p/3/damaged.png", Body=b"\x89PNG")
    place = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_DATA_BUCKET": "digits", "AWS_DATA_PATH": "p"}
    return {**CREDENTIALS, **place, "BACKBONE": "cnn", "IMAGE_WIDTH": 32, "IMAGE_HEIGHT": 32, "NUM_SHARDS": 4}


def contents(data_dir):
    """The bytes of all files in step folders; of the records, what does not differ between two runs."""
    found = {}
    for path in sorted(path for path in data_dir.rglob("*") if path.is_file() and path.parent != data_dir):
        value = path.read_bytes()
        if path.name == "_SUCCESS":
            value = json.loads(value)
            del value["started"], value["seconds"]
        found[str(path.relative_to(data_dir))] = value
    return found


def test_folders_are_those_of_a_local_run_though_a_worker_is_killed_in_each_step(running, digits, tmp_path):
    local = run_pipeline(tmp_path, "run", "--until", "convert", **digits, DATA_DIR=tmp_path / "local")
    assert local.returncode == 0, local.stdout
    address = {"DASK_SCHEDULER_ADDRESS": running.address}
    variables = {**digits, **address, "DATA_DIR": tmp_path / "data"}
    run = run_pipeline(tmp_path, "run", "--until", "convert", start=True, **variables)
    lines, killed = [], []
    for line in run.stdout:
        lines.append(line)
        if line.endswith(" ...\n") and line.split()[-2] in ("raw", "inspected", "tfrecord_training"):
            time.sleep(0.5)
            wait_until(running.worker_processes)
            running.worker_processes()[0].kill()
            killed.append(line.split()[-2])
    assert run.wait() == 0, "".join(lines)
    assert killed == ["raw", "inspected", "tfrecord_training"]
    assert contents(tmp_path / "data") == contents(tmp_path / "local")
    assert "Dask cluster: " in lines[-1]
    assert json.loads((tmp_path / "data" / "status.json").read_text())["dashboard"].startswith("http://127.0.0.1:")
    assert not [line for line in lines if "distributed" in line]


def connection(address, data_dir):
    return dask_executor.ClusterExecutor(address, data_dir, work.nothing)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("threads", r"has 2 threads. Start it with `--nthreads 1`"),
        ("code", r"has code of dgmd_pipeline \w+, and the run has code of dgmd_pipeline \w+. Start it with the image"),
        ("package", r"cannot run this pipeline \(ModuleNotFoundError\(.*No module named 'dgmd_pipeline"),
        ("disk", r"cannot use DATA_DIR: .*No such file.* Give it the disk of the run at the same path"),
    ],
)
def test_a_worker_that_does_not_fit_is_named_before_the_first_step(bad, problem, running, executor, data_dir, tmp_path):
    options = {}
    if bad == "threads":
        options = {"threads": 2}
    elif bad == "code":
        shutil.copytree(ROOT / "dgmd_pipeline", tmp_path / "dgmd_pipeline")
        with (tmp_path / "dgmd_pipeline" / "labels.py").open("a") as file:
            file.write("# changed\n")
        options = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"}
    elif bad == "package":
        (tmp_path / "dgmd_pipeline").mkdir()
        (tmp_path / "dgmd_pipeline" / "__init__.py").touch()
        options = {"PYTHONPATH": tmp_path}
    else:
        script = 'mount -t tmpfs none "$1" || exit 77; shift; exec "$@"'
        options = {"before": ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", data_dir]}
    wait_until(lambda: len(executor._client.nthreads()) == 2)
    before = set(executor._client.nthreads())
    worker = running.start_worker("--no-nanny", **options)
    wait_until(lambda: worker.poll() is not None or set(executor._client.nthreads()) - before)
    if worker.poll() is not None:
        pytest.skip("no disk can be mounted here")
    (address,) = set(executor._client.nthreads()) - before
    try:
        with pytest.raises(PipelineError, match=f"^The Dask worker {address} {problem}"):
            connection(running.address, data_dir).connect()
        results = executor.map(time.sleep, 30 * [0.1])  # it joined after the check
        if bad == "package":  # it ends when it receives a piece
            assert list(results) == 30 * [None]
        else:
            with pytest.raises(PipelineError, match=f"^The Dask worker {address} {problem}"):
                list(results)
    finally:
        running.workers.remove(worker)
        worker.kill()
        worker.wait()
        wait_until(lambda: address not in executor._client.nthreads())
    assert [path.name for path in data_dir.iterdir()] == [".lock"]


def test_a_cluster_without_scheduler_or_workers_is_explained(tmp_path, data_dir):
    short = {"distributed.comm.timeouts.connect": "1s", "distributed.scheduler.no-workers-timeout": "1s"}
    with cluster(tmp_path, workers=0) as empty, dask.config.set(short):
        for address, problem in (
            (empty.address, f"scheduler at {empty.address} has had no worker for 1 s"),
            ("tcp://127.0.0.1:9", r"tcp://127.0.0.1:9 \(DASK_SCHEDULER_ADDRESS\) cannot be reached"),
        ):
            with pytest.raises(PipelineError, match=problem):
                connection(address, data_dir).connect()


def test_a_scheduler_that_is_restarted_costs_nothing(executor, running, tmp_path, caplog):
    go = tmp_path / "go"
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, executor.map(work.wait_for, 4 * [go]))
        wait_until(lambda: begun(go) >= 1)
        running.kill_scheduler()
        go.touch()
        running.start_again()
        assert results.result() == 4 * ["go"]
    assert "The Dask scheduler was restarted or out of reach." in caplog.text


def test_a_scheduler_that_stays_away_stops_the_run(executor, running, tmp_path):
    go = tmp_path / "go"
    executor._client._timeout = 1
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, executor.map(work.wait_for, 4 * [go]))
        wait_until(lambda: begun(go) >= 1)
        running.kill_scheduler()
        with pytest.raises(PipelineError, match=f"The connection to the Dask scheduler at {running.address} is lost"):
            results.result()
