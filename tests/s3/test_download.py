import hashlib
import re
import threading
from collections import Counter
from functools import partial

import pytest
from support.http_server import reset, send
from support.s3 import read_files, send_error, send_listing, sources, upload
from support.work import keep_writing

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import crt, sync, transfer
from dgmd_pipeline.s3 import download as download_module
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.download import download, download_chunk, download_in_chunks
from dgmd_pipeline.s3.listing import list_objects

pytestmark = pytest.mark.usefixtures("aws_home")


def send_abc(request, _key, _query):
    send(request, 200, b"abc")


def test_a_response_that_breaks_off_is_requested_again(fake_s3, tmp_path):
    requests = Counter()

    def answer(request, key, _query):
        requests[key] += 1
        send(request, 200, b"abc" if requests[key] > 1 else b"ab", length=3)

    fake_s3(answer)
    objects = sources("cat/1.png", "cat/2.png")
    assert set(download(connect(), "images", objects, tmp_path / "raw")) == set(objects)
    assert read_files(tmp_path / "raw") == {"cat/1.png": b"abc", "cat/2.png": b"abc"}
    assert set(requests.values()) <= {2, 3}


def test_objects_that_are_gone_archived_or_changed_are_rejected_and_the_others_downloaded(fake_s3, tmp_path):
    def answer(request, key, _query):
        if key.endswith("gone"):
            send_error(request, 404, "NoSuchKey")
        elif key.endswith("archived"):
            send_error(request, 403, "InvalidObjectState")
        else:
            send(request, 200, b"abcd" if key.endswith("changed") else b"abc")

    fake_s3(answer)
    paths = ["cat/gone", "cat/archived", "cat/changed", *(f"dog/{i}" for i in range(20))]
    items = list(download(connect(), "images", sources(*paths), tmp_path / "raw", threads=4))
    rejected = {row.reason: row for row in items if isinstance(row, Rejected)}
    assert rejected.keys() == {"gone", "archived", "changed"}
    assert rejected["changed"] == Rejected("train/cat/changed", "cat", "changed", "3 bytes when it was listed, now 4")
    assert {row.path for row in items if isinstance(row, SourceObject)} == set(paths[3:])
    assert read_files(tmp_path / "raw") == dict.fromkeys(paths[3:], b"abc")


def md5(body):
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def by_botocore_alone(monkeypatch, endpoint):
    """Make botocore fetch all objects: awscrt is not used with a proxy."""
    monkeypatch.setenv("HTTP_PROXY", endpoint)


WRONG = {  # answers to a request for b"abc", and what rejected.csv says
    "a flipped byte": ({"body": b"abd"}, f"the MD5 sum is {md5(b'abd')}, but the ETag is {md5(b'abc')}"),
    "another size": ({"body": b"abcd"}, "3 bytes when it was listed, now 4"),
    "a bad checksum": (
        {"body": b"abd", "x_amz_checksum_crc32": "NSRBwg=="},
        "Expected checksum NSRBwg== did not match",
    ),
    "another object": ({"ETag": "f", "x_amz_checksum_crc32": "NSRBwg=="}, f"the ETag was {md5(b'abc')} when it was"),
}
RIGHT = {  # answers that are not taken for wrong ones
    "the MD5 sum": {"ETag": md5(b"abc")},
    "a checksum": {"x_amz_checksum_crc32": "NSRBwg==", "ETag": f'W/"{md5(b"abc")}"'},
    "KMS": {"body": b"abd", "x_amz_server_side_encryption": "aws:kms"},
    "a customer's key": {"body": b"abd", "x_amz_server_side_encryption_customer_algorithm": "AES256"},
}


@pytest.mark.parametrize("by_botocore", [True, False])
def test_an_object_that_differs_is_fetched_again_and_then_set_aside_as_changed(
    monkeypatch, fake_s3, tmp_path, by_botocore
):
    requests, once = Counter(), "once "

    def answer(request, key, _query):
        requests[key] += 1
        kind = key.removeprefix("train/cat/").removeprefix(once)
        wrong = kind in WRONG and (once not in key or requests[key] == 1)
        headers = dict(WRONG[kind][0] if wrong else RIGHT.get(kind, {}))
        send(request, 200, headers.pop("body", b"abc"), **headers)

    endpoint = fake_s3(answer)
    if by_botocore:
        by_botocore_alone(monkeypatch, endpoint)
    good = sources(*(f"cat/{kind}" for kind in [*RIGHT, *(once + kind for kind in WRONG)]), etag=md5(b"abc"))
    wrong = sources(*(f"cat/{kind}" for kind in WRONG), etag=md5(b"abc"))
    items = list(download(connect(), "images", good + wrong, tmp_path / "raw", threads=2))
    assert {item for item in items if isinstance(item, SourceObject)} == set(good)
    rejected = {row.path.removeprefix("train/cat/"): row for row in items if isinstance(row, Rejected)}
    assert {row.reason for row in rejected.values()} == {"changed"}
    assert all(rejected[kind].detail.startswith(detail) for kind, (_, detail) in WRONG.items()), rejected
    assert all(requests[source.key] >= 4 for source in wrong)
    assert set(read_files(tmp_path / "raw")) == {source.path for source in good}
    assert read_files(tmp_path / "raw")["cat/once a flipped byte"] == b"abc"


@pytest.mark.parametrize("etag", [md5(b"other"), f"{md5(b'abc')}-2", "e", ""])
def test_an_etag_that_is_no_md5_sum_is_compared_with_that_of_the_response(fake_s3, tmp_path, etag):
    fake_s3(lambda request, _key, _query: send(request, 200, b"abc", ETag=f'"{etag}"'))
    (item,) = download(connect(), "images--x-s3", sources("cat/1.png", etag=etag), tmp_path / "raw")
    assert isinstance(item, SourceObject)
    fake_s3(lambda request, _key, _query: send(request, 200, b"abc", ETag='"other-1"'))
    (item,) = download(connect(), "images--x-s3", sources("cat/1.png", etag=etag), tmp_path / "raw")
    assert isinstance(item, Rejected) == bool(etag)


FAILURES = {
    "acl": (403, "AccessDenied", "refused"),
    "kms": (400, "KMS.DisabledException", "refused"),
    "ssec": (400, "InvalidRequest", "refused"),
    "fault": (500, "InternalError", "failed"),
    "reset": (0, "", "failed"),
    "broken": (0, "", "failed"),
}


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(transfer, "BACKOFF", 0.01)
    monkeypatch.setattr(crt, "STALL_TIMEOUT", 1)  # awscrt itself repeats requests for 15 s
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.usefixtures("no_pauses", "signed")
@pytest.mark.parametrize("by_botocore", [True, False])
def test_an_object_that_always_fails_is_set_aside_with_the_answer_of_s3(monkeypatch, fake_s3, tmp_path, by_botocore):
    def answer(request, key, query):
        kind = key.rpartition("/")[2]
        if "list-type" in query:
            send_listing(request, ["train/cat/1"])
        elif kind == "reset":
            reset(request)
        elif kind == "broken":
            send(request, 200, b"ab", length=3)
        elif kind in FAILURES:
            send_error(request, *FAILURES[kind][:2])
        else:
            send(request, 200, b"abc")

    endpoint = fake_s3(answer)
    if by_botocore:
        by_botocore_alone(monkeypatch, endpoint)
    good = sources(*(f"cat/{number}" for number in range(10)))
    objects = [*sources("cat/broken"), *good, *sources(*(f"cat/{kind}" for kind in FAILURES if kind != "broken"))]
    items = list(download(connect(), "images", objects, tmp_path / "raw"))
    assert {item for item in items if isinstance(item, SourceObject)} == set(good)
    rejected = {row.path.rpartition("/")[2]: row for row in items if isinstance(row, Rejected)}
    assert {kind: row.reason for kind, row in rejected.items()} == {kind: row[2] for kind, row in FAILURES.items()}
    assert rejected["acl"] == Rejected("train/cat/acl", "cat", "refused", "S3 answered 403 AccessDenied: m")
    assert rejected["fault"].detail == "S3 answered 500 InternalError: m"
    assert re.fullmatch(r"no answer \((ConnectionClosed|ProxyConnection)Error\)", rejected["reset"].detail)
    assert rejected["broken"].detail.startswith("the transfer broke off 4 times (")


@pytest.mark.usefixtures("no_pauses", "signed")
def test_a_server_that_stops_answering_stops_the_download_and_the_error_names_the_key(fake_s3, tmp_path):
    answers = [0]

    def answer(request, _key, _query):
        answers[0] += 1
        if answers[0] > 3:
            reset(request)
        else:
            send(request, 200, b"abc")

    fake_s3(answer)
    objects = sources(*(f"cat/{number}" for number in range(8)))
    with pytest.raises(NoUsableInput, match=r"stopped sending objects: s3://images/train/cat/\d could not") as caught:
        list(download(connect(), "images", objects, tmp_path / "raw", threads=1))
    assert "AWS_ENDPOINT_URL" not in str(caught.value)
    assert len(read_files(tmp_path / "raw")) == 3


@pytest.mark.usefixtures("signed")
@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "NoSuchBucket", "bucket 'images' does not exist"),
        (403, "InvalidAccessKeyId", "does not accept the AWS credentials"),
        (400, "ExpiredToken", "does not accept the AWS credentials"),
        (301, "PermanentRedirect", "not in the region"),
        (403, "AllAccessDisabled", "denied access"),
    ],
)
def test_an_answer_about_the_credentials_or_the_bucket_stops_the_download(fake_s3, tmp_path, status, code, sentence):
    fake_s3(lambda request, _key, _query: send_error(request, status, code))
    with pytest.raises(NoUsableInput, match=sentence):
        list(download(connect(), "images", sources("cat/1.png"), tmp_path / "raw"))


def test_a_disk_error_is_raised_unchanged(fake_s3, tmp_path):
    fake_s3(send_abc)
    (tmp_path / "cat").write_text("a file in place of a folder")
    with pytest.raises(NotADirectoryError):
        list(download(connect(), "images", sources("cat/1.png"), tmp_path))


def test_unfinished_files_of_a_killed_run_are_removed_even_if_there_is_nothing_to_fetch(fake_s3, tmp_path):
    fake_s3(send_abc)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(b"abc")
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part/7").write_bytes(b"a")
    assert list(download(connect(), "images", [], tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cat"]


@pytest.mark.parametrize("fetch", [download, partial(download_in_chunks, map=map)])
def test_a_worker_that_still_downloads_for_a_killed_run_leaves_nothing(fake_s3, tmp_path, fetch):
    fake_s3(send_abc)
    with keep_writing(tmp_path / ".part" / "attempt"):
        items = fetch(connect(), "images", sources("cat/1.png"), tmp_path)
        assert list(items) == sources("cat/1.png")
    assert read_files(tmp_path) == {"cat/1.png": b"abc"}


def test_a_worker_that_begins_a_chunk_of_a_killed_run_completes_no_file(fake_s3, tmp_path):
    fake_s3(send_abc)
    chunks = []

    def run(function, given):
        for chunk in given:
            chunks.append(chunk)
            yield function(chunk)

    list(download_in_chunks(connect(), "images", sources("cat/1.png"), tmp_path, run))
    following = download_in_chunks(connect(), "images", sources("dog/1.png"), tmp_path, run)
    next(following)
    with pytest.raises(FileNotFoundError):
        download_chunk(chunks[0]._replace(objects=sources("cat/2.png")))
    following.close()
    assert read_files(tmp_path).keys() == {"cat/1.png", "dog/1.png"}


def test_closing_the_generator_ends_all_threads_and_leaves_only_complete_files(fake_s3, tmp_path):
    requested = []

    def many():
        for i in range(10_000):
            requested.append(i)
            yield from sources(f"cat/{i}")

    fake_s3(send_abc)
    before = set(threading.enumerate())
    items = download(connect(), "images", many(), tmp_path / "raw", threads=4)
    workers = {thread for _ in range(5) if next(items) for thread in set(threading.enumerate()) - before}
    workers = {thread for thread in workers if "(_work)" in thread.name}
    items.close()
    assert workers
    assert not any(thread.is_alive() for thread in workers)
    assert len(requested) <= 4 + 5
    assert set(read_files(tmp_path / "raw").values()) == {b"abc"}
    assert not (tmp_path / "raw/.part").exists()


def test_a_silent_server_does_not_delay_the_end_and_its_late_response_is_not_written(monkeypatch, fake_s3, tmp_path):
    monkeypatch.setattr(download_module, "SHUTDOWN_TIMEOUT", 0.1)
    monkeypatch.setattr(download_module, "PROBE_TIMEOUT", 0.1)
    monkeypatch.setattr(download_module, "POLL_INTERVAL", 0.1)
    answer_now = threading.Event()

    def answer(request, key, _query):
        if key.endswith("silent"):
            answer_now.wait(20)
        send(request, 200, b"abc")

    fake_s3(answer)
    items = download(connect(), "images", sources("cat/silent", "cat/1"), tmp_path / "raw", threads=2)
    assert next(items).path == "cat/1"
    items.close()
    abandoned = [thread for thread in threading.enumerate() if "(_work)" in thread.name]
    assert [thread.daemon for thread in abandoned] == [True]
    answer_now.set()
    abandoned[0].join()
    assert read_files(tmp_path / "raw") == {"cat/1": b"abc"}


def test_an_interrupted_download_is_resumed(s3_client, bucket, tmp_path):
    folder, resume_listing = tmp_path / "draft", tmp_path / "draft" / ".resume" / "listing.csv"
    resume_listing.parent.mkdir(parents=True)
    name = upload(bucket, {f"p/label/{number}": b"%d" % number for number in range(20)})
    objects = list_objects(s3_client, name, "p").objects
    sync.reuse(objects, folder, resume_listing, None)
    items = download(s3_client, name, objects, folder, threads=2)
    fetched = {next(items).path for _ in range(5)}
    items.close()
    available, missing = sync.reuse(objects, folder, resume_listing, None)
    assert fetched <= {source.path for source in available}
    assert missing
    assert set(download(s3_client, name, missing, folder)) == set(missing)
    assert read_files(folder / "label") == {str(n): b"%d" % n for n in range(20)}
