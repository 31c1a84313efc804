"""The heavy work on a real Dask scheduler and workers: results, checks and faults."""

import contextlib
import gc
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import boto3
import dask
import numpy as np
import pytest
from conftest import CREDENTIALS, ROOT, environment_with, picture, run_pipeline
from support import work
from support.dask_cluster import cluster, contents
from support.tcp_proxy import proxy

from dgmd_pipeline import settings
from dgmd_pipeline.commands import demo
from dgmd_pipeline.errors import NoUsableInput, PipelineError, SettingsError, TooLittleMemory, WorkerDied
from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3 import client as s3_client
from dgmd_pipeline.s3 import download, listing
from dgmd_pipeline.tasks import LAST
from dgmd_pipeline.workflow import cluster as dask_executor
from dgmd_pipeline.workflow import lock, planning, runner
from dgmd_pipeline.workflow.executors import ProcessExecutor
from dgmd_pipeline.workflow.run_context import RunContext, activate

FAULTS = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": 1, "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s"}


@pytest.fixture(autouse=True)
def _failed_clients_are_collected():
    """Dask closes a client that could not connect when Python collects it: for ever, if another one starts then."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("dask"), **FAULTS) as found:
        yield found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with lock.hold(folder):
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


def test_memory_is_managed_as_on_one_machine(executor):
    """Dask's setting for its own processes would double the page faults of decoding."""
    assert list(executor.map(work.variable, ["MALLOC_TRIM_THRESHOLD_"])) == [None]


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


def wait_until(condition, seconds=180):
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
        PipelineError, match=rf"lost 2 times while they worked on items 9 to 12 of kill_worker_at.*{addresses}"
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


def test_the_memory_limit_of_a_worker_holds_for_its_items(executor, running):
    assert list(executor.map(work.allocate, [300_000_000])) == [300_000_000]
    with pytest.raises(TooLittleMemory, match="needs 450 MB of memory, and the worker processes may use 352 MB"):
        list(executor.map(work.allocate, [450_000_000]))


def test_an_item_that_is_ended_by_its_timer_says_so(executor):
    dead, two = executor.map(work.burn, [True, False], 2)
    assert (dead.by_timer, two) == (True, False)


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


FROZEN = {"BACKBONE": "MobileNetV3-Small", "BACKBONE_WEIGHTS": "none"}


@pytest.mark.parametrize(
    ("until", "steps", "more"),
    [
        ("convert", ["raw", "inspected", "tfrecord_training"], {}),
        pytest.param("extract", ["features_training"], FROZEN, marks=pytest.mark.slow),  # TensorFlow in each worker
    ],
)
def test_folders_are_those_of_a_local_run_though_a_worker_is_killed_in_each_step(
    until, steps, more, running, digits, tmp_path
):
    variables = {**digits, **more}
    local = run_pipeline(tmp_path, "run", "--until", until, **variables, DATA_DIR=tmp_path / "local")
    assert local.returncode == 0, local.stdout
    data_dir = tmp_path / "data"
    variables |= {"DASK_SCHEDULER_ADDRESS": running.address, "DATA_DIR": data_dir}
    run = run_pipeline(tmp_path, "run", "--until", until, start=True, **variables)
    lines, killed = [], []
    for line in run.stdout:
        lines.append(line)
        begins = re.search(r" (\w+) +\.\.\. ", line)
        if begins and (step := begins[1]) in steps:
            if step not in ("raw", "inspected"):  # their pieces are not seen
                attempts = f".draft-{step}/.resume/.*-*"
                wait_until(
                    partial(lambda pattern: any(data_dir.glob(pattern)) or run.poll() is not None, attempts), 300
                )
            wait_until(running.worker_processes)
            running.worker_processes()[0].kill()
            killed.append(step)
    assert run.wait() == 0, "".join(lines)
    assert killed == steps
    found, expected = contents(data_dir), contents(tmp_path / "local")
    assert set(found) == set(expected)
    for name, content in expected.items():
        if re.fullmatch(r"features_\w+/features-.*\.npy", name):
            arrays = (np.load(io.BytesIO(each)) for each in (found[name], content))
            np.testing.assert_allclose(*arrays, rtol=0, atol=1e-5)
        elif not (name.startswith("features_") and name.endswith("index.json")):  # it has their checksums
            assert found[name] == content, name
    assert "Dask cluster: " in lines[-1]
    assert json.loads((data_dir / "status.json").read_text())["dashboard"].startswith("http://127.0.0.1:")
    assert not [line for line in lines if "distributed" in line]


def connection(address, data_dir):
    return dask_executor.ClusterExecutor(address, data_dir, settings.provide_worker_defaults)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("threads", r"has 2 threads. Start it with `--nthreads 1`"),
        ("code", r"has code of dgmd_pipeline \w+, and the run has code of dgmd_pipeline \w+. Start the worker with"),
        ("package", r"cannot run this pipeline \(.*No module named 'dgmd_pipeline"),
        ("disk", r"cannot use DATA_DIR: .*No such file.* Give the worker the disk of the run at the same path"),
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
        # A missing package would be found by the finder of an editable installation.
        missing = "raise ModuleNotFoundError(\"No module named 'dgmd_pipeline'\")\n"
        (tmp_path / "dgmd_pipeline" / "__init__.py").write_text(missing)
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


def test_an_address_without_tls_where_dask_requires_it_is_explained(data_dir):
    problem = r"tcp://127.0.0.1:9 \(DASK.*cannot be reached: encryption required"
    required = dask.config.set({"distributed.comm.require-encryption": True})
    with required, pytest.raises(PipelineError, match=problem):
        connection("tcp://127.0.0.1:9", data_dir).connect()


def test_a_cluster_without_scheduler_or_workers_is_explained(tmp_path, data_dir):
    short = {"distributed.comm.timeouts.connect": "1s", "distributed.scheduler.no-workers-timeout": "1s"}
    with cluster(tmp_path, workers=0) as empty, dask.config.set(short):
        for address, problem in (
            (empty.address, f"scheduler at {empty.address} has had no worker for 1 s"),
            ("tcp://127.0.0.1:9", r"tcp://127.0.0.1:9 \(DASK_SCHEDULER_ADDRESS\) cannot be reached"),
        ):
            with pytest.raises(PipelineError, match=problem):
                connection(address, data_dir).connect()


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_network_that_drops_everything_between_the_run_and_the_scheduler(
    for_ever, running, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(dask_executor, "MAX_LOSSES", 2 if for_ever else 1000)
    monkeypatch.setattr(dask_executor, "POLL", 0.1)
    monkeypatch.setattr(dask_executor, "ANSWER_TIMEOUT", 1)
    go = tmp_path / "go"
    with (
        proxy(running.address) as (address, flowing),
        ThreadPoolExecutor(1) as thread,
        contextlib.closing(connection(address, data_dir)) as executor,
    ):
        results = thread.submit(list, executor.map(work.wait_for, 4 * [go]))
        wait_until(lambda: begun(go) >= 1)
        flowing.clear()
        go.touch()
        if for_ever:
            with pytest.raises(PipelineError, match=f"connection to the Dask scheduler at {address} is lost"):
                results.result()
        else:
            wait_until(lambda: executor._unanswered)
            flowing.set()
            assert results.result() == 4 * ["go"]
    with contextlib.closing(connection(running.address, data_dir)) as following:
        assert list(following.map(work.square, range(4))) == [0, 1, 4, 9]


def test_a_network_that_drops_everything_between_a_worker_and_the_scheduler(executor, running, tmp_path):
    go = tmp_path / "go"
    with proxy(running.address) as (address, flowing), ThreadPoolExecutor(1) as thread:
        wait_until(lambda: len(executor._client.nthreads()) == 2)
        worker = running.start_worker("--no-nanny", address=address)
        try:
            wait_until(lambda: len(executor._client.nthreads()) == 3)
            results = thread.submit(list, executor.map(work.wait_for, 6 * [go]))
            wait_until(lambda: begun(go) == 3)
            flowing.clear()
            wait_until(lambda: len(executor._client.nthreads()) == 2)  # after worker-ttl
            go.touch()
            assert results.result() == 6 * ["go"]
            assert begun(go) > 6
        finally:
            go.touch()
            running.workers.remove(worker)
            worker.kill()
            worker.wait()


def test_a_scheduler_that_is_restarted_costs_nothing(executor, running, tmp_path, caplog):
    go = tmp_path / "go"
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, executor.map(work.wait_for, 4 * [go]))
        wait_until(lambda: begun(go) >= 1)
        running.kill_scheduler()
        go.touch()
        running.start_again()
        assert results.result() == 4 * ["go"]
    assert "The Dask scheduler was restarted or could not be reached" in caplog.text


def test_a_scheduler_that_stays_away_stops_the_run(executor, running, tmp_path):
    go = tmp_path / "go"
    executor._client._timeout = 1
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, executor.map(work.wait_for, 4 * [go]))
        wait_until(lambda: begun(go) >= 1)
        running.kill_scheduler()
        with pytest.raises(PipelineError, match=f"The connection to the Dask scheduler at {running.address} is lost"):
            results.result()


class Recorder(ProcessExecutor):
    """Keeps what a cluster would be sent."""

    is_cluster = True

    def __init__(self):
        super().__init__(1)
        self.sent = {}

    def map(self, function, items, chunk=1):
        items = list(items)
        name = getattr(function, "func", function).__name__
        self.sent[name] = pickle.dumps((function, items))
        return super().map(function, items, chunk)


def test_no_secret_is_sent(digits, monkeypatch, tmp_path):
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "s3cr3t-1",
        "AWS_SESSION_TOKEN": "s3cr3t-2",
        "NOTIFY_URL": "http://h/s3cr3t-3",
    }
    uri = {"MLFLOW_TRACKING_URI": "http://me:s3cr3t-4@127.0.0.1:9"}
    for name, value in {**digits, **secrets, **uri, "DATA_DIR": tmp_path / "data"}.items():
        monkeypatch.setenv(name, str(value))
    recorder, values = Recorder(), settings.load()
    with lock.hold(values.data_dir), activate(RunContext(values, recorder)) as context:
        runner.run_steps(planning.select_steps(planning.upstream_steps(LAST()), "convert"))
        recorder.close()
        assert context.result.failure is None
    assert set(recorder.sent) == {"download_chunk", "inspect_file", "write_piece"}
    recorder.sent["of all"] = pickle.dumps(settings.provide_worker_defaults)
    for sent in recorder.sent.values():
        assert not [value for value in (*secrets.values(), "s3cr3t", "tester") if value.encode() in sent]
    place = pickle.loads(recorder.sent["download_chunk"])[1][0].place
    assert place == (digits["AWS_ENDPOINT_URL"], "us-east-1", True)


def test_an_endpoint_with_a_password_is_not_sent(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:s3cr3t@127.0.0.1:9")
    assert s3_client.place(s3_client.connect()).endpoint is None
    default = s3_client.Place("http://127.0.0.1:8", "eu-west-1", False)
    assert s3_client.place(s3_client.connect(default=default)).endpoint is None  # its own environment counts
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert s3_client.place(s3_client.connect(default=default))[:2] == default[:2]


def test_a_worker_without_credentials_that_is_refused_says_so(digits, monkeypatch, tmp_path):
    place = s3_client.Place(digits["AWS_ENDPOINT_URL"], "us-east-1", True)
    (tmp_path / ".part").mkdir()
    size, tag = 4, "70ddcb9a3a3bde1dd9ed2aeba4f8a9e0"
    source = SourceObject("p/3/damaged.png", size, tag, "3/damaged.png")
    chunk = download.Chunk(place, "digits", [source], tmp_path, tmp_path / ".part")
    with pytest.raises(
        NoUsableInput, match=r"refuses s3://digits/p/3/damaged.png to the worker on .*, which has no AWS"
    ):
        download.download_chunk(chunk)


def test_the_same_chunk_may_be_downloaded_twice_at_the_same_time(digits, monkeypatch, tmp_path):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", digits["AWS_ENDPOINT_URL"])
    client = s3_client.connect()
    download._client.cache_clear()
    (tmp_path / ".part").mkdir()
    listed = [*listing.list_objects(client, "digits", "p", False).objects][:100]
    chunk = download.Chunk(s3_client.place(client), "digits", listed, tmp_path, tmp_path / ".part")
    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(download.download_chunk, [chunk, chunk])
    assert sorted(one) == sorted(two) == sorted(listed)
    assert {path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file()} == {each.size for each in listed}
    assert list((tmp_path / ".part").iterdir()) == []


@pytest.mark.parametrize(
    ("address", "warns"),
    [("tcp://127.0.0.1:1", False), ("tcp://10.1.2.3:1", False), ("tcp://[fd00::1]:1", False),
     ("tls://8.8.8.8:1", False), ("tcp://8.8.8.8:1", True), ("ws://[2001:4860:4860::8888]:1", True)],
)  # fmt: skip
def test_an_open_network_without_tls_is_a_warning(address, warns, caplog):
    dask_executor._warn_of_open_network(address)
    assert ("has no TLS and is not in a private network" in caplog.text) == warns


@pytest.mark.parametrize("address", ["dask-scheduler:8786", "http://host:8786", "tcp://host", "tcp://user:pass@host:1"])
def test_an_address_that_dask_does_not_accept_is_an_invalid_setting(address, monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
    with pytest.raises(SettingsError, match="DASK_SCHEDULER_ADDRESS=.*: expected tcp://host:port or tls://host:port"):
        settings.load()


def test_a_run_without_an_address_imports_nothing_of_dask(tmp_path):
    for label in ("anise", "cloves"):
        (tmp_path / "raw" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "raw" / label / f"{number}.png").write_bytes(picture(label, number))
    code = "import sys; from dgmd_pipeline.cli import main; code = main(['run', '--until', 'split'])\n"
    code += "assert code == 0 and not {'dask', 'distributed'} & set(sys.modules)"
    environment = environment_with({"DATA_DIR": tmp_path, "DASK_SCHEDULER_ADDRESS": ""})
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
