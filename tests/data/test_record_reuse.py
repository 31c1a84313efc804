import shutil
from pathlib import Path

import numpy as np
import pytest
from support.images import put_image

from dgmd_pipeline.data import shards
from dgmd_pipeline.manifest import Example, read_shard_index

POOL = 12


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> tuple[Path, list[Example]]:
    raw = tmp_path_factory.mktemp("raw")
    return raw, [put_image(raw, f"mint/{number}.png", 0) for number in range(POOL)]


def write(folder: Path, raw: Path, rows: list[Example], count: int, size: tuple[int, int] = (16, 12), previous=()):
    folder.mkdir()
    return shards.write(rows, raw, folder, "training", count, *size, "stretch", previous=previous)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_no_old_image_file_is_opened_and_unchanged_shards_are_linked(pool, tmp_path):
    images = pool[1]
    raw = shutil.copytree(pool[0], tmp_path / "raw")
    write(tmp_path / "before", raw, images[:-1], 4)
    for row in images[:-1]:
        (raw / row.path).unlink()
    written = write(tmp_path / "after", raw, images, 4, previous=[tmp_path / "before"])
    assert written.new == 1
    assert written.new_bytes < written.counts["bytes"] / 5
    inodes = [
        sorted(file.stat().st_ino for file in (tmp_path / name).glob("*.tfrecord")) for name in ("before", "after")
    ]
    assert len({*inodes[0]} & {*inodes[1]}) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_not_reused_and_its_images_are_converted_again(damage, pool, tmp_path, caplog):
    raw, images = pool
    write(tmp_path / "before", raw, images, 3)
    entry = max(read_shard_index(tmp_path / "before").shards, key=lambda shard: shard.records)
    shard = tmp_path / "before" / entry.file
    content = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    else:
        content[-20] ^= 1
        shard.write_bytes(content if damage == "flip" else content[:-1])
    assert write(tmp_path / "after", raw, images, 3, previous=[tmp_path / "before"]).new == entry.records
    assert f"{entry.file} is damaged: its images are converted again" in caplog.text
    write(tmp_path / "scratch", raw, images, 3)
    assert contents(tmp_path / "after") == contents(tmp_path / "scratch")


@pytest.mark.parametrize("name", ["index.json", "records.npy"])
def test_a_folder_without_a_readable_index_is_not_reused(name, pool, tmp_path, caplog):
    raw, images = pool
    write(tmp_path / "before", raw, images, 2)
    content = bytearray((tmp_path / "before" / name).read_bytes())
    content[-20] ^= 1
    (tmp_path / "before" / name).write_bytes(content if name == "records.npy" else b"{}")
    assert write(tmp_path / "after", raw, images, 2, previous=[tmp_path / "before"]).new == POOL
    assert "are not reused" in caplog.text


def test_a_label_that_moves_changes_the_records_but_decodes_nothing(pool, tmp_path):
    raw, images = pool
    write(tmp_path / "before", raw, images, 2)
    moved = [row._replace(class_index=1) for row in images]
    assert write(tmp_path / "after", raw, moved, 2, previous=[tmp_path / "before"]).new == 0
    records = np.load(tmp_path / "after" / "records.npy")
    assert set(records["label"].tolist()) == {1}
