"""Odd modes are read as viewers show them: as the same ramp from black to white."""

import struct

import numpy as np
import PIL.Image
import pytest
from support.images import chunk, encode, png, tiff

from dgmd_pipeline.data.colour_modes import UnknownRange
from dgmd_pipeline.data.decoding import open_rgb

RAMP = np.tile(np.arange(16) * 17, (16, 1)).astype(np.uint8)  # every grey of 4 bits
SHARE = RAMP / 255
U16 = RAMP.astype(np.uint16) * 257
DEFLATE, WHITE_IS_ZERO = {259: 8}, {262: 0}


def pack_12_bits(values: np.ndarray) -> bytes:
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def bmp(alpha: int) -> bytes:
    """A BMP of version 4, with an alpha channel of this value."""
    pixels = np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, alpha)])[::-1].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 16, 16, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


RAMPS = {
    "12 bits": tiff(U16, {258: 12}, pack_12_bits(np.rint(SHARE * 4095))),
    "12 bits, compressed": tiff(U16, {258: 12} | DEFLATE, pack_12_bits(np.rint(SHARE * 4095))),
    "12 bits, the brightest is 240": tiff(U16, {258: 12}, pack_12_bits(RAMP.astype(int) * 240 // 255)),
    "16 bits": tiff(U16),
    "16 bits of which 8 are used": tiff(RAMP.astype("<u2")),
    "16 bits of which 12 are used": tiff(np.rint(SHARE * 4095).astype("<u2")),
    "16 bits of which 8 are used, PNG": png(RAMP, 16),
    "16 bits, white is 0": tiff(65535 - U16, WHITE_IS_ZERO),
    "16 bits, signed": tiff((U16.astype(int) - 32768).astype("<i2")),
    "16 bits, signed, big-endian": tiff((U16.astype(int) - 32768).astype(">i2")),
    "16 bits, signed, big-endian, compressed": tiff((U16.astype(int) - 32768).astype(">i2"), DEFLATE),
    "8 bits, signed": tiff((RAMP.astype(int) - 128).astype("i1")),
    "32 bits": tiff(U16.astype("<u4")),
    "32 bits, signed, big-endian, compressed": tiff(U16.astype(">i4"), DEFLATE),
    "float to 1": tiff(SHARE.astype("<f4")),
    "float to 255": tiff(RAMP.astype("<f4")),
    "float to 1.02": tiff((SHARE * 1.0001).astype("<f4")),
    "float, white is 0": tiff((1 - SHARE).astype("<f4"), WHITE_IS_ZERO),
    "float, big-endian, compressed": tiff(SHARE.astype(">f4"), DEFLATE),
    "grey with premultiplied alpha": tiff(np.dstack([RAMP, np.full_like(RAMP, 255)]), {338: 1}),
    "TIFF with a fourth channel of zeros": tiff(np.dstack([RAMP, RAMP, RAMP, RAMP * 0])),
    "BMP with alpha 0": bmp(0),
    "BMP with alpha 255": bmp(255),
}


def read(data: bytes, tmp_path) -> list[int]:
    """The grey values of a row."""
    (tmp_path / "x").write_bytes(data)
    pixels = np.asarray(open_rgb(tmp_path / "x"))
    assert (pixels == pixels[:1, :, :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("name", RAMPS)
def test_the_values_become_the_greys_that_viewers_show(name, tmp_path):
    scale = 240 / 4095 if "brightest" in name else 1
    assert read(RAMPS[name], tmp_path) == pytest.approx(RAMP[0] * scale, abs=1 if scale < 1 else 0)


def test_16_bit_grey_keeps_its_gradation(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 16).reshape(16, 256).astype(np.uint16)
    (tmp_path / "x.png").write_bytes(encode(PIL.Image.fromarray(ramp), "PNG"))
    grey = np.asarray(open_rgb(tmp_path / "x.png"))[..., 0]
    assert np.abs(grey - ramp / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff((SHARE * 3071).astype("<f4")), "floating-point values are between 0 and 3071"),
        (tiff((SHARE * 2 - 1).astype("<f4")), "floating-point values are between -1 and 1"),
        (tiff((SHARE * 7).astype("<f4")), "floating-point values are between 0 and 7"),
        (tiff(RAMP.astype("<i2") * 16 - 1024), "signed 16-bit values are from -1,024 to 3,056"),
        (tiff(U16.astype("<u4") * 65537), "32-bit values are from -1 to 2,147,450,879|from 0 to 4,294,967,295"),
        (tiff(U16.astype("<i4") - 5), "32-bit values are from -5 to 65,530"),
        (tiff(np.dstack([RAMP] * 3).astype("<u2")), "16-bit colours are nearly black, at most 255 of 65,535"),
        (png(np.dstack([RAMP] * 3), 16), "16-bit colours are nearly black, at most 255 of 65,535"),
    ],
)
def test_values_without_a_known_range_are_an_error(data, message, tmp_path):
    with pytest.raises(UnknownRange, match=f"{message}.*Convert it to 8 bits"):
        read(data, tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white(bits, tmp_path):
    top = 2**bits - 1
    samples = np.rint(SHARE * top).astype(int)
    shown = [round(int(value) * 255 / top) for value in samples[0]]
    for transparent in {0, top // 2, top}:
        data = png(samples, bits, chunk(b"tRNS", struct.pack(">H", transparent)))
        expected = [255 if value == transparent else grey for value, grey in zip(samples[0], shown, strict=True)]
        assert read(data, tmp_path) == expected, transparent


def test_the_transparent_colour_of_a_png_with_16_bits_is_white(tmp_path):
    data = png(np.dstack([U16] * 3), 16, chunk(b"tRNS", struct.pack(">HHH", *[U16[0, 1]] * 3)))
    assert read(data, tmp_path) == [0, 255, *RAMP[0, 2:]]


def test_black_with_16_bits_on_a_transparent_background_is_not_taken_for_a_black_image(tmp_path):
    assert read(png(np.dstack([U16 * 0] * 3 + [U16]), 16), tmp_path) == (255 - RAMP[0].astype(int)).tolist()


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
        expected = (227, 127, 127) if name == "half" else (255, 255, 255)
        assert open_rgb(tmp_path / name).getpixel((4, 4)) == expected, name
