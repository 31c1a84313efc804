import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import PIL.Image
import pytest
from support.images import chunk, encode, exif, put, samples, scene

from dgmd_pipeline import manifest
from dgmd_pipeline.data.decoding import open_rgb
from dgmd_pipeline.data.inspection import check_rejected, find, inspect
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import RawFile, Rejected


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header announces this size, with one byte of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# Finding


def test_files_at_any_depth_are_found_sorted_by_path_with_the_first_folder_as_the_label(raw):
    for path in ("b/2 two.jpg", "b/deep/er/1.png", "a c/x", "a/y", "_SUCCESS", "listing.csv"):
        put(raw, path, b"x")
    assert list(find(raw)) == [
        RawFile("a c/x", "a c"),
        RawFile("a/y", "a"),
        RawFile("b/2 two.jpg", "b"),
        RawFile("b/deep/er/1.png", "b"),
    ]


def test_hidden_and_system_files_are_ignored_and_counted_in_one_line(raw, caplog):
    caplog.set_level("INFO")
    for path in (".git/x", "a/.DS_Store", "a/.cache/x", "a/x", "a/Thumbs.db", "__MACOSX/a/x", "a/@eaDir/x", ".y/z"):
        put(raw, path, b"x")
    assert list(find(raw)) == [RawFile("a/x", "a")]
    assert caplog.messages == [f"  {raw}: {manifest.describe_system_files(7, 'files and folders')}"]


def test_links_to_files_are_usable_and_other_links_and_pipes_are_rejected(raw, scratch, tmp_path):
    put(raw, "a/x.png", encode(scene(), "PNG"))
    put(tmp_path, "elsewhere/y.png", encode(scene(1), "PNG"))
    (raw / "a" / "file").symlink_to(tmp_path / "elsewhere" / "y.png")
    (raw / "a" / "nowhere").symlink_to(tmp_path / "gone")
    (raw / "a" / "circle").symlink_to(raw)
    (raw / "b").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(raw / "a" / "pipe")
    usable, rejected = inspect(find(raw), raw, scratch)
    assert [row.path for row in usable] == ["a/file", "a/x.png"]
    assert [row.path for row in rejected] == ["a/circle", "a/nowhere", "a/pipe", "b"]
    assert {row.reason for row in rejected} == {"unreadable"}
    assert rejected[-1].label == "b"


def test_a_folder_that_cannot_be_listed_is_an_error(raw):
    with pytest.raises(NoUsableInput, match=r"Cannot list the folder .*missing \(No such file or directory\)"):
        list(find(raw / "missing"))


# One file


@pytest.mark.parametrize("name", samples())
def test_the_format_depends_on_the_content_not_on_the_name(name, raw, scratch, capfd, recwarn):
    put(raw, "a label/a name.txt", samples()[name])
    (row,), rejected = inspect(find(raw), raw, scratch)
    assert not rejected
    assert row.path == "a label/a name.txt"
    assert row.format == name.split()[0]
    assert row.sha256 == row.group == sha256(samples()[name]).hexdigest()
    rotated = name in ("JPEG baseline", "WEBP", "AVIF", "TIFF")  # stored with orientation 6
    assert (row.width, row.height) == ((64, 96) if rotated else (96, 64))
    assert open_rgb(raw / row.path).size == (row.width, row.height)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"GIF, as this text begins", "text"),
        (encode(scene(), "TGA"), "unknown type of file (its first bytes are 00 00 02 00 00 00 00 00)"),
        (encode(scene(), "JPEG2000"), "JPEG 2000"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    ],
    ids=["text", "TGA", "JPEG2000", "HEIC"],
)
def test_a_file_of_another_format_is_rejected_with_its_type(data, detail, raw, scratch):
    put(raw, "a/image.jpg", data)
    expected = f"{detail}; expected an image in the format JPEG, PNG, WEBP, AVIF, GIF, BMP or TIFF"
    assert inspect(find(raw), raw, scratch) == ([], [Rejected("a/image.jpg", "a", "unreadable", expected)])


def test_an_image_whose_header_is_damaged_or_cut_is_rejected_with_the_reason(raw, scratch):
    data = samples()["PNG"]
    put(raw, "a/header.png", data[:20] + b"\xff" + data[21:])
    put(raw, "a/cut.png", data[:20])
    _, (cut, header) = inspect(find(raw), raw, scratch)
    assert cut[2:] == ("truncated", "OSError: Truncated File Read")
    assert header[2:] == ("unreadable", "PNG that cannot be read: broken PNG file (bad header checksum in b'IHDR')")


def test_values_whose_range_is_unknown_are_rejected_with_the_reason(raw, scratch):
    put(raw, "a/x.tif", encode(PIL.Image.new("F", (9, 9), 3071), "TIFF"))
    _, (row,) = inspect(find(raw), raw, scratch)
    assert row.reason == "unreadable"
    assert row.detail.startswith("its floating-point values are between 0 and 3071; expected 0 to 1, or 0 to 255")


def test_the_detail_of_a_tiff_with_thousands_of_damaged_tags_is_bounded(raw, scratch):
    tags = [struct.pack("<HHII", number, 2, 100_000 + number, 2**31) for number in range(270, 3170)]
    put(raw, "a/x.tif", b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4))
    _, (row,) = inspect(find(raw), raw, scratch)
    assert row.detail.startswith("TIFF that cannot be read: Missing dimensions; Tag data larger than file.")
    assert len(row.detail) == 1000


def test_an_empty_file_is_rejected(raw, scratch):
    put(raw, "a/x.jpg", b"")
    assert inspect(find(raw), raw, scratch) == ([], [Rejected("a/x.jpg", "a", "empty", "0 bytes")])


def test_a_file_without_read_permission_is_rejected_with_the_reason(raw, scratch):
    if os.geteuid() == 0:
        pytest.skip("root can read every file")
    put(raw, "a/x.png", encode(scene(), "PNG"))
    (raw / "a" / "x.png").chmod(0)
    _, (row,) = inspect(find(raw), raw, scratch)
    assert row[2:] == ("unreadable", "cannot be read from the disk: Permission denied")


def test_a_missing_file_is_rejected(raw, scratch):
    _, (row,) = inspect([RawFile("a/gone.png", "a")], raw, scratch)
    assert row.reason == "unreadable"


@pytest.mark.parametrize(
    "name",
    [
        "JPEG baseline",
        "JPEG progressive",
        "JPEG grey",
        "JPEG CMYK",
        "PNG",
        "WEBP",
        "WEBP animated",
        "AVIF",
        "GIF",
        "BMP",
        "TIFF",
        "TIFF LZW",
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
def test_a_truncated_image_is_rejected_as_truncated(name, share, raw, scratch, capfd):
    data = samples()[name]
    put(raw, "a/x", data[: int(len(data) * share)])
    usable, (row,) = inspect(find(raw), raw, scratch)
    assert not usable
    assert row.reason == "truncated"
    assert capfd.readouterr() == ("", "")


def test_the_end_of_a_large_jpeg_is_checked_although_it_is_decoded_at_an_eighth(raw, scratch):
    data = encode(scene(0, 2000, 1500), "JPEG")
    put(raw, "a/whole", data)
    put(raw, "a/cut", data[:-300])
    (whole,), (cut,) = inspect(find(raw), raw, scratch)
    assert (whole.path, whole.width, whole.height) == ("a/whole", 2000, 1500)
    assert (cut.path, cut.reason) == ("a/cut", "truncated")


def test_an_image_below_the_minimum_width_or_height_is_rejected(raw, scratch):
    put(raw, "a/8.png", encode(scene(0, 8, 8), "PNG"))
    put(raw, "a/7.png", encode(scene(0, 300, 7), "PNG"))
    (usable,), (row,) = inspect(find(raw), raw, scratch)
    assert usable.path == "a/8.png"
    assert row == ("a/7.png", "a", "too small", "300 x 7 pixels, expected at least 8 on each side")


@pytest.mark.parametrize(("length", "pixels"), [(12_000, 144_000_000), (50_000, 2_500_000_000)])
def test_too_many_pixels_are_rejected_by_the_header_without_a_warning(length, pixels, raw, scratch, recwarn):
    put(raw, "a/bomb.png", png_header(length, length))
    usable, (row,) = inspect(find(raw), raw, scratch)
    assert not usable
    # Decoding would fail as "truncated".
    assert row[2:] == ("too many pixels", f"Image size ({pixels} pixels) exceeds limit of 100000000 pixels")
    assert not recwarn.list


def test_the_caller_sets_the_limit_of_pixels_and_pillows_limit_is_restored(raw, scratch, monkeypatch):
    put(raw, "a/x.png", encode(scene(0, 100, 100), "PNG"))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 123)
    assert len(inspect(find(raw), raw, scratch, max_pixels=10_000)[0]) == 1
    assert [row.reason for row in inspect(find(raw), raw, scratch, max_pixels=9_998)[1]] == ["too many pixels"]
    with pytest.raises(PIL.Image.DecompressionBombError):
        open_rgb(raw / "a" / "x.png", max_pixels=9_998)
    assert PIL.Image.MAX_IMAGE_PIXELS == 123


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_with_damaged_exif_is_usable_as_stored(kind, raw, scratch, recwarn):
    damaged = exif(6).tobytes().replace(b"MM\0*", b"MM\0?")
    put(raw, "a/x", encode(scene(), kind, exif=damaged))
    (row,), _ = inspect(find(raw), raw, scratch)
    assert (row.width, row.height) == (96, 64)
    assert open_rgb(raw / "a" / "x").size == (96, 64)
    assert not recwarn.list


@pytest.mark.parametrize("action", ["default", "ignore", "error"])
def test_the_detail_of_a_rejected_file_contains_pillows_warnings(action, raw, scratch, recwarn):
    data = encode(scene(), "TIFF", compression="jpeg")
    put(raw, "a/x.tif", data[:-5])
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        _, (row,) = inspect(find(raw), raw, scratch)
    assert row[2:] == ("unreadable", "OSError: decoder error -2; Truncated File Read")
    assert not recwarn.list


def test_damaged_files_become_rows_without_output_or_warnings(raw, scratch, capfd, recwarn):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for name, whole in samples().items():
        for index in range(20):
            data = bytearray(whole)
            match index % 3:
                case 0:
                    del data[rng.randrange(len(data)) :]
                case 1:
                    for _ in range(rng.choice((1, 3, 20))):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                case 2:
                    at = rng.randrange(min(400, len(data)))
                    data[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
            put(raw, f"{name}/{index:02}", bytes(data))
    rows = inspect(find(raw), raw, scratch, max_pixels=1_000_000)
    assert capfd.readouterr() == ("", ""), seed
    assert not recwarn.list, seed
    assert sorted(row.path for row in [*rows[0], *rows[1]]) == [file.path for file in find(raw)], seed
    assert all(row.detail and "\n" not in row.detail and " at 0x" not in row.detail for row in rows[1]), seed
    assert len(rows[1]) > 100, seed
    assert inspect(find(raw), raw, scratch, max_pixels=1_000_000) == rows, seed


# Many files


def test_the_first_path_of_identical_files_under_one_label_is_used(raw, scratch):
    data = encode(scene(), "PNG")
    for path in ("a/c.png", "a/b/z.png", "a/d.png"):
        put(raw, path, data)
    usable, rejected = inspect(reversed(list(find(raw))), raw, scratch)
    assert [row.path for row in usable] == ["a/b/z.png"]
    assert rejected == [
        Rejected("a/c.png", "a", "duplicate", "the same file as a/b/z.png"),
        Rejected("a/d.png", "a", "duplicate", "the same file as a/b/z.png"),
    ]


def test_identical_files_under_two_labels_are_all_rejected(raw, scratch):
    data = encode(scene(), "PNG")
    for path in ("a/1.png", "a/2.png", "b/1.png"):
        put(raw, path, data)
    put(raw, "b/2.png", encode(scene(1), "PNG"))
    usable, rejected = inspect(find(raw), raw, scratch)
    assert [row.path for row in usable] == ["b/2.png"]
    detail = "the same file as {}, which has another label"
    assert rejected == [
        Rejected("a/1.png", "a", "conflict", detail.format("b/1.png")),
        Rejected("a/2.png", "a", "conflict", detail.format("b/1.png")),
        Rejected("b/1.png", "b", "conflict", detail.format("a/1.png")),
    ]


def test_no_files_give_no_rows(raw, scratch):
    assert inspect(find(raw), raw, scratch) == ([], [])


def test_two_spawned_processes_give_the_same_rows_as_one(raw, scratch):
    for index in range(60):
        put(raw, f"label {index % 3}/é {index}.jpeg", encode(scene(index % 54), "JPEG", quality=90))
        put(raw, f"label {index % 3}/{index}.png", encode(scene(index % 54, 48, 32), "PNG"))
    for index, data in enumerate(samples().values()):
        put(raw, f"label 4/{index}", data[: len(data) - index * 7])
    rows = inspect(find(raw), raw, scratch)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert inspect(find(raw), raw, scratch, map=pool.map) == rows
    usable, rejected = rows
    assert usable == sorted(usable)
    assert rejected == sorted(rejected)
    assert len(usable) + len(rejected) == 120 + len(samples())
    assert {"truncated", "duplicate", "conflict"} >= {row.reason for row in rejected if row.label != "label 4"}


# Limit of undecodable files


def test_labels_with_too_many_undecodable_files_are_named_with_their_counts():
    rejected = [
        Rejected("cat/x.jpg", "cat", "unreadable", "OSError: broken"),
        Rejected("cat/y.jpg", "cat", "truncated", "cut"),
        Rejected("cow/x.jpg", "cow", "empty", "0 bytes"),
        Rejected("dog/x.jpg", "dog", "too many pixels", "many"),
    ]
    with pytest.raises(NoUsableInput) as error:
        check_rejected({"cat": 1, "dog": 1}, rejected, 0.5, Path("/data/rejected.csv"))
    message = str(error.value)
    assert "More than 50 % of the files cannot be decoded for cat (2 of 3 files), cow (1 of 1 files)" in message
    assert "dog" not in message  # exactly the limit
    assert "for example cat/x.jpg: unreadable, OSError: broken" in message
    assert "rejected.csv" in message
    assert "MAX_REJECTED_PCNT (now 0.5)" in message


def test_duplicates_conflicts_and_small_images_do_not_count_as_undecodable():
    rejected = [Rejected(f"a/{reason}", "a", reason, "") for reason in ("duplicate", "conflict", "too small")]
    check_rejected({}, rejected, 0, Path())


def test_rows_without_a_label_do_not_count_as_undecodable():
    check_rejected({"a": 1}, [Rejected("key", "", "unreadable", "no label")], 0, Path())
