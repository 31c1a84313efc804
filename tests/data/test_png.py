"""What no pixel of a PNG depends on does not make it unreadable."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from support.images import chunk, encode, encode_with_orientation, exif, png, samples, scene

from dgmd_pipeline.data.decoding import open_rgb
from dgmd_pipeline.data.png import without_metadata

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
TEXT = zlib.compress(b"x" * 3_000_000)
XMP = b"XML:com.adobe.xmp\0"
ANIMATION = chunk(b"acTL", struct.pack(">II", 2, 0))


def with_wrong_checksum(whole: bytes) -> bytes:
    return whole[:-1] + bytes([whole[-1] ^ 1])


CHUNKS = {
    "text of 3 MB": chunk(b"zTXt", b"Comment\0\0" + TEXT),
    "XMP data of 3 MB": chunk(b"iTXt", XMP + b"\1\0\0\0" + TEXT),
    "colour profile of 3 MB": chunk(b"iCCP", b"profile\0\0" + TEXT),
    "texts of 70 MB": b"".join(chunk(b"tEXt", b"%d\0" % number + bytes(7_000_000)) for number in range(10)),
    "text with a wrong checksum": with_wrong_checksum(chunk(b"tEXt", b"Comment\0text")),
    "XMP data with a wrong checksum": with_wrong_checksum(chunk(b"iTXt", XMP + b"\0\0\0\0<x/>")),
    "resolution with a wrong checksum": with_wrong_checksum(chunk(b"pHYs", bytes(9))),
    "transparent colour with a wrong checksum": with_wrong_checksum(chunk(b"tRNS", bytes(2))),
    "orientation with a wrong checksum": with_wrong_checksum(chunk(b"eXIf", exif(6).tobytes()[6:])),
    "gamma that is cut": chunk(b"gAMA", b"\0"),
    "unknown compression": chunk(b"iCCP", b"profile\0\7data"),
    "animation with a wrong number": ANIMATION + chunk(b"fcTL", struct.pack(">5I2H2B", 5, 16, 16, 0, 0, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", CHUNKS)
def test_the_pixels_are_read(name, place, tmp_path):
    data = png(GREY, 8, CHUNKS[name]) if place == "before" else png(GREY, 8, after=CHUNKS[name])
    (tmp_path / "x").write_bytes(data)
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "x"))[..., 0], GREY)


def test_a_wrong_checksum_of_the_header_is_damage(tmp_path):
    data = png(GREY, 8)
    (tmp_path / "x").write_bytes(data[:29] + with_wrong_checksum(data[29:33]) + data[33:])
    with pytest.raises(PIL.UnidentifiedImageError, match="bad header checksum in b'IHDR'"):
        open_rgb(tmp_path / "x")


ORIENTED = {
    "eXIf": encode_with_orientation(scene(), "PNG", 6),
    "XMP": png(GREY[:8], 8, chunk(b"iTXt", XMP + b'\0\0\0\0<a tiff:Orientation="6"/>')),
    "XMP after the pixels": png(GREY[:8], 8, after=chunk(b"iTXt", XMP + b'\0\0\0\0<a tiff:Orientation="6"/>')),
    "text": png(GREY[:8], 8, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n9\n" + exif(6).tobytes().hex().encode())),
}


@pytest.mark.parametrize("name", ORIENTED)
def test_the_orientation_is_kept_wherever_pillow_finds_it(name, tmp_path):
    (tmp_path / "x").write_bytes(ORIENTED[name])
    with PIL.Image.open(tmp_path / "x") as image:
        assert open_rgb(tmp_path / "x").size == image.size[::-1]


@pytest.mark.parametrize("name", [name for name in samples() if name.startswith("PNG")])
def test_the_image_is_the_same(name):
    data = samples()[name]
    with PIL.Image.open(io.BytesIO(data)) as before, PIL.Image.open(io.BytesIO(without_metadata(data))) as after:
        assert (after.mode, after.info.get("transparency")) == (before.mode, before.info.get("transparency"))
        assert after.tobytes() == before.tobytes()


def test_a_file_that_is_cut_remains_cut():
    data = encode(scene(), "PNG")
    for length in range(8, len(data), 97):
        assert without_metadata(data[:length]) == data[:length]
