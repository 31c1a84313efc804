import os

import pytest

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import SourceObject
from dgmd_pipeline.s3 import sync


def objects_of(*contents, etag="e"):
    """Objects of `(path, content)`, as a listing would give them."""
    return [SourceObject(f"p/{path}", len(content), etag, path) for path, content in contents]


def write_files(folder, *contents):
    for path, content in contents:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


@pytest.fixture
def draft(tmp_path):
    """A draft folder with one for notes, and the file for the listing in it."""
    folder = tmp_path / "draft"
    (folder / ".resume").mkdir(parents=True)
    return folder, folder / ".resume" / "listing.csv"


def names(objects):
    return [source.path for source in objects]


def test_the_identity_is_of_what_lies_there_not_of_where():
    objects = objects_of(("cat/1.png", "abc"), ("cat/2.png", "abc"))
    moved = [source._replace(key=f"elsewhere/{source.path}") for source in reversed(objects)]
    assert sync.fingerprint(objects) == sync.fingerprint(iter(moved))
    others = [objects[:1], [objects[0], objects[1]._replace(etag="f")], [objects[0], objects[1]._replace(size=5)], []]
    assert len({sync.fingerprint(rows) for rows in [objects, *others]}) == 5


def test_two_listings_differ_by_path_size_and_etag():
    before = objects_of(("a/1", "x"), ("a/2", "x"), ("a/3", "x"), ("a/4", "x"))
    now = [
        before[0],
        before[1]._replace(size=2),
        before[2]._replace(etag="f"),
        *objects_of(("b/1", ""), ("b/2", ""), ("b/3", "")),
    ]
    assert sync.changes(before, now) == sync.Changes(new=3, changed=2, gone=1)
    assert sync.changes(before, reversed(before)) == sync.Changes(0, 0, 0)


def test_a_first_download_has_everything_to_fetch_and_keeps_its_listing(draft, tmp_path):
    folder, notes = draft
    objects = objects_of(("a/1", "x"), ("a/2", "y"))
    assert sync.reuse(objects, folder, notes, tmp_path / "former", []) == ([], objects)
    assert list(manifest.read(notes, SourceObject)) == objects


def test_of_a_download_that_was_cut_off_only_what_is_whole_and_still_listed_stays(draft, tmp_path):
    folder, notes = draft
    files = [("a/1", "one"), ("a/changed", "old"), ("a/gone", "gone"), ("b/deep/gone", "gone"), ("c", "file")]
    sync.reuse(objects_of(*files, ("a/never came", "12")), folder, notes, tmp_path / "former", [])
    write_files(folder, *files)
    (folder / "a" / "cut short").write_text("1")
    now = objects_of(("a/1", "one"), ("c/1", "1"), ("a/never came", "12"), ("a/cut short", "12"), ("b/deep", "a file"))
    now += objects_of(("a/changed", "new"), etag="f")
    there, missing = sync.reuse(now, folder, notes, tmp_path / "former", [])
    assert names(there) == ["a/1"]
    assert names(missing) == ["c/1", "a/never came", "a/cut short", "b/deep", "a/changed"]
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path != notes}
    assert left == {".resume", "a", "a/1", "a/cut short"}  # the last is written over; folders give way to files


@pytest.mark.parametrize("links", [True, False])
def test_what_a_finished_folder_holds_is_linked_or_copied_as_far_as_it_is_still_objects_of(
    draft, tmp_path, monkeypatch, links
):
    folder, notes = draft
    former = tmp_path / "former"
    known = objects_of(
        ("a/1", "one"), ("a/changed", "old"), ("a/gone", "gone"), ("a/deleted by hand", "x"), ("a/cut", "12")
    )
    write_files(former, ("a/1", "one"), ("a/changed", "old"), ("a/gone", "gone"), ("a/cut", "1"))
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    objects = [known[0], known[1]._replace(etag="f"), known[3], known[4], *objects_of(("b/new", "new"))]
    there, missing = sync.reuse(objects, folder, notes, former, known)
    assert names(there) == ["a/1"]
    assert names(missing) == ["a/changed", "a/deleted by hand", "a/cut", "b/new"]
    assert (folder / "a" / "1").read_text() == "one"
    assert (folder / "a" / "1").samefile(former / "a" / "1") == links
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["1"]
    assert [path.name for path in notes.parent.iterdir()] == ["listing.csv"]


def test_a_full_disk_is_not_taken_for_one_without_links(draft, tmp_path, monkeypatch):
    folder, notes = draft
    write_files(tmp_path / "former", ("a/1", "one"))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        sync.reuse(objects_of(("a/1", "one")), folder, notes, tmp_path / "former", objects_of(("a/1", "one")))


@pytest.mark.parametrize("damage", [b"", b"key,size\n", b"key,size,etag,path\np/a/1,x,e,a/1\n", b"\x00\xff\n"])
def test_notes_that_cannot_be_read_are_set_aside_with_what_they_were_about(draft, tmp_path, caplog, damage):
    folder, notes = draft
    write_files(folder, ("a/1", "one"))
    notes.write_bytes(damage)
    objects = objects_of(("a/1", "one"))
    assert sync.reuse(objects, folder, notes, tmp_path / "former", []) == ([], objects)
    assert "It is fetched anew." in caplog.text
    assert not (folder / "a").exists()
    assert list(manifest.read(notes, SourceObject)) == objects


def test_files_that_were_not_downloaded_and_objects_that_are_not_there_are_found(tmp_path):
    write_files(tmp_path, ("a/1", "one"), ("a/own", ""), ("mine/2", ""), ("listing.csv", ""), ("a/.DS_Store", ""))
    objects = objects_of(("a/1", "one"), ("b/lost", "x"))
    assert sync.untracked_files(tmp_path, objects) == ["a/own", "mine/2"]
    assert sync.missing_files(tmp_path, objects) == 1
