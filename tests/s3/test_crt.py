import threading

import pytest
from support.http_server import send
from support.s3 import KEYS, read_files, sources, upload

from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.crt import MAX_BYTES, MAX_FAILURES, CrtTransfer
from dgmd_pipeline.s3.download import download

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


def fetch(transfer, key, size, path):
    """Fetch an object by awscrt and return whether that succeeded."""
    completed = threading.Event()
    pending = transfer.start(key, size, path, completed.set)
    assert completed.wait(20)
    return transfer.is_complete(pending)


def test_awscrt_is_not_used_again_after_several_failures_in_a_row(s3_client, bucket, tmp_path):
    name = upload(bucket, {"p/a/1": b"abc"})
    transfer = CrtTransfer(s3_client)
    assert not transfer.decided and not transfer.accepts(3)  # botocore has fetched nothing yet
    s3_client.get_object(Bucket=name, Key="p/a/1")["Body"].read()
    transfer.adopt("p/a/1")
    assert transfer.decided and transfer.accepts(3) and not transfer.accepts(0) and not transfer.accepts(MAX_BYTES + 1)
    for _ in range(MAX_FAILURES - 1):
        assert not fetch(transfer, "p/a/gone", 3, tmp_path / "part")
    assert fetch(transfer, "p/a/1", 3, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == b"abc"
    for _ in range(MAX_FAILURES):
        assert transfer.accepts(3)
        assert not fetch(transfer, "p/a/gone", 3, tmp_path / "part")
    assert transfer.decided and not transfer.accepts(3)


def test_a_cancelled_transfer_completes_as_a_failed_one(server, tmp_path):
    client = connect()
    transfer, completed = CrtTransfer(client), threading.Event()
    client.get_object(Bucket="images", Key="first")["Body"].read()
    transfer.adopt("first")
    pending = transfer.start("silent", 3, tmp_path / "part", completed.set)
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
        self.asked_for_silent, self.finished = threading.Event(), threading.Event()

    def answer(self, request, key, _query):
        self.requests.append(request.headers)
        if key.endswith("silent"):
            self.asked_for_silent.set()
            self.finished.wait(30)
        checksum = {"x_amz_checksum_crc32": self.checksum} if self.checksum else {}
        send(request, 200, b"abd" if key in self.damaged else b"abc", **checksum)
        self.damaged.discard(key)


@pytest.fixture
def server(fake_s3):
    server = Server()
    fake_s3(server.answer)
    yield server
    server.finished.set()
