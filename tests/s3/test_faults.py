"""An S3 server that answers one request in twenty wrongly: no object is lost, wrong or fetched twice.

`FAULTY_OBJECTS=2000 pytest tests/s3/test_faults.py` does it with more objects than the suite has time for.
"""

import base64
import hashlib
import os
import random
import zlib

import pytest
from support.http_server import reset, send
from support.s3 import read_files, send_error

from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.download import download

pytestmark = pytest.mark.usefixtures("aws_home", "signed")
OBJECTS = int(os.environ.get("FAULTY_OBJECTS", "150"))
SHARE = 0.05  # of the answers is wrong


def break_off(request, body, headers):
    send(request, 200, body[: len(body) // 2], length=len(body), **headers)


def flip_a_byte(request, body, headers):
    send(request, 200, body[:7] + bytes([body[7] ^ 1]) + body[8:], **headers)


def leave_out_the_end(request, body, headers):
    send(request, 200, body[:-9], **headers)


def send_another_object(request, body, headers):
    other = b"x" * len(body)
    send(request, 200, other, **headers_of(other, "x_amz_checksum_crc32" in headers))


FAULTS = {
    "reset": lambda request, _body, _headers: reset(request),
    "broken off": break_off,
    "flipped byte": flip_a_byte,
    "short": leave_out_the_end,
    "another object": send_another_object,
    "500": lambda request, _body, _headers: send_error(request, 500, "InternalError"),
    "503": lambda request, _body, _headers: send_error(request, 503, "SlowDown"),
    "429": lambda request, _body, _headers: send(request, 429),
}


def md5(body):
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def headers_of(body, with_checksum):
    headers = {"ETag": f'"{md5(body)}"'}
    if with_checksum:
        headers["x_amz_checksum_crc32"] = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    return headers


@pytest.mark.parametrize("with_checksum", [True, False], ids=["checksums", "no checksums"])
@pytest.mark.parametrize("kinds", [*([kind] for kind in FAULTS), [*FAULTS]], ids=[*FAULTS, "all"])
def test_no_object_is_lost_or_wrong_or_fetched_twice(fake_s3, tmp_path, kinds, with_checksum):
    source = random.Random(1)
    contents = {f"label {number % 3}/{number}": source.randbytes(500 + number) for number in range(OBJECTS)}
    faults = [0]

    def answer(request, key, _query):
        body = contents[key.removeprefix("p/")]
        headers = headers_of(body, with_checksum)
        if source.random() < SHARE:
            faults[0] += 1
            FAULTS[source.choice(kinds)](request, body, headers)
        else:
            send(request, 200, body, **headers)

    fake_s3(answer)
    listed = [SourceObject(f"p/{p}", len(body), md5(body), p) for p, body in contents.items()]
    items = list(download(connect(), "images", listed, tmp_path / "raw"))
    print(f"{len(items)} objects, {faults[0]} faults")
    assert sorted(items) == sorted(listed)
    assert read_files(tmp_path / "raw") == contents
    assert faults[0]
