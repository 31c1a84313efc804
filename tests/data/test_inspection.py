import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.images import encode, scene, stored_as, turned

from dgmd_pipeline.data import decoding, near_duplicates
from dgmd_pipeline.data.decoding import open_rgb, to_rgb
from dgmd_pipeline.data.inspection import check_rejected, find, inspect
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Image, RawFile, Rejected


def put(raw: Path, path: str, data: bytes) -> None:
    (raw / path).parent.mkdir(parents=True, exist_ok=True)
    (raw / path).write_bytes(data)


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size as far as its header goes, and one byte of picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@cache  # a colour profile inside one of them holds the time
def encodings() -> dict[str, bytes]:
    image = scene()
    grey16 = PIL.Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    return {
        "JPEG baseline": encode(image, "JPEG", exif=turned(6)),
        "JPEG progressive": encode(image, "JPEG", progressive=True),
        "JPEG grey": encode(image.convert("L"), "JPEG"),
        "JPEG CMYK": encode(image.convert("CMYK"), "JPEG"),
        "JPEG of two pictures": encode(image, "MPO", save_all=True, append_images=[scene(1)]),
        "PNG": encode(image, "PNG", exif=turned(3)),
        "PNG palette": encode(image.quantize(16), "PNG", transparency=3),
        "PNG alpha": encode(image.convert("RGBA"), "PNG"),
        "PNG 16 bits": encode(grey16, "PNG"),
        "PNG one bit": encode(image.convert("1"), "PNG"),
        "PNG animated": encode(image, "PNG", save_all=True, append_images=[scene(1)]),
        "WEBP": encode(image, "WEBP", exif=turned(6)),
        "WEBP lossless alpha": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "WEBP animated": encode(image, "WEBP", save_all=True, append_images=[scene(1)]),
        "GIF": encode(image, "GIF"),
        "GIF animated": encode(image, "GIF", save_all=True, append_images=[scene(1)]),
        "BMP": encode(image, "BMP"),
        "BMP palette": encode(image.quantize(16), "BMP"),
        "TIFF": encode(image, "TIFF", tiffinfo={0x0112: 6}),
        "TIFF LZW": encode(image, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(image, "TIFF", compression="tiff_deflate"),
        "TIFF JPEG": encode(image, "TIFF", compression="jpeg"),
        "TIFF fax": encode(image.convert("1"), "TIFF", compression="group4"),
        "TIFF float": encode(PIL.Image.fromarray(np.asarray(image)[..., 0] / np.float32(255)), "TIFF"),
        "TIFF LAB": encode(image.convert("LAB"), "TIFF"),
        "TIFF pages": encode(image, "TIFF", save_all=True, append_images=[scene(1)]),
    }


# Finding


def test_files_are_found_at_any_depth_sorted_by_path_with_the_first_folder_as_their_label(raw):
    for path in ("b/2 two.jpg", "b/deep/er/1.png", "a c/x", "a/y", "_SUCCESS", "listing.csv"):
        put(raw, path, b"x")
    assert list(find(raw)) == [
        RawFile("a c/x", "a c"),
        RawFile("a/y", "a"),
        RawFile("b/2 two.jpg", "b"),
        RawFile("b/deep/er/1.png", "b"),
    ]


def test_names_that_begin_with_a_dot_are_skipped(raw):
    for path in (".git/x", "a/.DS_Store", "a/.cache/x", "a/x"):
        put(raw, path, b"x")
    assert list(find(raw)) == [RawFile("a/x", "a")]


def test_a_link_to_a_file_is_a_file_and_other_links_are_rejected_not_followed(raw, scratch, tmp_path):
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


def test_a_folder_that_cannot_be_listed_stops_with_a_sentence(raw):
    with pytest.raises(NoUsableInput, match=r"missing cannot be \(No such file or directory\)"):
        list(find(raw / "missing"))


# One file


@pytest.mark.parametrize("name", encodings())
def test_a_picture_is_known_by_its_content_whatever_its_name(name, raw, scratch, capfd, recwarn):
    put(raw, "a label/a name.txt", encodings()[name])
    (row,), rejected = inspect(find(raw), raw, scratch)
    assert not rejected
    assert row.path == "a label/a name.txt"
    assert row.format == name.split()[0]
    assert row.sha256 == row.group == sha256(encodings()[name]).hexdigest()
    across = name in ("JPEG baseline", "WEBP", "TIFF")  # those are stored with orientation 6
    assert (row.width, row.height) == ((64, 96) if across else (96, 64))
    assert open_rgb(raw / row.path).size == (row.width, row.height)
    assert not list(scratch.iterdir())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    "data",
    [
        b"GIF, as this text begins",
        b"\x00" * 1000,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encode(scene(), "PPM"),
        encode(scene(), "TGA"),
        encode(scene(), "ICO"),
        encode(scene(), "JPEG2000"),
    ],
    ids=["text", "zeros", "EPS", "PPM", "TGA", "ICO", "JPEG2000"],
)
def test_what_is_not_one_of_the_six_formats_is_unreadable(data, raw, scratch):
    put(raw, "a/picture.jpg", data)
    usable, (row,) = inspect(find(raw), raw, scratch)
    assert not usable
    assert row[:3] == ("a/picture.jpg", "a", "unreadable")
    assert "JPEG, PNG, WEBP, GIF, BMP or TIFF" in row.detail


def test_an_empty_file_is_set_aside(raw, scratch):
    put(raw, "a/x.jpg", b"")
    assert inspect(find(raw), raw, scratch) == ([], [Rejected("a/x.jpg", "a", "empty", "0 bytes")])


def test_a_file_that_may_not_be_read_is_set_aside_with_the_reason(raw, scratch):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    put(raw, "a/x.png", encode(scene(), "PNG"))
    (raw / "a" / "x.png").chmod(0)
    _, (row,) = inspect(find(raw), raw, scratch)
    assert row[2:] == ("unreadable", "cannot be read from the disk: Permission denied")


def test_a_file_that_is_gone_is_set_aside(raw, scratch):
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
        "GIF",
        "BMP",
        "TIFF",
        "TIFF LZW",
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
def test_a_truncated_picture_is_set_aside_as_truncated(name, share, raw, scratch, capfd):
    data = encodings()[name]
    put(raw, "a/x", data[: int(len(data) * share)])
    usable, (row,) = inspect(find(raw), raw, scratch)
    assert not usable
    assert row.reason == "truncated"
    assert capfd.readouterr() == ("", "")


def test_a_large_jpeg_that_is_decoded_at_an_eighth_is_read_to_its_end(raw, scratch):
    data = encode(scene(0, 2000, 1500), "JPEG")
    put(raw, "a/whole", data)
    put(raw, "a/cut", data[:-300])
    (whole,), (cut,) = inspect(find(raw), raw, scratch)
    assert (whole.path, whole.width, whole.height) == ("a/whole", 2000, 1500)
    assert (cut.path, cut.reason) == ("a/cut", "truncated")


def test_a_picture_smaller_than_the_limit_on_either_side_is_set_aside(raw, scratch):
    put(raw, "a/8.png", encode(scene(0, 8, 8), "PNG"))
    put(raw, "a/7.png", encode(scene(0, 300, 7), "PNG"))
    (usable,), (row,) = inspect(find(raw), raw, scratch)
    assert usable.path == "a/8.png"
    assert row == ("a/7.png", "a", "too small", "300 x 7 pixels, expected at least 8 on each side")


@pytest.mark.parametrize(("side", "pixels"), [(12_000, 144_000_000), (50_000, 2_500_000_000)])
def test_too_many_pixels_are_refused_by_the_header_and_without_a_warning(side, pixels, raw, scratch, recwarn):
    put(raw, "a/bomb.png", png_header(side, side))
    usable, (row,) = inspect(find(raw), raw, scratch)
    assert not usable
    # Decoding would have found the missing pixels: "truncated".
    assert row[2:] == ("too many pixels", f"Image size ({pixels} pixels) exceeds limit of 100000000 pixels")
    assert not recwarn.list


def test_the_limit_of_pixels_is_the_callers_and_pillows_own_comes_back(raw, scratch, monkeypatch):
    put(raw, "a/x.png", encode(scene(0, 100, 100), "PNG"))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 123)  # Pillow's, which is not ours
    assert len(inspect(find(raw), raw, scratch, max_pixels=10_000)[0]) == 1
    assert [row.reason for row in inspect(find(raw), raw, scratch, max_pixels=9_998)[1]] == ["too many pixels"]
    with pytest.raises(PIL.Image.DecompressionBombError):
        open_rgb(raw / "a" / "x.png", max_pixels=9_998)
    assert PIL.Image.MAX_IMAGE_PIXELS == 123


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_the_orientation_only_and_says_nothing(kind, raw, scratch, recwarn):
    exif = turned(6).tobytes()
    put(raw, "a/x", encode(scene(), kind, exif=exif.replace(b"MM\0*", b"MM\0?")))
    (row,), _ = inspect(find(raw), raw, scratch)
    assert (row.width, row.height) == (96, 64)
    assert open_rgb(raw / "a" / "x").size == (96, 64)
    assert not recwarn.list


@pytest.mark.parametrize("action", ["default", "ignore", "error"])
def test_what_pillow_warned_of_is_in_the_detail_of_a_rejected_file(action, raw, scratch, recwarn):
    data = encode(scene(), "TIFF", compression="jpeg")
    put(raw, "a/x.tif", data[:-5])
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        _, (row,) = inspect(find(raw), raw, scratch)
    assert row[2:] == ("unreadable", "OSError: decoder error -2; Truncated File Read")
    assert not recwarn.list


def test_damaged_files_are_rows_and_nothing_reaches_the_screen(raw, scratch, capfd, recwarn):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for name, whole in encodings().items():
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


# RGB


def level(image: PIL.Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (PIL.Image.new("1", (9, 9), 1), (255, 255, 255)),
        (PIL.Image.new("L", (9, 9), 100), (100, 100, 100)),
        (PIL.Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
        (PIL.Image.new("RGBX", (9, 9), (1, 2, 3, 0)), (1, 2, 3)),
        (PIL.Image.new("RGBA", (9, 9), (10, 20, 30, 0)), (255, 255, 255)),
        (PIL.Image.new("RGBA", (9, 9), (10, 20, 30, 255)), (10, 20, 30)),
        (PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 51)), (204, 204, 204)),
        (PIL.Image.new("LA", (9, 9), (0, 51)), (204, 204, 204)),
        (PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 0)).convert("PA"), (255, 255, 255)),
        (PIL.Image.new("CMYK", (9, 9), (255, 0, 0, 0)), (0, 255, 255)),
        (PIL.Image.new("YCbCr", (9, 9), (100, 128, 128)), (100, 100, 100)),
        (PIL.Image.new("LAB", (9, 9), (255, 128, 128)), (255, 255, 255)),
        (PIL.Image.new("I;16", (9, 9), 65535), (255, 255, 255)),
        (PIL.Image.new("I;16", (9, 9), 128 * 257), (128, 128, 128)),
        (PIL.Image.new("I;16B", (9, 9), 128 * 257), (128, 128, 128)),
        (PIL.Image.new("I", (9, 9), 300), (1, 1, 1)),
        (PIL.Image.new("I", (9, 9), 70_000), (255, 255, 255)),
        (PIL.Image.new("I", (9, 9), -5), (0, 0, 0)),
        (PIL.Image.new("F", (9, 9), 0.4), (102, 102, 102)),
        (PIL.Image.new("F", (9, 9), 102.3), (102, 102, 102)),
        (PIL.Image.new("F", (9, 9), float("nan")), (0, 0, 0)),
        (PIL.Image.new("F", (9, 9), float("inf")), (255, 255, 255)),
        (PIL.Image.new("F", (9, 9), float("-inf")), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, PIL.Image.Image) else "-".join(map(str, value)),
)
def test_every_mode_becomes_rgb_with_transparency_on_white(image, expected, recwarn):
    assert level(to_rgb(image)) == pytest.approx(expected, abs=1)
    assert not recwarn.list


def test_transparent_colours_of_palette_grey_and_rgb_pngs_and_gifs_are_white(tmp_path):
    palette = PIL.Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    cases = {
        "index": encode(palette, "PNG", transparency=1),
        "alphas": encode(palette, "PNG", transparency=b"\xff\x00"),
        "half": encode(palette, "PNG", transparency=b"\xff\x80"),
        "gif": encode(palette, "GIF", transparency=1),
        "grey": encode(PIL.Image.new("L", (9, 9), 7), "PNG", transparency=7),
        "grey16": encode(PIL.Image.new("I;16", (9, 9), 700), "PNG", transparency=700),
        "rgb": encode(PIL.Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        assert level(open_rgb(tmp_path / name)) == ((227, 127, 127) if name == "half" else (255, 255, 255)), name


def test_sixteen_bits_of_grey_keep_their_gradation(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 16).reshape(16, 256).astype(np.uint16)
    (tmp_path / "x.png").write_bytes(encode(PIL.Image.fromarray(ramp), "PNG"))
    grey = np.asarray(open_rgb(tmp_path / "x.png"))[..., 0]
    assert np.abs(grey - ramp / 257).max() <= 0.5 + 1e-9


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encode(PIL.Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK"), "JPEG"))
    assert level(open_rgb(tmp_path / "x.jpg")) == pytest.approx((200, 60, 30), abs=4)


@pytest.mark.parametrize(
    "name", ["JPEG of two pictures", "PNG animated", "WEBP animated", "GIF animated", "TIFF pages"]
)
def test_of_several_pictures_in_a_file_the_first_counts(name, tmp_path):
    (tmp_path / "x").write_bytes(encodings()[name])
    first = np.asarray(scene(), np.float64)
    assert np.abs(np.asarray(open_rgb(tmp_path / "x")) - first).mean() < 12
    with PIL.Image.open(tmp_path / "x") as image:
        image.seek(1)
        assert np.abs(np.asarray(to_rgb(image)) - first).mean() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_orientation_says(kind, orientation, tmp_path):
    upright = scene(0, 400, 240)
    (tmp_path / "x").write_bytes(stored_as(upright, kind, orientation))
    image = open_rgb(tmp_path / "x")
    assert image.size == (400, 240)
    assert np.abs(np.asarray(image.resize((40, 24)), float) - np.asarray(upright.resize((40, 24)), float)).mean() < 3


def test_opening_says_what_is_wrong_by_exceptions_that_are_named(tmp_path):
    data = encode(scene(), "JPEG")
    for name, content in {"garbage": b"nothing", "cut": data[: len(data) // 2], "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(decoding.DAMAGED):
            open_rgb(tmp_path / name)


# Many files


def test_of_the_same_file_under_one_label_the_first_path_is_kept(raw, scratch):
    data = encode(scene(), "PNG")
    for path in ("a/c.png", "a/b/z.png", "a/d.png"):
        put(raw, path, data)
    usable, rejected = inspect(reversed(list(find(raw))), raw, scratch)
    assert [row.path for row in usable] == ["a/b/z.png"]
    assert rejected == [
        Rejected("a/c.png", "a", "duplicate", "the same file as a/b/z.png"),
        Rejected("a/d.png", "a", "duplicate", "the same file as a/b/z.png"),
    ]


def test_the_same_file_under_two_labels_is_left_out_under_both(raw, scratch):
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


def test_nothing_gives_nothing(raw, scratch):
    assert inspect(find(raw), raw, scratch) == ([], [])


def test_spawned_processes_give_the_same_rows_as_one(raw, scratch):
    for index in range(100):
        put(raw, f"label {index % 3}/é {index}.jpeg", encode(scene(index % 90), "JPEG", quality=90))
        put(raw, f"label {index % 3}/{index}.png", encode(scene(index % 90, 48, 32), "PNG"))
    for index, data in enumerate(encodings().values()):
        put(raw, f"label 4/{index}", data[: len(data) - index * 7])
    here = inspect(find(raw), raw, scratch)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert inspect(find(raw), raw, scratch, map=pool.map) == here
    usable, rejected = here
    assert usable == sorted(usable)
    assert rejected == sorted(rejected)
    assert len(usable) + len(rejected) == 200 + len(encodings())
    assert {"truncated", "duplicate", "conflict"} >= {row.reason for row in rejected if row.label != "label 4"}
    assert not list(scratch.iterdir())


# Near-duplicates


def put_copies(raw: Path, label: str, name: str, image: PIL.Image.Image) -> None:
    """The picture as PNG, and re-encoded and resized copies of it."""
    put(raw, f"{label}/{name} original", encode(image, "PNG"))
    put(raw, f"{label}/{name} q50", encode(image, "JPEG", quality=50))
    put(raw, f"{label}/{name} q95", encode(image, "JPEG", quality=95))
    put(raw, f"{label}/{name} webp", encode(image, "WEBP"))
    for share in (0.5, 0.75, 1.5):
        smaller = image.resize((round(image.width * share) + 1, round(image.height * share)))
        put(raw, f"{label}/{name} {share}", encode(smaller, "JPEG", quality=75))


def groups(rows: list[Image]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.group, set()).add(row.path)
    return found


def test_resized_and_reencoded_copies_share_the_smallest_sha256_across_labels(raw, scratch):
    put_copies(raw, "a", "x", scene(0, 160, 120))
    put(raw, "b/other label.jpg", encode(scene(0, 120, 90), "JPEG", quality=60))
    put(raw, "b/another.png", encode(scene(1, 160, 120), "PNG"))
    usable, rejected = inspect(find(raw), raw, scratch)
    assert not rejected
    found = groups(usable)
    assert sorted(map(len, found.values())) == [1, 8]
    for group, paths in found.items():
        assert group == min(row.sha256 for row in usable if row.path in paths)


def test_copies_are_found_among_handwritten_digits_and_no_two_digits_are_taken_for_one(raw, scratch):
    from sklearn.datasets import load_digits

    sides = (24, 28, 32, 40, 48, 64)
    for index, digit in enumerate(load_digits().images):
        grey = PIL.Image.fromarray((digit * 255 / 16).astype(np.uint8))
        image = grey.resize((sides[index % 6],) * 2, PIL.Image.Resampling.BICUBIC)
        name = f"{index:04}"
        if index % 20 == 0 and image.width >= 28:
            put_copies(raw, f"{index % 7}", name, image)
        else:
            kind = ("PNG", "JPEG", "BMP")[index % 3]
            put(raw, f"{index % 7}/{name} only", encode(image, kind))
    usable, rejected = inspect(find(raw), raw, scratch)
    assert not rejected
    found = groups(usable).values()
    digits_of_a_group = [{Path(path).name.split()[0] for path in paths} for paths in found]
    assert max(map(len, digits_of_a_group)) == 1
    assert len(found) == 1797


def test_digits_that_lost_their_edges_at_half_the_size_are_still_copies(raw, scratch):
    from sklearn.datasets import load_digits

    for index, digit in enumerate(load_digits().images[::20]):
        image = PIL.Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((32, 32))
        put(raw, f"a/{index:02}.png", encode(image, "PNG"))
        put(raw, f"b/{index:02}.png", encode(image.resize((16, 16)), "PNG"))
    found = groups(inspect(find(raw), raw, scratch)[0])
    assert sorted(map(sorted, found.values())) == [[f"a/{index:02}.png", f"b/{index:02}.png"] for index in range(90)]


def test_crops_tints_and_noise_of_photographs_are_pictures_of_their_own_and_their_copies_are_not(raw, scratch):
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    count = 0
    for photo in load_sample_images().images:
        whole = PIL.Image.fromarray(photo)
        crop = whole.crop((80, 60, 440, 300))
        pixels = np.asarray(crop, np.float64)
        different = [whole, crop, *(whole.crop((x, 60, x + 360, 300)) for x in (0, 40, 160))]
        different += [
            PIL.Image.fromarray(np.clip(pixels * tint, 0, 255).astype(np.uint8)) for tint in ((1.2, 1, 1), 0.8)
        ]
        different += [PIL.Image.fromarray(np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8))]
        for image in different:
            put_copies(raw, "photo", f"{count:02}", image)
            count += 1
    usable, _ = inspect(find(raw), raw, scratch)
    found = sorted(sorted(paths) for paths in groups(usable).values())
    assert [{Path(path).name[:2] for path in paths} for paths in found] == [{f"{index:02}"} for index in range(count)]


def cell(number: int) -> PIL.Image.Image:
    """A grey square with two bright lines and a faint dark spot whose place is all that tells one from another."""
    y, x = np.mgrid[:300, :300]
    spot_x, spot_y = 60 + 60 * (number % 4), 75 + 75 * (number // 4)
    spot = 8 * np.exp(-((x - spot_x) ** 2 + (y - spot_y) ** 2) / (2 * 20**2))
    edge = 40 * np.exp(-np.minimum(np.minimum(x, 299 - x), np.minimum(y, 299 - y)) / 10)
    lines = 30 * (np.exp(-(((x - 100) / 8) ** 2)) + np.exp(-(((x - 200) / 8) ** 2)))
    return PIL.Image.fromarray((140 + lines - edge - spot).astype(np.uint8))


def test_industrial_images_that_differ_by_a_faint_spot_are_not_copies_and_their_copies_are(raw, scratch):
    for number in range(12):
        put_copies(raw, "cell", f"{number:02}", cell(number))
    found = groups(inspect(find(raw), raw, scratch)[0]).values()
    assert sorted(sorted({Path(path).name[:2] for path in paths}) for paths in found) == [
        [f"{n:02}"] for n in range(12)
    ]


@pytest.mark.parametrize("size", [(401, 533), (521, 389), (1025, 771)])
def test_a_jpeg_whose_reduced_size_is_no_whole_number_of_pixels_is_still_a_copy(raw, scratch, size):
    image = scene(0, 640, 480).resize(size)
    put(raw, "a/1.png", encode(image, "PNG"))
    put(raw, "a/2.jpg", encode(image, "JPEG", quality=90))
    put(raw, "a/3.jpg", encode(image.resize((size[0] // 2, size[1] // 2)), "JPEG", quality=90))
    assert len(groups(inspect(find(raw), raw, scratch)[0])) == 1


def test_flat_pictures_of_different_colours_are_not_copies(raw, scratch):
    for red in range(0, 256, 5):
        for green in (0, 1, 128):
            put(raw, f"a/{red} {green}.png", encode(PIL.Image.new("RGB", (20, 20), (red, green, 90)), "PNG"))
    usable, _ = inspect(find(raw), raw, scratch)
    assert len(groups(usable)) == len(usable) == 52 * 3


def test_a_wave_is_not_a_copy_of_the_plane_grey_it_blurs_to_nor_of_a_fainter_wave(raw, scratch):
    wave = np.tile(np.cos(np.pi / 64 * 7 * (np.arange(64) + 0.5)), (64, 1))
    for height in (0, 30, 60):
        put(raw, f"a/{height}.png", encode(PIL.Image.fromarray((128 + height * wave).astype(np.uint8)), "PNG"))
    assert len(groups(inspect(find(raw), raw, scratch)[0])) == 3


def test_a_picture_and_its_double_width_are_not_copies(raw, scratch):
    put(raw, "a/1.png", encode(scene(0, 64, 64), "PNG"))
    put(raw, "a/2.png", encode(scene(0, 64, 64).resize((128, 64)), "PNG"))
    assert len(groups(inspect(find(raw), raw, scratch)[0])) == 2


@pytest.mark.parametrize("kinds", [1, 3, 1000, 20_000])
def test_comparisons_stay_bounded_however_many_hashes_are_the_same(kinds):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, kinds, np.uint64)[rng.integers(0, kinds, 20_000)]
    pairs = list(near_duplicates._neighbours(hashes, rng.integers(0, 1000, 20_000)))
    compared = sum(len(left) for left, _ in pairs)
    assert 100 * 20_000 < compared <= 128 * 20_000
    assert all(len(left) == len(right) for left, right in pairs)


def test_among_equal_hashes_those_of_the_same_brightness_become_candidates():
    brightness = np.random.default_rng(0).permutation(1000) * 10
    brightness = np.concatenate([brightness, brightness + 1])
    pairs = list(near_duplicates._candidates(np.zeros(2000, np.uint64), brightness))
    found = {(int(one), int(other)) for left, right in pairs for one, other in zip(left, right, strict=True)}
    assert found >= {(index, 1000 + index) for index in range(1000)}


def test_hashes_that_differ_by_a_few_bits_anywhere_become_candidates():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 20_000, np.uint64)
    near = hashes[:1000].copy()
    for row in range(1000):
        for bit in rng.choice(64, 4, replace=False):
            near[row] ^= np.uint64(1) << np.uint64(bit)
    everything = np.concatenate([hashes, near])
    found = {
        (int(one), int(other))
        for left, right in near_duplicates._candidates(everything, np.zeros(21_000, np.int64))
        for one, other in zip(left, right, strict=True)
    }
    assert sum((row, 20_000 + row) in found for row in range(1000)) >= 990
    assert all(one < other for one, other in found)


# Too much that cannot be decoded


def usable_rows(label: str, count: int) -> list[Image]:
    return [Image(f"{label}/{index}.png", label, "0" * 64, "PNG", 9, 9, "0" * 64) for index in range(count)]


def test_labels_with_too_many_undecodable_files_are_named_with_their_counts():
    rejected = [
        Rejected("cat/x.jpg", "cat", "unreadable", "OSError: broken"),
        Rejected("cat/y.jpg", "cat", "truncated", "cut"),
        Rejected("cow/x.jpg", "cow", "empty", "0 bytes"),
        Rejected("dog/x.jpg", "dog", "too many pixels", "many"),
    ]
    rows = usable_rows("cat", 1) + usable_rows("dog", 1)
    with pytest.raises(NoUsableInput) as error:
        check_rejected(rows, rejected, 0.5, Path("/data/rejected.csv"))
    message = str(error.value)
    assert "More than 50% of the files cannot be decoded for cat (2 of 3 files), cow (1 of 1 files)" in message
    assert "dog" not in message  # exactly the limit
    assert "for example cat/x.jpg: unreadable, OSError: broken" in message
    assert "rejected.csv" in message
    assert "MAX_REJECTED_PCNT, which is 0.5" in message


def test_duplicates_conflicts_and_small_pictures_do_not_count_as_undecodable():
    rejected = [Rejected(f"a/{reason}", "a", reason, "") for reason in ("duplicate", "conflict", "too small")]
    check_rejected([], rejected, 0, Path())


def test_rows_without_a_label_stop_nothing():
    check_rejected(usable_rows("a", 1), [Rejected("key", "", "unreadable", "no label")], 0, Path())
