"""What an inspection takes over from an earlier one."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import encode, put, scene

from dgmd_pipeline import manifest
from dgmd_pipeline.data import inspected_files, near_duplicates
from dgmd_pipeline.data.inspection import inspect_folder
from dgmd_pipeline.manifest import Image

CONTENTS = {
    "photo": encode(scene(0), "PNG"),
    "copy": encode(scene(0), "JPEG", quality=90),
    "other": encode(scene(1), "JPEG"),
    "text": b"no image",
    "small": encode(scene(2).resize((4, 4)), "PNG"),
}
PATHS = ("a/1", "a/2", "a/3", "b/1", "b/2")


def inspect(raw: Path, folder: Path, previous: Path | None = None, corrected=None) -> int:
    folder.mkdir()
    return inspect_folder(raw, False, corrected or {}, folder, previous=[previous] if previous else ())["new"]


def test_a_downloaded_file_is_unchanged_if_its_size_and_etag_are(tmp_path):
    raw = tmp_path / "raw"
    put(raw, "a/1", CONTENTS["photo"])
    put(raw, "a/2", CONTENTS["other"])

    def inspect_listed(name: str, etag: str, previous: Path | None = None) -> int:
        rows = [manifest.SourceObject(path, (raw / path).stat().st_size, etag, path) for path in ("a/1", "a/2")]
        manifest.write(raw / manifest.LISTING, manifest.SourceObject, rows)
        manifest.write(raw / manifest.REJECTED, manifest.Rejected, [])
        (tmp_path / name).mkdir()
        return inspect_folder(raw, True, {}, tmp_path / name, previous=[previous] if previous else ())["new"]

    assert inspect_listed("first", "one") == 2
    os.utime(raw / "a/1", ns=(1, 1))
    assert inspect_listed("second", "one", tmp_path / "first") == 0
    assert inspect_listed("third", "two", tmp_path / "second") == 2


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path):
    raw = tmp_path / "raw"
    put(raw, "a/1", CONTENTS["photo"])
    (raw / "a/2").symlink_to("nothing")
    assert inspect(raw, tmp_path / "first") == 2
    assert inspect(raw, tmp_path / "second", tmp_path / "first") == 1


@pytest.mark.parametrize(
    "name", [inspected_files.FILES, inspected_files.THUMBNAILS, inspected_files.COPIES, inspected_files.CHECKSUMS]
)
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_file_makes_the_inspection_start_from_nothing(name, damage, tmp_path, caplog):
    raw = tmp_path / "raw"
    for path, content in zip(PATHS, sorted(CONTENTS), strict=True):
        put(raw, path, CONTENTS[content])
    inspect(raw, tmp_path / "first")
    file = tmp_path / "first" / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.unlink()
    if damage == "flip":
        file.write_bytes(content)
    assert inspect(raw, tmp_path / "second", tmp_path / "first") == len(PATHS)
    assert f"The results in {tmp_path / 'first'} are not reused" in caplog.text


def clusters(count: int) -> np.ndarray:
    """Thumbnails of a few scenes, most of them with a little noise: many have equal hashes."""
    rng = np.random.default_rng(0)
    scenes = [np.asarray(scene(number % 5, 16, 16)).astype(int) for number in range(count)]
    return np.array([(each + rng.integers(-3, 4, each.shape)).clip(0, 255) for each in scenes]).astype(np.uint8)


THUMBNAILS = clusters(60)
IMAGES = [
    Image(f"a/{number:02}", "a", f"{number * 7919 % 60:064x}", "PNG", 400, 300, "") for number in range(len(THUMBNAILS))
]


@settings(max_examples=100)
@given(history=st.lists(st.sets(st.integers(0, 59)), min_size=2, max_size=5))
def test_groups_do_not_depend_on_the_order_in_which_images_came_and_went(history):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_NEIGHBOURS", 2)  # so that an image hides others from each other
        known = None
        for state in history:
            chosen = sorted(state)
            images = [IMAGES[index] for index in chosen]
            found, known = near_duplicates.group(images, THUMBNAILS, np.array(chosen, np.int64), known)
            expected, all_known = near_duplicates.group(images, THUMBNAILS, np.array(chosen, np.int64))
            assert found == expected
            np.testing.assert_array_equal(known.hashes, all_known.hashes)
            np.testing.assert_array_equal(known.copies, all_known.copies)


def test_known_images_are_not_compared_again(monkeypatch):
    positions = np.arange(59)
    _, known = near_duplicates.group(IMAGES[:59], THUMBNAILS, positions)
    compared = []
    are_copies = near_duplicates._are_copies
    monkeypatch.setattr(
        near_duplicates, "_are_copies", lambda *each: compared.append(len(each[0])) or are_copies(*each)
    )
    near_duplicates.group(IMAGES, THUMBNAILS, np.arange(60), known)
    assert sum(compared) <= 59
    near_duplicates.group(IMAGES, THUMBNAILS, np.arange(60))
    assert sum(compared) > 300
