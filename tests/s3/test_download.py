import threading
from collections import Counter

import pytest
from support.http_server import send
from support.s3 import read_files, send_error, sources, upload

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import download as download_module
from dgmd_pipeline.s3 import sync
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.download import download
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


def test_a_response_that_always_breaks_off_is_an_error_and_leaves_no_file(monkeypatch, fake_s3, tmp_path):
    monkeypatch.setattr(download_module, "READ_ATTEMPTS", 2)
    fake_s3(lambda request, _key, _query: send(request, 200, b"ab", length=3))
    with pytest.raises(NoUsableInput, match=r"s3://images/train/cat/1.png .* broke off 2 times"):
        list(download(connect(), "images", sources("cat/1.png"), tmp_path / "raw"))
    assert list((tmp_path / "raw").rglob("*")) == []


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


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchBucket"])
@pytest.mark.usefixtures("signed")
def test_a_bucket_that_becomes_inaccessible_stops_the_download(fake_s3, tmp_path, code):
    fake_s3(lambda request, _key, _query: send_error(request, 404 if code == "NoSuchBucket" else 403, code))
    with pytest.raises(NoUsableInput, match=r"s3://images/train/cat/1.png|bucket 'images' does not exist"):
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
