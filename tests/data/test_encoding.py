"""A record stores what the served model's own layers make of the original file, to the level."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.images import encode, encode_with_orientation, exif, scene, upright

from dgmd_pipeline.data import decoding, encoding
from dgmd_pipeline.training import networks

SIZE = (64, 48)  # of the records, width and height
FITS = ["stretch", "letterbox", "crop"]
SIZES = {
    "landscape": (300, 210),
    "portrait": (171, 300),
    "large": (1027, 771),
    "square": (65, 65),
    "the record's size": SIZE,
    "half the size": (32, 24),
    "tiny": (8, 8),
    "wide": (3000, 8),
    "tall": (8, 3000),
}


def photo(width: int = 300, height: int = 210) -> PIL.Image.Image:
    """A scene with sensor noise."""
    smooth = np.asarray(scene(0, width, height), float)
    noise = np.random.default_rng(0).normal(0, 5, smooth.shape)
    return PIL.Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


@cache
def layers(fit: str, width: int = SIZE[0], height: int = SIZE[1]):
    """The first layers of a served model: their output before and after rounding."""
    import keras

    images = keras.Input((None, None, 3), dtype="uint8")
    network = keras.Model(images, networks.fit_images(images, height, width, fit))
    return keras.Model(images, [network.get_layer("resizing").output, network.output])


def stored(path: Path, fit: str, size: tuple[int, int] = SIZE) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(encoding.encode(path, *size, fit))) as image:
        assert (image.format, image.mode) == ("WEBP", "RGB")
        return np.asarray(image)


def assert_served(pixels: np.ndarray, original: np.ndarray, fit: str) -> None:
    """Compare with the layers. A value that float32 cannot distinguish from a half may be rounded up or down."""
    before, served = (output.numpy()[0] for output in layers(fit)(original[np.newaxis]))
    assert pixels.shape == served.shape
    assert np.array_equal(served, np.rint(before))
    assert np.abs(pixels - before).max() <= 0.51


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", SIZES)
def test_a_record_stores_what_the_served_model_makes_of_the_original(name, fit, tmp_path):
    (tmp_path / "x").write_bytes(encode(photo(*SIZES[name]), "PNG"))
    assert_served(stored(tmp_path / "x", fit), np.asarray(photo(*SIZES[name])), fit)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind, orientation", [("JPEG", 1), *(("JPEG", n) for n in range(2, 9)), ("PNG", 6)])
def test_the_same_holds_for_a_file_with_an_exif_orientation_that_predict_opens(kind, orientation, fit, tmp_path):
    data = encode_with_orientation(photo(400, 240), kind, orientation)
    (tmp_path / "x").write_bytes(data)
    opened = np.asarray(decoding.open_rgb(tmp_path / "x"))
    assert np.array_equal(opened, upright(data))
    assert_served(stored(tmp_path / "x", fit), opened, fit)


def test_stretch_letterbox_and_crop_differ_as_documented(tmp_path):
    white = PIL.Image.new("RGB", (60, 120), "white")
    white.paste("red", (0, 0, 60, 10))
    stretched, boxed, cropped = (encoding.resize(white, 40, 40, fit) for fit in FITS)
    assert stretched[0].tolist() == [[255, 0, 0]] * 40  # the red top over the whole width
    assert boxed[0, 20].tolist() == [255, 0, 0] and not boxed[:, :9].any() and not boxed[:, -9:].any()
    assert (cropped == 255).all()  # 30 pixels above are cut off


@pytest.mark.parametrize("fit", FITS)
def test_an_image_resized_in_bands_has_no_seams(fit, monkeypatch):
    image = photo()
    whole = encoding.resize(image, *SIZE, fit)
    monkeypatch.setattr(encoding, "BAND_PIXELS", 7 * image.width)
    assert np.array_equal(encoding.resize(image, *SIZE, fit), whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_damaged_image_raises_a_documented_error(kind, tmp_path):
    data = encode(photo(), kind)
    for name, content in {"garbage": b"nothing", "cut": data[: len(data) // 2], "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match="^text; expected|truncated|^empty file; expected"):
            encoding.encode(tmp_path / name, *SIZE, "stretch")


def test_an_image_with_too_many_pixels_is_not_decoded(tmp_path):
    data = bytearray(encode(photo(), "JPEG", exif=exif(6)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x7f\xff\x7f\xff"  # a header of 32,767 x 32,767 pixels
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PIL.Image.DecompressionBombError):
        encoding.encode(tmp_path / "x", *SIZE, "stretch")


def test_bars_that_would_make_too_many_pixels_are_an_error():
    with pytest.raises(PIL.Image.DecompressionBombError, match="too narrow to be resized"):
        encoding.resize(PIL.Image.new("RGB", (1, 2_000_000)), *SIZE, "letterbox")


def test_a_narrow_image_is_resized_along_its_long_side_first():
    column = np.repeat(np.arange(192, dtype=np.uint8), 10_000)[:, None, None]
    pixels = encoding.resize(PIL.Image.fromarray(np.repeat(column, 3, axis=2)), *SIZE, "stretch")
    expected = np.arange(192).reshape(SIZE[1], 4).mean(axis=1)
    np.testing.assert_allclose(pixels[:, 0, 0], expected, atol=1)
    assert (pixels == pixels[:, :1, :1]).all()
