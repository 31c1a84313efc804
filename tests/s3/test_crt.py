import threading

import pytest
from support.http_server import send
from support.s3 import KEYS, read_files, send_error, sources, upload

from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3 import throttling
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.crt import MAX_BYTES, MAX_FAILURES, CrtTransfer
from dgmd_pipeline.s3.download import download
from dgmd_pipeline.s3.transfer import ATTEMPTS

pytestmark = pytest.mark.usefixtures("aws_home")


def botocore_requests(client):
    """The URLs of the GetObject requests that botocore sends, in a list that grows."""
    urls = []
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: urls.append(request.url))
    return urls


def test_after_botocore_s_first_object_awscrt_fetches_the_others(s3_client, bucket, tmp_path):
    contents = {f"jar 1/{number} + ü~(&).png": b"%d" % number for number in range(60)}
    contents |= {"jar 1/empty": b"", "large": bytes(range(256)) * 40_000}
    name = upload(bucket, {f"p/{path}": content for path, content in contents.items()})
    objects = [SourceObject(f"p/{path}", len(content), "", path) for path, content in contents.items()]
    requests = botocore_requests(s3_client)
    assert set(download(s3_client, name, objects, tmp_path / "raw", threads=2)) == set(objects)
    assert read_files(tmp_path / "raw") == contents
    assert 1 <= len(requests) < 10


@pytest.mark.usefixtures("signed")
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_with_a_proxy_botocore_fetches_all_objects(fake_s3, tmp_path, monkeypatch, variable):
    endpoint = fake_s3(lambda request, _key, _query: send(request, 200, b"abc"))
    monkeypatch.setenv(variable, endpoint)
    client = connect()
    requests = botocore_requests(client)
    objects = sources(*(f"a/{number}" for number in range(12)))
    assert set(download(client, "images", objects, tmp_path / "raw", threads=2)) == set(objects)
    assert len(requests) == 12


@pytest.mark.parametrize("keys", [{}, KEYS])
def test_awscrt_signs_requests_if_botocore_does(server, tmp_path, monkeypatch, keys):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    objects = sources(*(f"a/{number}" for number in range(12)))
    assert set(download(connect(), "images", objects, tmp_path / "raw", threads=1)) == set(objects)
    assert [is_by_botocore(headers) for headers in server.requests] == [True] + 11 * [False]
    assert all(("Authorization" in headers) == bool(keys) for headers in server.requests)


def test_botocore_fetches_an_object_again_whose_checksum_differs(server, tmp_path):
    server.checksum = "NSRBwg=="  # CRC-32 of abc
    server.damaged = {"train/a/2"}
    objects = sources(*(f"a/{number}" for number in range(4)))
    assert set(download(connect(), "images", objects, tmp_path / "raw", threads=1)) == set(objects)
    assert read_files(tmp_path / "raw") == {f"a/{number}": b"abc" for number in range(4)}
    assert [is_by_botocore(headers) for headers in server.requests] == [True, False, False, True, False]


@pytest.mark.parametrize("refused", [False, True])
def test_awscrt_is_not_used_again_if_it_fails_in_a_row_where_botocore_succeeds(server, tmp_path, refused):
    server.refused_to = "refused" if refused else "awscrt"
    objects = sources("a/first", *(f"a/refused {number}" for number in range(MAX_FAILURES)), "a/8", "a/9")
    items = list(download(connect(), "images", objects, tmp_path / "raw", threads=1))
    assert len([item for item in items if item in objects]) == (3 if refused else len(objects))
    assert [is_by_botocore(headers) for headers in server.requests][-2:] == [not refused] * 2


@pytest.mark.usefixtures("server")
def test_objects_that_awscrt_cannot_fetch_are_not_given_to_it(tmp_path):
    objects = [*sources("a/first"), *sources("a/empty", size=0), *sources("a/large", size=MAX_BYTES + 1)]
    client = connect()
    requests = botocore_requests(client)
    items = list(download(client, "images", objects, tmp_path, threads=1))
    assert [item.reason for item in items[1:]] == ["changed", "changed"]  # all objects of this server have 3 bytes
    assert len(requests) == 1 + 2 * ATTEMPTS


def test_a_cancelled_transfer_completes_as_a_failed_one(server, tmp_path):
    client, completed = connect(), threading.Event()
    with throttling.gate(client) as gate:
        transfer = CrtTransfer(client, "images", gate)
        client.get_object(Bucket="images", Key="train/first")["Body"].read()
        transfer.adopt("train/first")
        pending = transfer.start(*sources("silent"), tmp_path / "part", completed.set)
        assert server.asked_for_silent.wait(20)
        assert not completed.is_set()
        pending.cancel()
        assert completed.wait(20)
        assert not transfer.is_complete(pending)


def test_stopping_a_download_cancels_transfers_in_progress(server, tmp_path):
    items = download(connect(), "images", sources("a/1", "a/2", "a/3", "a/silent"), tmp_path / "raw", threads=2)
    fetched = {next(items).path for _ in range(3)}
    items.close()
    assert read_files(tmp_path / "raw") == dict.fromkeys(fetched, b"abc")


def is_by_botocore(headers):
    return "Boto3" in headers["User-Agent"]


class Server:
    """Every object is `abc`; the object `silent` is not sent until the end of the test."""

    def __init__(self):
        self.requests = []  # their headers
        self.checksum = None
        self.damaged = set()  # keys that are sent damaged once
        self.refused_to = None  # "awscrt", or everybody
        self.asked_for_silent, self.finished = threading.Event(), threading.Event()

    def answer(self, request, key, _query):
        self.requests.append(request.headers)
        if key.endswith("silent"):
            self.asked_for_silent.set()
            self.finished.wait(30)
        if (
            "refused" in key
            and self.refused_to
            and not (self.refused_to == "awscrt" and is_by_botocore(request.headers))
        ):
            send_error(request, 403, "AccessDenied")
            return
        checksum = {"x_amz_checksum_crc32": self.checksum} if self.checksum else {}
        send(request, 200, b"abd" if key in self.damaged else b"abc", **checksum)
        self.damaged.discard(key)


@pytest.fixture
def server(fake_s3):
    server = Server()
    fake_s3(server.answer)
    yield server
    server.finished.set()
