"""Folders of stored features: what is reused, and damage."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from support.images import put_image

from dgmd_pipeline import manifest
from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import extraction, feature_store
from dgmd_pipeline.training.vectors import ShardedVectors

POOL = 10
ORIGIN = {"backbone": "a", "weights": "b"}
NETWORK = extraction.Network("a", "b", 8, 8, Path())


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> tuple[Path, list[manifest.Example]]:
    raw = tmp_path_factory.mktemp("raw")
    return raw, [put_image(raw, f"mint/{number}.png", number % 3) for number in range(POOL)]


def write_records(folder: Path, pool, chosen, count: int) -> Path:
    folder.mkdir()
    shards.write([pool[1][index] for index in chosen], pool[0], folder, "training", count, 8, 8, "stretch")
    return folder


def vectors_of(records: Path) -> np.ndarray:
    """Vectors that depend on the image alone."""
    names = manifest.read_records(records)["sha256"].tolist()
    return np.array([list(name[:3]) for name in names], np.float32).reshape(-1, 3)


def store(folder: Path, records: Path, previous=(), origin=ORIGIN) -> feature_store.Reuse:
    """Write a folder of features, and return what was reused from `previous`."""
    folder.mkdir()
    found = feature_store.find_reusable(records, previous, origin)
    with tempfile.TemporaryDirectory() as place:
        pieces = extraction.divide(records, found, Path(place), origin, NETWORK)
        blocks = np.array_split(vectors_of(records)[found.new], 2)
        assert sum(extraction.write_pieces(pieces, blocks, 3)) == len(found.new)
        reuse = feature_store.find_reusable(records, [*previous, *(piece.target for piece in pieces)], origin)
        feature_store.write(folder, records, reuse, origin, 3)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_vectors_of_another_origin_are_not_reused(pool, tmp_path):
    records = write_records(tmp_path / "records", pool, range(POOL), 2)
    store(tmp_path / "before", records)
    reuse = store(tmp_path / "after", records, [tmp_path / "before"], ORIGIN | {"backbone": "another"})
    assert len(reuse.new) == POOL


def test_equal_shards_are_linked(pool, tmp_path):
    store(tmp_path / "before", write_records(tmp_path / "records", pool, range(POOL), 2))
    store(tmp_path / "after", tmp_path / "records", [tmp_path / "before"])
    files = [sorted(tmp_path.glob(f"{name}/features-*.npy")) for name in ("before", "after")]
    assert all(one.samefile(other) for one, other in zip(*files, strict=True))


def test_a_damaged_file_is_not_reused_and_its_vectors_are_computed_again(pool, tmp_path, caplog):
    records = write_records(tmp_path / "records", pool, range(POOL), 2)
    store(tmp_path / "before", records)
    file = tmp_path / "before" / "features-00001-of-00002.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    reuse = store(tmp_path / "after", records, [tmp_path / "before"])
    assert reuse.shards == [1]
    assert f"{file} is damaged: its vectors are computed again" in caplog.text
    np.testing.assert_array_equal(feature_store.load(tmp_path / "after").vectors, vectors_of(records))


@pytest.mark.parametrize("content", [b"", b"{}", b"no JSON", None])
def test_a_folder_with_a_damaged_index_or_list_of_images_is_not_reused(content, pool, tmp_path, caplog):
    records = write_records(tmp_path / "records", pool, range(POOL), 2)
    store(tmp_path / "before", records)
    if content is None:
        images = np.load(tmp_path / "before" / "images.npy")
        np.save(tmp_path / "before" / "images.npy", images[::-1])
    else:
        (tmp_path / "before" / "index.json").write_bytes(content)
    assert len(store(tmp_path / "after", records, [tmp_path / "before"]).new) == POOL
    assert f"The features of {tmp_path / 'before'} are not reused. They are damaged" in caplog.text


def test_missing_vectors_are_an_error(pool, tmp_path):
    records = write_records(tmp_path / "records", pool, range(POOL), 2)
    reuse = feature_store.find_reusable(records, (), ORIGIN)
    with pytest.raises(ValueError, match="10 vectors are missing"):
        feature_store.write(tmp_path, records, reuse, ORIGIN, 3)
    pieces = extraction.divide(records, reuse, tmp_path, ORIGIN, NETWORK)
    count = len(pieces[0].positions)
    with pytest.raises(ValueError, match=f"expected {count} vectors, got 1"):
        list(extraction.write_pieces(pieces, [vectors_of(records)[:1]], 3))


@pytest.mark.parametrize("file", ["index.json", "labels.npy", "features-00001-of-00002.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_a_missing_or_damaged_file_is_named(file, damage, pool, tmp_path):
    store(tmp_path / "features", write_records(tmp_path / "records", pool, range(POOL), 2))
    path = tmp_path / "features" / file
    content = path.read_bytes()
    path.write_bytes(content[: 0 if damage == "empty" else -9])
    if damage == "missing":
        path.unlink()
    with pytest.raises(PipelineError, match=f"{file}.* was changed after it was written: delete the folder"):
        feature_store.load(tmp_path / "features")


def test_an_extraction_that_was_stopped_computes_only_what_no_finished_piece_has(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "PIECE_IMAGES", 2)
    records, place = write_records(tmp_path / "records", pool, range(POOL), 2), tmp_path / "pieces"
    place.mkdir()
    pieces = extraction.divide(records, feature_store.find_reusable(records, (), ORIGIN), place, ORIGIN, NETWORK)
    assert len(pickle.dumps(pieces)) < len(pieces) * 1000
    vectors = vectors_of(records)
    with pytest.raises(ValueError, match="expected 2 vectors, got 1"):
        list(extraction.write_pieces(pieces, np.array_split(vectors[:5], 2), 3))
    kept = sorted(place.iterdir())
    assert kept == [piece.target for piece in pieces[:2]]
    assert store(tmp_path / "after", records, kept).new.tolist() == [*range(4, POOL)]
    store(tmp_path / "scratch", records)
    assert contents(tmp_path / "after") == contents(tmp_path / "scratch")
    assert store(tmp_path / "other", records, kept, ORIGIN | {"weights": "others"}).new.tolist() == [*range(POOL)]


def test_a_piece_that_is_computed_twice_at_the_same_time_is_written_once(pool, tmp_path):
    records = write_records(tmp_path / "records", pool, range(POOL), 1)
    reuse = feature_store.find_reusable(records, (), ORIGIN)
    pieces = extraction.divide(records, reuse, tmp_path, ORIGIN, NETWORK)
    vectors = vectors_of(records)
    attempts = [extraction.write_pieces(pieces, np.array_split(vectors + noise, 2), 3) for noise in (0, 1e-6)]
    for written in zip(*attempts, strict=True):
        assert written == (5, 5)
    found = feature_store.find_reusable(records, [pieces[0].target], ORIGIN)
    assert not len(found.new)
    feature_store.write(tmp_path, records, found, ORIGIN, 3)
    np.testing.assert_array_equal(feature_store.load(tmp_path).vectors, vectors)
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {records, pieces[0].target}


def test_many_vectors_stay_on_the_disk(pool, tmp_path, monkeypatch):
    records = write_records(tmp_path / "records", pool, range(POOL), 3)
    store(tmp_path / "features", records)
    assert isinstance(feature_store.load(tmp_path / "features").vectors, np.ndarray)
    monkeypatch.setattr(feature_store, "IN_MEMORY_BYTES", 0)
    stored = feature_store.load(tmp_path / "features").vectors
    assert isinstance(stored, ShardedVectors)
    expected = vectors_of(records)
    positions = np.array([9, 0, 5, 5, -1])
    for rows in (slice(None), slice(2, 9, 3), slice(4, 4), positions, positions[:0], np.arange(POOL) % 2 == 0):
        np.testing.assert_array_equal(stored[rows], expected[rows])
    with pytest.raises(IndexError):
        stored[np.array([POOL])]
