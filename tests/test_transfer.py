import threading

import pytest

from dgmd_pipeline import bucket
from dgmd_pipeline.manifest import SourceObject


@pytest.fixture
def asked(monkeypatch, s3_endpoint):
    """A client, and the keys that botocore has asked for."""
    for name, value in {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    client, keys = bucket.connect(), []
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
    from dgmd_pipeline.bucket import download

    client, keys = asked
    contents = {f"jar 1/{number} + ü~(&).png": b"%d" % number for number in range(60)}
    contents |= {"jar 1/empty": b"", "large": bytes(range(256)) * 80_000}  # 20 MB come in parts
    name, objects = fill(bucket, contents)
    assert set(download(client, name, objects, tmp_path / "raw", threads=2)) == set(objects)
    assert read(tmp_path / "raw") == contents
    assert 1 <= len(keys) < 10


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_where_there_is_a_proxy_all_is_left_to_botocore(asked, bucket, tmp_path, monkeypatch, s3_endpoint, variable):
    from dgmd_pipeline.bucket import connect, download

    name, objects = fill(bucket, {f"a/{number}": b"abc" for number in range(12)})
    monkeypatch.setenv(variable, s3_endpoint)  # a server that answers absolute addresses, too
    client, keys = connect(), []
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: keys.append(request.url))
    assert set(download(client, name, objects, tmp_path / "raw", threads=2)) == set(objects)
    assert len(keys) == 12


def test_an_anonymous_request_stays_anonymous(bucket, tmp_path, monkeypatch, s3_endpoint):
    from dgmd_pipeline.bucket import connect, download

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    name, objects = fill(bucket, {f"a/{number}": b"abc" for number in range(12)})
    bucket[1].put_bucket_acl(Bucket=name, ACL="public-read")
    for number in range(12):
        bucket[1].put_object_acl(Bucket=name, Key=f"p/a/{number}", ACL="public-read")
    done = list(download(connect(), name, objects, tmp_path / "raw", threads=1))
    assert set(done) == set(objects)


def test_what_it_cannot_fetch_is_left_to_botocore_and_after_a_while_everything(asked, bucket, tmp_path):
    from dgmd_pipeline.transfer import FAILURES, Transfer

    client, _ = asked
    name, _ = fill(bucket, {"a/1": b"abc"})
    transfer = Transfer(client)
    assert not transfer.fetch("p/a/1", tmp_path / "part", lambda: False)  # it has not been shown yet
    client.get_object(Bucket=name, Key="p/a/1")["Body"].read()
    transfer.learn("p/a/1")
    for _ in range(FAILURES - 1):
        assert not transfer.fetch("p/a/gone", tmp_path / "part", lambda: False)
    assert transfer.fetch("p/a/1", tmp_path / "part", lambda: False)
    assert (tmp_path / "part").read_bytes() == b"abc"
    for _ in range(FAILURES):
        assert not transfer.fetch("p/a/gone", tmp_path / "part", lambda: False)
    assert not transfer.fetch("p/a/1", tmp_path / "part", lambda: False)


def test_a_transfer_that_is_stopped_lets_go(s3_that_is_silent, monkeypatch, tmp_path):
    from dgmd_pipeline.transfer import Transfer

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_that_is_silent)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    client = bucket.connect()
    transfer = Transfer(client)
    client.get_object(Bucket="b", Key="first")["Body"].read()
    transfer.learn("first")
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert not transfer.fetch("silent", tmp_path / "part", stop.is_set)


@pytest.fixture
def s3_that_is_silent():
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith("silent"):
                silence.wait(30)
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"abc")

        def log_message(self, *_):
            pass

    silence = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    silence.set()
    server.shutdown()
