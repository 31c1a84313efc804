"""What an image may cost is known before it is decoded, and enforced while it is."""

import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from functools import partial

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from support.images import encode, put, scene

from dgmd_pipeline.data import limits
from dgmd_pipeline.data.decoding import open_rgb
from dgmd_pipeline.data.inspection import find, inspect
from dgmd_pipeline.errors import WorkerDied
from dgmd_pipeline.workflow import executors
from dgmd_pipeline.workflow.worker import reserve_memory


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def pool():
    pool = executors.ProcessExecutor(2)
    yield pool
    pool.close()


def jpeg_with_scans(count: int, size: int = 64, **options: object) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(scene(0, size, size), "JPEG", progressive=True, **options)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    tables = data.rfind(b"\xff\xc4", starts[-2], starts[-1])
    last = data[tables if tables > 0 else starts[-1] : -2]
    return data[:-2] + last * (count - len(starts)) + data[-2:]


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP of one colour, in 34 bytes or little more."""
    # The transforms and codes of a one-pixel image hold for any size: only the header has the size.
    data = bytearray(encode(PIL.Image.new("RGB", (1, 1), "red"), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little")
    data[at : at + 4] = (bits & 0xF0000000 | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(data)


def tiff_with_tile(width: int, height: int, tile: int) -> bytes:
    """A TIFF of these pixels in one tile of `tile` x `tile` pixels."""
    data = zlib.compress(bytes(tile * tile), 9)
    tags = ((256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 8))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (*tags, (325, len(data))))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


# Scans


def test_the_scans_of_the_first_image_are_counted():
    image = scene()
    thumbnail = jpeg_with_scans(90, 16)
    several = jpeg_with_scans(30)
    assert limits.count_scans(encode(image, "JPEG")) == 1
    assert limits.count_scans(encode(image, "JPEG", restart_marker_blocks=1, quality=100)) == 1
    assert limits.count_scans(encode(image, "JPEG", comment=thumbnail)) == 1
    assert limits.count_scans(encode(image, "JPEG", progressive=True)) == 10
    assert limits.count_scans(encode(image.convert("L"), "JPEG", progressive=True)) == 6
    assert limits.count_scans(encode(image, "JPEG", progressive=True, comment=thumbnail)) == 10
    assert limits.count_scans(several) == 30
    assert limits.count_scans(several + several) == 30  # a camera's file of two images
    assert limits.count_scans(several[: len(several) // 2]) < 30
    assert limits.count_scans(b"") == limits.count_scans(b"\xff\xd8") == 0


def test_a_baseline_jpeg_with_a_scan_for_each_component_counts_them_all():
    data = encode(scene(), "JPEG")
    at = data.index(b"\xff\xda")
    for_one = data[:at] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\0" * 50
    assert limits.count_scans(for_one + b"\xff\xda\0\x08\x01\x02\x11\0\x3f\0" * 40) == 41


@pytest.mark.parametrize("count", [limits.MAX_SCANS, limits.MAX_SCANS + 1, 2_000])
def test_a_jpeg_of_more_scans_than_encoders_write_is_rejected(count, raw, tmp_path):
    put(raw, "a/x.jpg", jpeg_with_scans(count))
    usable, rejected = inspect(find(raw), raw, tmp_path)
    if count <= limits.MAX_SCANS:
        assert [row.path for row in usable] == ["a/x.jpg"]
    else:
        assert [row[2:] for row in rejected] == [
            ("too many scans", "more than 100 scans, which no known encoder writes")
        ]
        with pytest.raises(PIL.Image.DecompressionBombError):
            open_rgb(raw / "a/x.jpg")


# Memory


def images_of_4_megapixels() -> dict[str, bytes]:
    image = PIL.Image.new("RGB", (2000, 2000), (10, 20, 30))
    image.paste(scene(0, 200, 200), (0, 0))
    grey, alpha = image.convert("L"), image.convert("RGBA")
    alpha.putalpha(grey)
    wide = np.asarray(grey).astype(np.uint16) * 257
    lzw, fast = {"compression": "tiff_lzw"}, {"compress_level": 1}
    return {
        "JPEG": encode(image, "JPEG"),
        "JPEG 4:4:4 progressive": encode(image, "JPEG", progressive=True, subsampling=0),
        "JPEG CMYK progressive": encode(image.convert("CMYK"), "JPEG", progressive=True),
        "PNG": encode(image, "PNG", **fast),
        "PNG transparent colour": encode(image, "PNG", transparency=(1, 2, 3), **fast),
        "PNG grey and alpha": encode(alpha.convert("LA"), "PNG", **fast),
        "PNG 16 bits": encode(PIL.Image.fromarray(wide), "PNG", **fast),
        "WEBP": encode(image, "WEBP", method=0),
        "WEBP lossless alpha": encode(alpha, "WEBP", lossless=True, method=0, quality=0),
        "GIF transparent": encode(image.quantize(16), "GIF", transparency=3),
        "BMP": encode(image, "BMP"),
        "TIFF": encode(image, "TIFF"),
        "TIFF alpha": encode(alpha, "TIFF", **lzw),
        "TIFF CMYK": encode(image.convert("CMYK"), "TIFF", **lzw),
        "TIFF LAB": encode(image.convert("LAB"), "TIFF", **lzw),
        "TIFF 16 bits": encode(PIL.Image.fromarray(wide), "TIFF", **lzw),
        "TIFF 32 bits": encode(PIL.Image.fromarray(wide.astype(np.int32)), "TIFF", **lzw),
        "TIFF float": encode(PIL.Image.fromarray(wide / np.float32(65535)), "TIFF", **lzw),
    }


USE = """
import sys
from pathlib import Path
from dgmd_pipeline.data import encoding
from dgmd_pipeline.data.inspection import find, inspect
from dgmd_pipeline.workflow.worker import limit_memory
raw = Path(sys.argv[1])
for file in (raw / "small").iterdir():
    encoding.encode(file, 120, 160, "stretch")  # what stays in memory afterwards
for file in find(raw):
    def reserve(needed):
        return limit_memory(needed - (raw / file.path).stat().st_size + 2_000_000)  # the file has been read
    print(file.path, [row.detail for row in inspect([file], raw, raw, reserve_memory=reserve)[1]])
    encoding.encode(raw / file.path, 120, 160, "letterbox", reserve)
"""


def test_an_image_needs_no_more_memory_than_is_computed_from_its_header(raw):
    for name, data in images_of_4_megapixels().items():
        put(raw, f"a/{name}", data)
    put(raw, "small/x", encode(scene(), "PNG"))
    # Freed memory goes back to the system, so that the next image cannot use it without asking.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", USE, raw], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[]" in done.stdout and not re.search(r"\[.+\]", done.stdout), done.stdout


def test_pixels_that_need_too_much_memory_are_rejected_before_they_are_decoded(raw, tmp_path):
    put(raw, "a/x.webp", webp_of(9_990, 9_990))
    (raw / "a" / "y.tif").write_bytes(float_tiff_header(9_990))
    _, rejected = inspect(find(raw), raw, tmp_path)
    assert [row.reason for row in rejected] == ["too many pixels"] * 2
    assert "99800100 pixels" in rejected[0].detail
    assert rejected[1].detail == (
        "9990 x 9990 pixels of TIFF (mode F) need 1896 MB of memory; expected at most 1250 MB"
    )


def float_tiff_header(size: int) -> bytes:
    tags = (
        (256, size),
        (257, size),
        (258, 32),
        (259, 5),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, size),
        (279, 1),
        (339, 3),
    )
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_an_image_that_needs_more_memory_than_the_machine_has_is_rejected_with_advice(raw, tmp_path):
    put(raw, "a/large.png", encode(PIL.Image.new("L", (5000, 5000)), "PNG"))
    put(raw, "a/small.png", encode(scene(), "PNG"))
    pool = executors.ProcessExecutor(2, 600_000_000)  # 210 MB for images
    usable, (row,) = inspect(find(raw), raw, tmp_path, pool.map, reserve_memory)
    pool.close()
    assert [row.path for row in usable] == ["a/small.png"]
    assert row[:3] == ("a/large.png", "a", "too little memory")
    assert re.match(r"needs 225 MB of memory, .* may use 208 MB.*--force inspect", row.detail)


def test_a_header_that_conceals_what_decoding_needs_costs_its_file_only(raw, tmp_path, pool):
    put(raw, "a/tile.tif", tiff_with_tile(16, 16, 16_384))  # 268 MB for 256 pixels
    put(raw, "a/x.png", encode(scene(), "PNG"))
    usable, (row,) = inspect(find(raw), raw, tmp_path, pool.map, reserve_memory)
    assert [row.path for row in usable] == ["a/x.png"]
    assert row[:3] == ("a/tile.tif", "a", "unreadable")


# Processes that die


def die_at(file, path, function, number):
    if file.path == path:
        os.kill(os.getpid(), number)
        signal.pause()
    return function(file)


@pytest.mark.parametrize(
    ("number", "detail"),
    [
        (signal.SIGKILL, "the process was ended by SIGKILL, most likely because memory ran out"),
        (signal.SIGPROF, "decoding took more than 20 s of processor time"),
    ],
)
def test_a_process_that_dies_costs_the_image_that_it_decoded(number, detail, raw, tmp_path, pool):
    for index in range(20):
        put(raw, f"a/{index:02}.png", encode(scene(index), "PNG"))

    def map_(function, files):
        return pool.map(partial(die_at, path="a/07.png", function=function, number=number), files, 5)

    usable, rejected = inspect(find(raw), raw, tmp_path, map_, reserve_memory)
    assert [row.path for row in usable] == [f"a/{index:02}.png" for index in range(20) if index != 7]
    assert [tuple(row) for row in rejected] == [("a/07.png", "a", "unreadable", detail)]


def compute_forever(_):
    limits.MAX_SECONDS = 0.1
    with limits.limit_time():
        return sum(range(10**15))  # in C, and with the interpreter's lock


def wait_forever(_):
    limits.MAX_WAIT = 0.1
    with limits.limit_time():
        os.read(os.pipe()[0], 1)


def test_decoding_that_does_not_end_is_ended(pool):
    computed, waited = (next(pool.map(function, [0])) for function in (compute_forever, wait_forever))
    assert isinstance(computed, WorkerDied) and computed.by_timer
    assert isinstance(waited, WorkerDied) and str(waited) == "the process was ended by SIGALRM"
    with limits.limit_time():  # this process has no limit
        assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
