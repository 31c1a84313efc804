import threading
from collections import Counter

import pytest
from support.http_server import send
from support.s3 import send_error, send_listing, sources

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import crt, throttling
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.download import download
from dgmd_pipeline.s3.listing import list_objects
from dgmd_pipeline.s3.throttling import Gate

pytestmark = pytest.mark.usefixtures("aws_home", "signed")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(throttling, "FIRST_INTERVAL", 0.001)
    monkeypatch.setattr(throttling, "LONGEST_INTERVAL", 0.01)
    monkeypatch.setattr(crt, "STALL_TIMEOUT", 0.5)  # awscrt itself repeats requests for 15 s
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


class Throttled:
    """An endpoint that answers "slow down" to a request if `throttles(key)` is true."""

    def __init__(self, throttles):
        self.throttles, self.agents, self.requests = throttles, [], Counter()
        self._lock = threading.Lock()

    def __call__(self, request, key, query):
        with self._lock:
            self.requests[key] += 1
            self.agents.append(request.headers["User-Agent"])
            throttles = self.throttles(key)
        if throttles == 429:
            send(request, 429)
        elif throttles:
            send_error(request, 503, "SlowDown")
        elif "list-type" in query:
            send_listing(request, ["train/cat/1.png"])
        else:
            send(request, 200, b"abc")


def first(count, answer=503):
    """Throttle the first requests."""
    left = iter([answer] * count)
    return lambda _key: next(left, False)


@pytest.mark.parametrize("answer", [503, 429])
def test_requests_are_repeated_while_s3_throttles_and_this_is_logged_once(fake_s3, tmp_path, caplog, answer):
    endpoint = fake_s3(Throttled(first(40, answer)))
    (listed,) = list_objects(connect(), "images", "train").objects
    fake_s3(Throttled(first(40, answer)))
    assert list(download(connect(), "images", [listed], tmp_path)) == [listed]
    said = "503 SlowDown" if answer == 503 else "429"
    host = endpoint.removeprefix("http://")
    assert len(caplog.messages) == 2  # by the listing and by the download
    assert caplog.messages[0] == f"  S3 is throttling: {host} answers {said}. Requests are sent at a lower rate."


def test_awscrt_is_used_again_after_the_throttling(fake_s3, tmp_path):
    calls = [0]

    def throttles(_key):
        calls[0] += 1
        return 5 < calls[0] < 60

    server = Throttled(throttles)
    fake_s3(server)
    objects = sources(*(f"cat/{number}" for number in range(120)))
    assert set(download(connect(), "images", objects, tmp_path, threads=8)) == set(objects)
    assert ["Boto3" in agent for agent in server.agents[-20:]].count(False) > 10


@pytest.mark.parametrize("remaining", [True, False])
def test_without_any_other_answer_the_download_stops_unless_all_objects_have_been_tried(
    monkeypatch, fake_s3, tmp_path, remaining
):
    monkeypatch.setattr(throttling, "PATIENCE", 0.3)
    fake_s3(Throttled(lambda key: key != "train/cat/1"))
    objects = sources(*(f"cat/{number}" for number in range(1, 7)))
    items = download(connect(), "images", objects, tmp_path, threads=2 if remaining else 6)
    assert next(items) == objects[0]
    if remaining:
        with pytest.raises(
            NoUsableInput, match=r"nothing but 'slow down' for 0\.3 s.*train/cat/\d .*503 SlowDown"
        ) as info:
            list(items)
        assert "AWS_ENDPOINT_URL" not in str(info.value)
    else:
        assert [(row.reason, row.detail) for row in items] == [("failed", "S3 answered 503 SlowDown: m")] * 5


def test_a_listing_without_any_other_answer_is_an_error_about_throttling(monkeypatch, fake_s3):
    monkeypatch.setattr(throttling, "PATIENCE", 0.1)
    fake_s3(Throttled(lambda _key: True))
    with pytest.raises(
        NoUsableInput, match=r"nothing but 'slow down' for 0\.1 s: s3://images/ \(503 SlowDown\)"
    ) as info:
        list_objects(connect(), "images", "train")
    assert "AWS_ENDPOINT_URL" not in str(info.value)


def test_an_object_that_is_always_throttled_while_others_are_not_is_set_aside(monkeypatch, fake_s3, tmp_path):
    monkeypatch.setattr(throttling, "MAX_ATTEMPTS", 8)
    server = Throttled(lambda key: key == "train/cat/0")
    fake_s3(server)
    objects = sources(*(f"cat/{number}" for number in range(300)))
    items = list(download(connect(), "images", objects, tmp_path, threads=4))
    assert {item for item in items if isinstance(item, SourceObject)} == set(objects[1:])
    assert [row.path for row in items if isinstance(row, Rejected)] == ["train/cat/0"]
    assert server.requests["train/cat/0"] == 8


@pytest.mark.parametrize(("mode", "attempts"), [("legacy", 7), ("adaptive", 2), ("standard", 12)])
def test_the_variables_of_botocore_for_retries_keep_their_meaning(monkeypatch, fake_s3, mode, attempts):
    monkeypatch.setenv("AWS_RETRY_MODE", mode)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(attempts))
    retries = connect().meta.config.retries
    assert (retries["mode"], retries["total_max_attempts"]) == (mode, attempts)


def test_an_invalid_retry_mode_is_an_error(monkeypatch):
    monkeypatch.setenv("AWS_RETRY_MODE", "eager")
    with pytest.raises(NoUsableInput, match="eager"):
        connect()


def test_the_interval_between_requests_doubles_and_then_shrinks_to_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throttling, "monotonic", lambda: now[0])
    gate = Gate("s3", threading.Event())
    assert gate.is_open
    intervals = []
    for _ in range(12):
        now[0] += 1
        gate.slow_down("503")
        intervals.append(gate._interval)
    assert intervals[:3] == [0.001, 0.002, 0.004]
    assert intervals[-1] == 0.01
    gate.slow_down("503")  # the answer to a request that was sent before the last increase
    assert gate._interval == 0.01
    assert not gate.exhausted
    now[0] += throttling.PATIENCE
    assert gate.exhausted
    gate.accepted()
    assert not gate.exhausted
    assert 0 < gate._interval < 0.01
    for _ in range(20):
        gate.accepted()
    assert gate.is_open
