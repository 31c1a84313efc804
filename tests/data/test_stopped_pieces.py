"""Inspections and conversions that are stopped and begun again, and pieces that are made twice at the same time."""

import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from support.images import put_image

from dgmd_pipeline.data import inspection, record_writing, shards
from dgmd_pipeline.manifest import Example

IMAGES = 24


class Stopped(Exception):
    """The run is stopped."""


def stop_after(count, finished):
    """Return a `map` that is stopped after so many items, and adds their results to a list."""

    def run(function, items):
        for item in islice(items, count):
            finished.append(function(item))
            yield finished[-1]
        if len(items) > count:
            raise Stopped

    return run


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def rows(raw) -> list[Example]:
    return [put_image(raw, f"mint/{number}.png", 0) for number in range(IMAGES)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(shards, "PIECE_IMAGES", 4)
    monkeypatch.setattr(inspection, "PIECE_FILES", 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def convert(raw, rows, folder, count=3, size=16, pieces=None, **options) -> int:
    """Return how many images were encoded; `pieces` are those of a stopped run too."""
    folder.mkdir()
    previous = sorted(pieces.iterdir()) if pieces else ()
    given = folder, "training", count, size, size, "stretch"
    return shards.write(rows, raw, *given, previous=previous, pieces=pieces, **options).new


@pytest.mark.parametrize(
    ("count", "size", "label"),
    [(3, 16, 0), (5, 16, 0), (3, 16, 1), (3, 8, 0)],
    ids=["the same settings", "other shards", "another label", "another size"],
)
def test_a_conversion_that_was_stopped_encodes_only_what_no_finished_piece_has(raw, rows, tmp_path, count, size, label):
    pieces, finished = tmp_path / "pieces", []
    pieces.mkdir()
    with pytest.raises(Stopped):
        convert(raw, rows, tmp_path / "stopped", pieces=pieces, map=stop_after(4, finished))
    kept = sum(finished) if size == 16 else 0
    assert 12 < sum(finished) < IMAGES
    rows = [row._replace(class_index=label) for row in rows]
    assert convert(raw, rows, tmp_path / "after", count, size, pieces) == IMAGES - kept
    convert(raw, rows, tmp_path / "scratch", count, size)
    assert contents(tmp_path / "after") == contents(tmp_path / "scratch")


def test_pieces_are_linked_and_a_damaged_one_is_made_again(raw, rows, tmp_path, caplog):
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    assert convert(raw, rows, tmp_path / "first", pieces=pieces) == IMAGES
    whole = sorted(pieces.iterdir())
    assert len(whole) == 3, "the parts of a shard are removed when they are joined"
    inodes = {(folder / record_writing.SHARD).stat().st_ino for folder in whole}
    assert {file.stat().st_ino for file in (tmp_path / "first").glob("*.tfrecord")} == inodes
    shard = whole[1] / record_writing.SHARD
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    (whole[2] / "index.json").write_text("")
    images = [len(np.load(folder / "records.npy")) for folder in whole]
    assert convert(raw, rows, tmp_path / "after", pieces=pieces) == sum(images[1:])
    assert "is damaged: its images are converted again" in caplog.text
    assert contents(tmp_path / "first") == contents(tmp_path / "after")


def test_a_piece_of_a_shard_that_is_written_twice_at_the_same_time_is_written_once(raw, rows, tmp_path):
    both, found = threading.Barrier(2), []

    @contextmanager
    def together(_):
        both.wait()
        yield

    def twice(function, items):
        for item in items:
            assert len(pickle.dumps(item)) < 20_000
            with ThreadPoolExecutor(2) as pool:
                found.append([*pool.map(function, 2 * [item._replace(reserve_memory=together)])])
            yield found[-1][0]

    pieces = tmp_path / "pieces"
    pieces.mkdir()
    assert convert(raw, rows, tmp_path / "twice", pieces=pieces, map=twice) == IMAGES
    assert all(one == other for one, other in found)
    assert len(list(pieces.iterdir())) == 3
    convert(raw, rows, tmp_path / "once")
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def inspect(raw, folder, pieces=None, **options):
    """Return how many files were opened; `pieces` are those of a stopped run too."""
    folder.mkdir()
    previous = sorted(pieces.iterdir()) if pieces else ()
    return inspection.inspect_folder(raw, False, {}, folder, previous=previous, pieces=pieces, **options)["new"]


@pytest.mark.parametrize("change", ["nothing", "a file", "damage"])
def test_an_inspection_that_was_stopped_opens_only_files_of_no_finished_piece(raw, rows, tmp_path, change):
    del rows
    raw = shutil.copytree(raw, tmp_path / "raw")
    (raw / "mint/broken.png").write_bytes(b"no image")
    pieces, finished = tmp_path / "pieces", []
    pieces.mkdir()
    with pytest.raises(Stopped):
        inspect(raw, tmp_path / "stopped", pieces, map=stop_after(14, finished))
    assert len(list(pieces.iterdir())) == 3
    if change == "a file":
        put_image(raw, "mint/0.png", 0, (20, 20))
    elif change == "damage":
        (min(pieces.iterdir()) / "thumbnails").write_bytes(b"")
    assert inspect(raw, tmp_path / "after", pieces) == {"nothing": 13, "a file": 14, "damage": 17}[change]
    assert inspect(raw, tmp_path / "scratch") == IMAGES + 1
    assert contents(tmp_path / "after") == contents(tmp_path / "scratch")


def test_files_that_are_inspected_twice_at_the_same_time_have_equal_results(raw, rows, tmp_path):
    del rows

    def twice(function, items):
        assert pickle.dumps(function)
        with ThreadPoolExecutor(2) as pool:
            for item in items:
                one, other = pool.map(function, 2 * [item])
                assert one == other
                yield one

    inspect(raw, tmp_path / "twice", map=twice)
    inspect(raw, tmp_path / "once")
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
