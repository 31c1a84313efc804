import http.server
import threading

import pytest

from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3 import client as s3_client
from dgmd_pipeline.s3 import download
from dgmd_pipeline.s3.crt import MAX_BYTES, MAX_FAILURES, Transfer


@pytest.fixture
def asked(monkeypatch, s3_endpoint):
    """A client, and the keys that botocore has asked for."""
    for name, value in {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    client, keys = s3_client.connect(), []
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: keys.append(request.url))
    return client, keys


def fill(bucket_and_client, contents):
    name, client = bucket_and_client
    for path, content in contents.items():
        client.put_object(Bucket=name, Key=f"p/{path}", Body=content)
    return name, [SourceObject(f"p/{path}", len(content), "", path) for path, content in contents.items()]


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_botocore_shows_the_way_and_the_others_follow_without_it(asked, bucket, tmp_path):
    client, keys = asked
    contents = {f"jar 1/{number} + ü~(&).png": b"%d" % number for number in range(60)}
    contents |= {"jar 1/empty": b"", "large": bytes(range(256)) * 40_000}
    name, objects = fill(bucket, contents)
    assert set(download.download(client, name, objects, tmp_path / "raw", threads=2)) == set(objects)
    assert read(tmp_path / "raw") == contents
    assert 1 <= len(keys) < 10


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_where_there_is_a_proxy_all_is_left_to_botocore(asked, bucket, tmp_path, monkeypatch, s3_endpoint, variable):
    name, objects = fill(bucket, {f"a/{number}": b"abc" for number in range(12)})
    monkeypatch.setenv(variable, s3_endpoint)  # a server that answers absolute addresses, too
    client, keys = s3_client.connect(), []
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: keys.append(request.url))
    assert set(download.download(client, name, objects, tmp_path / "raw", threads=2)) == set(objects)
    assert len(keys) == 12


@pytest.mark.parametrize("keys", [{}, {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "x"}])
def test_requests_are_signed_only_where_botocore_signs_them(server, tmp_path, monkeypatch, keys):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    objects = [SourceObject(f"a/{number}", 3, "", f"a/{number}") for number in range(12)]
    assert set(download.download(s3_client.connect(), "pictures", objects, tmp_path / "raw", threads=1)) == set(objects)
    own = [headers for headers in server.seen if "Boto3" not in headers["User-Agent"]]
    assert len(own) == 11
    assert all(("Authorization" in headers) == bool(keys) for headers in server.seen)


def test_what_is_not_what_its_checksum_says_is_left_to_botocore(server, tmp_path):
    server.checksum = "NSRBwg=="  # CRC-32 of abc
    objects = [SourceObject(f"a/{number}", 3, "", f"a/{number}") for number in range(4)]
    server.damaged = {"/pictures/a/2"}
    done = set(download.download(s3_client.connect(), "pictures", objects, tmp_path / "raw", threads=1))
    assert done == set(objects)
    assert read(tmp_path / "raw") == {f"a/{number}": b"abc" for number in range(4)}
    assert ["Boto3" in headers["User-Agent"] for headers in server.seen] == [True, False, False, True, False]


def fly(transfer, key, size, path):
    """Fetch an object by awscrt and return whether that worked."""
    over = threading.Event()
    flight = transfer.start(key, size, path, over.set)
    assert over.wait(20)
    return transfer.worked(flight)


def test_what_it_cannot_fetch_is_left_to_botocore_and_after_a_while_everything(asked, bucket, tmp_path):
    client, _ = asked
    name, _ = fill(bucket, {"a/1": b"abc"})
    transfer = Transfer(client)
    assert not transfer.decided and not transfer.takes(3)  # it has not been shown yet
    client.get_object(Bucket=name, Key="p/a/1")["Body"].read()
    transfer.learn("p/a/1")
    assert transfer.decided and transfer.takes(3) and not transfer.takes(0) and not transfer.takes(MAX_BYTES + 1)
    for _ in range(MAX_FAILURES - 1):
        assert not fly(transfer, "p/a/gone", 3, tmp_path / "part")
    assert fly(transfer, "p/a/1", 3, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == b"abc"
    for _ in range(MAX_FAILURES):
        assert transfer.takes(3)
        assert not fly(transfer, "p/a/gone", 3, tmp_path / "part")
    assert transfer.decided and not transfer.takes(3)


def test_a_flight_that_is_called_off_lands_as_one_that_did_not_work(server, tmp_path):
    client = s3_client.connect()
    transfer, over = Transfer(client), threading.Event()
    client.get_object(Bucket="pictures", Key="first")["Body"].read()
    transfer.learn("first")
    flight = transfer.start("silent", 3, tmp_path / "part", over.set)
    assert not over.wait(0.5)
    flight.cancel()
    assert over.wait(20)
    assert not transfer.worked(flight)


def test_a_download_that_is_stopped_calls_off_what_is_under_way(server, tmp_path):
    objects = [SourceObject(f"a/{name}", 3, "", f"a/{name}") for name in ("1", "2", "3", "silent")]
    items = download.download(s3_client.connect(), "pictures", objects, tmp_path / "raw", threads=2)
    done = {next(items).path for _ in range(3)}
    items.close()
    assert read(tmp_path / "raw") == dict.fromkeys(done, b"abc")


@pytest.fixture
def server(monkeypatch):
    """An endpoint where every object is `abc`, which notes the headers of requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.seen.append(self.headers)
            if self.path.endswith("silent"):
                server.silence.wait(30)
            self.send_response(200)
            self.send_header("Content-Length", "3")
            if server.checksum:
                self.send_header("x-amz-checksum-crc32", server.checksum)
            self.end_headers()
            self.wfile.write(b"abd" if self.path in server.damaged else b"abc")
            server.damaged.discard(self.path)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.damaged, server.checksum, server.silence = [], set(), None, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield server
    server.silence.set()
    server.shutdown()
