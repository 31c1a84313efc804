"""S3 clients, objects and endpoints for tests."""

import contextlib
import os
from urllib.parse import parse_qs, quote_plus, unquote, urlsplit

import pytest

from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3.client import connect
from support.http_server import send, serve

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI"}


@pytest.fixture
def aws_home(monkeypatch, tmp_path_factory):
    """An empty home folder, and an environment without AWS settings and proxies."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "BOTO_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return folder


@pytest.fixture
def signed(monkeypatch, aws_home):
    """Credentials in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3_client(s3_endpoint, monkeypatch, aws_home, signed):
    """The pipeline's client, connected to moto."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    return connect(8)


@pytest.fixture
def fake_s3(monkeypatch, aws_home):
    """Start an endpoint that answers as a test says, and set AWS_ENDPOINT_URL: `fake_s3(answer)`.

    Each request calls `answer(request, key, query)`.
    """
    with contextlib.ExitStack() as stack:

        def start(answer):
            def respond(request):
                url = urlsplit(request.path)
                key = unquote(url.path.lstrip("/")).partition("/")[2]
                answer(request, key, {name: values[0] for name, values in parse_qs(url.query).items()})

            endpoint = stack.enter_context(serve(respond))
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            return endpoint

        yield start


def send_error(request, status, code, extra=""):
    send(request, status, f"<Error><Code>{code}</Code><Message>m</Message>{extra}</Error>".encode())


def send_listing(request, keys, size=3):
    rest = f"<Size>{size}</Size><ETag>&quot;e&quot;</ETag>"
    contents = "".join(f"<Contents><Key>{quote_plus(key, safe='/')}</Key>{rest}</Contents>" for key in keys)
    body = f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{contents}"
    send(request, 200, f"{body}</ListBucketResult>".encode())


def upload(bucket, contents):
    """Fill conftest's `bucket` with `{key: content}` and return its name."""
    name, client = bucket
    for key, content in contents.items():
        client.put_object(Bucket=name, Key=key, Body=content)
    return name


def sources(*paths, prefix="train", size=3, etag="e"):
    """Objects as a listing contains them."""
    return [SourceObject(f"{prefix}/{path}", size, etag, path) for path in paths]


def read_files(folder):
    """Return `{path: content}` of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
