import os
from functools import partial

import pytest
from support.http_server import send
from support.s3 import KEYS, read_files, send_error

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.manifest import LISTING, REJECTED, Rejected, SourceObject
from dgmd_pipeline.s3 import sync
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.listing import Listing, Objects


def objects_of(*contents, etag="e"):
    """Objects of `(path, content)`, as a listing contains them."""
    return [SourceObject(f"p/{path}", len(content), etag, path) for path, content in contents]


def listed(objects):
    """The objects as `list_objects` returns them."""
    return Objects("p/", [(source.path, source.size, source.etag) for source in objects])


def write_files(folder, *contents):
    for path, content in contents:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def write_lists(folder, objects, rejected=()):
    folder.mkdir(exist_ok=True)
    manifest.write(folder / LISTING, SourceObject, objects)
    manifest.write(folder / REJECTED, Rejected, rejected)


@pytest.fixture
def draft(tmp_path):
    """A draft folder, and the file in it where `reuse` stores the listing."""
    folder = tmp_path / "draft"
    (folder / ".resume").mkdir(parents=True)
    return folder, folder / ".resume" / "listing.csv"


def paths(objects):
    return [source.path for source in objects]


def test_the_fingerprint_depends_on_path_size_and_etag_of_each_object():
    rows = [("cat/1.png", 3, "e"), ("cat/2.png", 3, "e")]
    others = [rows[:1], [rows[0], ("cat/2.png", 3, "f")], [rows[0], ("cat/2.png", 5, "e")], []]
    assert len({sync.fingerprint(each) for each in [rows, *others]}) == 5


def test_listings_are_compared_by_path_size_and_etag(tmp_path):
    contents = [("a/1", "x"), ("a/2", "x"), ("a/3", "x"), ("a/4", "x")]
    earlier = objects_of(*contents)
    write_lists(tmp_path, earlier)
    write_files(tmp_path, *contents)
    current = [
        earlier[0],
        earlier[1]._replace(size=2),
        earlier[2]._replace(etag="f"),
        *objects_of(("b/1", ""), ("b/2", ""), ("b/3", "")),
    ]
    assert sync.compare_folder(tmp_path, listed(current)).reason == "3 new, 2 changed, 1 gone"
    assert sync.compare_folder(tmp_path, listed(earlier[::-1])) is None


def test_a_first_download_fetches_everything_and_stores_its_listing(draft):
    folder, resume_listing = draft
    objects = objects_of(("a/1", "x"), ("a/2", "y"))
    assert sync.reuse(objects, folder, resume_listing, None) == ([], objects)
    assert list(manifest.read(resume_listing, SourceObject)) == objects


def test_complete_files_of_an_interrupted_download_are_kept_if_they_are_still_listed(draft):
    folder, resume_listing = draft
    files = [("a/1", "one"), ("a/changed", "old"), ("a/gone", "gone"), ("b/deep/gone", "gone"), ("c", "file")]
    sync.reuse(objects_of(*files, ("a/missing", "12")), folder, resume_listing, None)
    write_files(folder, *files)
    (folder / "a" / "incomplete").write_text("1")
    current = objects_of(("a/1", "one"), ("c/1", "1"), ("a/missing", "12"), ("a/incomplete", "12"), ("b/deep", "file"))
    current += objects_of(("a/changed", "new"), etag="f")
    available, missing = sync.reuse(current, folder, resume_listing, None)
    assert paths(available) == ["a/1"]
    assert paths(missing) == ["c/1", "a/missing", "a/incomplete", "b/deep", "a/changed"]
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path != resume_listing}
    assert left == {".resume", "a", "a/1", "a/incomplete"}  # the last is overwritten; files may replace folders


@pytest.mark.parametrize("links", [True, False])
def test_unchanged_files_of_a_finished_download_are_linked_or_copied(draft, tmp_path, monkeypatch, links):
    folder, resume_listing = draft
    previous = tmp_path / "previous"
    objects = objects_of(
        ("a/1", "one"), ("a/changed", "old"), ("a/gone", "gone"), ("a/deleted", "x"), ("a/short", "12")
    )
    write_lists(previous, objects)
    write_files(previous, ("a/1", "one"), ("a/changed", "old"), ("a/gone", "gone"), ("a/short", "1"))
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    current = [objects[0], objects[1]._replace(etag="f"), objects[3], objects[4], *objects_of(("b/new", "new"))]
    available, missing = sync.reuse(current, folder, resume_listing, previous)
    assert paths(available) == ["a/1"]
    assert paths(missing) == ["a/changed", "a/deleted", "a/short", "b/new"]
    assert (folder / "a" / "1").read_text() == "one"
    assert (folder / "a" / "1").samefile(previous / "a" / "1") == links
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["1"]
    assert [path.name for path in resume_listing.parent.iterdir()] == ["listing.csv"]


def test_a_full_disk_is_not_mistaken_for_one_without_links(draft, tmp_path, monkeypatch):
    folder, resume_listing = draft
    previous, objects = tmp_path / "previous", objects_of(("a/1", "one"))
    write_lists(previous, objects)
    write_files(previous, ("a/1", "one"))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        sync.reuse(objects, folder, resume_listing, previous)


@pytest.mark.parametrize("damage", [b"", b"key,size\n", b"key,size,etag,path\np/a/1,x,e,a/1\n", b"\x00\xff\n"])
def test_if_the_stored_listing_is_damaged_everything_is_downloaded_again(draft, caplog, damage):
    folder, resume_listing = draft
    write_files(folder, ("a/1", "one"))
    resume_listing.write_bytes(damage)
    objects = objects_of(("a/1", "one"))
    assert sync.reuse(objects, folder, resume_listing, None) == ([], objects)
    assert f"{resume_listing}: " in caplog.text
    assert "All objects are downloaded again." in caplog.text
    assert not (folder / "a").exists()
    assert list(manifest.read(resume_listing, SourceObject)) == objects


def test_untracked_files_are_found(tmp_path):
    write_files(tmp_path, ("a/1", "one"), ("a/own", ""), ("mine/2", ""), ("listing.csv", ""), ("a/.DS_Store", ""))
    objects = objects_of(("a/1", "one"), ("b/lost", "x"))
    assert sync.untracked_files(tmp_path, objects) == ["a/own", "mine/2"]


def test_a_folder_with_untracked_files_must_not_be_replaced(tmp_path):
    write_lists(tmp_path, objects_of(("a/1", "one")))
    write_files(tmp_path, ("a/1", "one"))
    sync.check_untracked_files(tmp_path)
    write_files(tmp_path, ("a/own", ""), ("b/own", ""))
    with pytest.raises(
        NoUsableInput, match=r"contains 2 files that were not downloaded .* first one is a/own\. Upload"
    ):
        sync.check_untracked_files(tmp_path)


def test_a_folder_is_up_to_date_if_nothing_changed_and_no_file_is_missing(tmp_path):
    objects = objects_of(("a/1", "one"), ("a/2", "two"))
    write_lists(tmp_path, objects)
    write_files(tmp_path, ("a/1", "one"), ("a/2", "two"))
    assert sync.compare_folder(tmp_path, listed(objects)) is None
    current = [objects[0]._replace(etag="f"), *objects_of(("b/3", "1234"))]
    changes = sync.compare_folder(tmp_path, listed(reversed(current)))
    write_lists(tmp_path / "next", current)
    fingerprint = sync.fingerprint(sync.stored_rows(tmp_path / "next"))
    assert changes == ("1 new, 1 changed, 1 gone", fingerprint, 2, 7)
    (tmp_path / "a/2").unlink()
    assert sync.compare_folder(tmp_path, listed(objects)) == ("1 missing from the folder", None, 2, 6)


def test_an_object_that_was_left_out_is_tried_again_without_a_new_fingerprint(tmp_path):
    write_lists(tmp_path, objects_of(("a/1", "one")), [Rejected("p/a/2", "a", "archived", "")])
    write_files(tmp_path, ("a/1", "one"))
    changes = sync.compare_folder(tmp_path, listed(objects_of(("a/1", "one"), ("a/2", "two"))))
    assert (changes.reason, changes.fingerprint) == ("1 left out by the last download", None)


def show(items, total, unit, *, size):
    """Check the numbers that a progress bar would show."""
    items = list(items)
    assert (len(items), unit) == (total, "objects")
    assert all(size(item) == getattr(item, "size", 0) for item in items)
    return items


@pytest.fixture
def downloads(monkeypatch):
    """The paths that were fetched. Objects contain zeros; those with the label "gone" are rejected."""
    fetched = []

    def download(client, bucket, objects, folder):
        del client
        assert bucket == "bucket"
        for source in objects:
            if source.path.startswith("gone/"):
                yield Rejected(source.key, "gone", "gone", "deleted from the bucket")
                continue
            write_files(folder, (source.path, "0" * source.size))
            fetched.append(source.path)
            yield source

    monkeypatch.setattr(sync, "download_folder", partial(sync.download_folder, fetch=download))
    return fetched


def download_folder(draft, objects, rejected=(), previous=None, client=None):
    folder, resume_listing = draft
    listing = Listing("bucket", "p", listed(objects), list(rejected))
    return sync.download_folder(client, listing, folder, resume_listing.parent, previous, "raw", 0.5, show)


def test_a_download_writes_both_lists_and_counts_what_it_did(draft, downloads, tmp_path):
    folder, _ = draft
    previous, objects = tmp_path / "previous", objects_of(("b/1", "000"), ("a/1", "00"), ("gone/1", "0"))
    write_lists(previous, objects)
    write_files(previous, ("b/1", "000"))
    rejected = [Rejected("p/x", "", "no label", "it is directly below the prefix")]
    result = download_folder(draft, objects, rejected, previous)
    assert (paths(result.objects), paths(result.fetched), downloads) == (["b/1", "a/1"], ["a/1"], ["a/1"])
    assert result.counts == {"objects": 2, "bytes": 5, "left out": 2}
    assert result.summary == "2 objects (1 new, 1 reused), 5 B"
    assert paths(manifest.read(folder / LISTING, SourceObject)) == ["a/1", "b/1"]
    assert [row.reason for row in manifest.read(folder / REJECTED, Rejected)] == ["gone", "no label"]
    assert len(rejected) == 1  # the listing is unchanged


@pytest.mark.parametrize("objects", [[], objects_of(("gone/1", "0"))])
def test_a_download_without_a_usable_object_is_an_error(draft, downloads, objects):
    rejected = [] if objects else [Rejected("p/x", "", "no label", "it is directly below the prefix")]
    with pytest.raises(NoUsableInput, match=r"None of the 1 objects in s3://bucket/p can be used\. .*<label>/<file>"):
        download_folder(draft, objects, rejected)


def denying(*denied):
    """An endpoint that answers AccessDenied to requests for these paths."""

    def answer(request, key, _query):
        if key.removeprefix("p/") in denied:
            send_error(request, 403, "AccessDenied")
        else:
            send(request, 200, b"0")

    return answer


@pytest.mark.usefixtures("signed")
def test_an_object_that_is_refused_is_left_out_and_tried_again_by_the_next_refresh(draft, fake_s3, caplog):
    folder, _ = draft
    objects = objects_of(*((f"a/{number}", "0") for number in range(4)))
    fake_s3(denying("a/1", "a/2"))
    result = download_folder(draft, objects, client=connect())
    assert paths(result.objects) == ["a/0", "a/3"]
    text = "S3 answered 403 AccessDenied: m"
    rows = [Rejected(f"p/a/{number}", "a", "refused", text) for number in (1, 2)]
    assert list(manifest.read(folder / REJECTED, Rejected)) == rows
    assert sorted(caplog.messages) == [f"  left out: s3://bucket/p/a/{n}: refused, {text}" for n in (1, 2)]
    assert sync.compare_folder(folder, listed(objects)).reason == "2 left out by the last download"


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [({}, "was anonymous because no AWS credentials are configured"), (KEYS, "grant these permissions")],
)
@pytest.mark.usefixtures("aws_home")
def test_a_download_stops_if_more_than_the_limit_of_a_label_is_refused(draft, fake_s3, monkeypatch, keys, remedy):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    objects = objects_of(*((f"{label}/{number}", "0") for label in "ab" for number in range(4)))
    fake_s3(denying("b/0", "b/1", "b/2"))
    with pytest.raises(NoUsableInput) as caught:
        download_folder(draft, objects, client=connect())
    assert "More than 50 % of the objects of the label b cannot be downloaded (3 of 4)" in str(caught.value)
    assert "refused, S3 answered 403 AccessDenied: m" in str(caught.value)
    assert remedy in str(caught.value)
    assert "MAX_REJECTED_PCNT (now 0.5)" in str(caught.value)
    assert (draft[0] / "a").is_dir()  # for the next run


@pytest.mark.usefixtures("downloads")
def test_a_download_that_is_larger_than_the_free_space_does_not_start(draft):
    too_large = [SourceObject("p/a/1", 10**18, "e", "a/1")]
    with pytest.raises(PipelineError, match="the disk is full: raw needs 1000000.0 TB"):
        download_folder(draft, too_large)
    assert not read_files(draft[0]).keys() - {".resume/listing.csv"}
