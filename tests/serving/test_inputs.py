"""What a served model accepts: image files and pixels, from Python and from JSON."""

import base64
import concurrent.futures
import io
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from conftest import picture
from support.images import encode, encode_with_orientation, scene

from dgmd_pipeline.data import encoding, limits
from dgmd_pipeline.serving import inputs

WIDTH, HEIGHT = 24, 16
JPEG = encode_with_orientation(scene(), "JPEG", 6)
TEXT = base64.b64encode(JPEG).decode()
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
PIXELS[0, 0, 0] = 0, 128, 255


@pytest.fixture
def network():
    return network_for("letterbox")


def network_for(fit):
    """What the module reads of a Keras model, without Keras: tests/training/test_networks.py uses real ones."""
    resizing = SimpleNamespace(
        height=HEIGHT,
        width=WIDTH,
        crop_to_aspect_ratio=fit == "crop",
        pad_to_aspect_ratio=fit == "letterbox",
    )
    return SimpleNamespace(get_layer={"resizing": resizing}.__getitem__)


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_a_file_becomes_the_pixels_of_its_record(fit, tmp_path):
    (tmp_path / "x").write_bytes(JPEG)
    record = PIL.Image.open(io.BytesIO(encoding.encode(tmp_path / "x", WIDTH, HEIGHT, fit)))
    assert np.array_equal(inputs.read(JPEG, network_for(fit)), np.asarray(record))


@pytest.mark.parametrize(
    "sent",
    [
        JPEG, TEXT, [JPEG], (TEXT,), bytearray(JPEG), [memoryview(JPEG)], base64.encodebytes(JPEG).decode(),
        np.array([JPEG], object), np.array(JPEG, object), np.array([JPEG]), np.array([TEXT]), np.array(TEXT, object),
    ],
    ids=lambda sent: f"{type(sent).__name__} {getattr(sent, 'dtype', '')}",
)  # fmt: skip
def test_files_arrive_in_many_forms(sent, network):
    batch = inputs.to_batch(sent, network)
    assert batch.shape == (1, HEIGHT, WIDTH, 3)
    assert np.array_equal(batch[0], inputs.read(JPEG, network))


def test_bytes_that_end_in_zeros_survive_numpy(network):
    files = [JPEG + bytes(900), encode(scene(1, 8, 8), "BMP")]
    assert np.array_equal(inputs.to_batch(np.array(files), network), inputs.to_batch(files, network))


@pytest.mark.parametrize(
    "sent", [PIXELS, PIXELS.tolist(), PIXELS.astype(object), list(PIXELS)], ids=["array", "JSON", "objects", "list"]
)
def test_pixels_are_passed_on_in_their_size(sent, network):
    batch = inputs.to_batch(sent, network)
    assert batch.dtype == np.uint8
    assert np.array_equal(batch, PIXELS)


@pytest.mark.parametrize(
    "sent, found",
    [
        (PIXELS / 255, "float64 and the shape [2, 5, 7, 3] with values from 0 to 1. Do not scale"),
        ((PIXELS / 255).tolist(), "float64 and the shape [2, 5, 7, 3] with values from 0 to 1. Do not scale"),
        (PIXELS.astype(np.float32) / 127.5 - 1, "float32 and the shape [2, 5, 7, 3] with values from -1 to 1. Do not"),
        (PIXELS.astype(np.float16), "float16 and the shape [2, 5, 7, 3] with values from 0 to 255. Do not scale"),
        (PIXELS.astype(int), "int64 and the shape [2, 5, 7, 3] with values from 0 to 255"),
        ((PIXELS.astype(int) - 9).tolist(), "int64 and the shape [2, 5, 7, 3] with values from -9 to 246"),
        (PIXELS > 9, "bool and the shape [2, 5, 7, 3]"),
        (PIXELS[0], "uint8 and the shape [5, 7, 3]"),
        (PIXELS[..., :1], "uint8 and the shape [2, 5, 7, 1]"),
        (PIXELS[:0], "uint8 and the shape [0, 5, 7, 3]"),
        ([], "float64 and the shape [0]"),
        (None, "object and the shape [1]"),
        ({"b64": TEXT}, "object and the shape [1]"),
        ([PIXELS[0].tolist(), PIXELS[0, :2].tolist()], "a mixture of these, or arrays of different sizes"),
        ([TEXT, PIXELS[0].tolist()], "a mixture of these, or arrays of different sizes"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else type(value).__name__,
)
def test_other_input_is_refused_with_what_was_expected_and_found(sent, found, network):
    with pytest.raises(inputs.InvalidImage) as caught:
        inputs.to_batch(sent, network)
    assert str(caught.value).startswith("Expected image files (bytes, or base64 in JSON), or unscaled pixels (uint8 ")
    assert f"; found {found}" in str(caught.value) or f"; found an array of the type {found}" in str(caught.value)


@pytest.mark.parametrize(
    "sent, reason",
    [
        (b"", "empty file; expected an image in the format JPEG"),
        (JPEG[:-200], "truncated"),
        ("jar.jpeg", "a text that is not base64 (jar.jpeg); expected the content of an image file"),
        ("data:image/jpeg;base64," + TEXT, "a text that is not base64 (data:image/jpeg;base64,"),
        (encode(PIL.Image.new("1", (20_000, 20_000)), "PNG"), "DecompressionBombError"),
    ],
    ids=["empty", "truncated", "name", "data URL", "bomb"],
)
def test_an_unreadable_file_is_named_by_its_place(sent, reason, network):
    with pytest.raises(inputs.InvalidImage) as caught:
        inputs.to_batch([JPEG, sent], network)
    assert str(caught.value).startswith("Image 2 of 2 cannot be read: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_too_large_is_not_decoded(network, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", len(JPEG))
    assert inputs.to_batch([TEXT, JPEG], network).shape == (2, HEIGHT, WIDTH, 3)
    for sent in (JPEG + b"\0", base64.b64encode(JPEG + bytes(9)).decode(), "A" * 2 * len(JPEG)):
        with pytest.raises(inputs.InvalidImage, match=rf"expected (a file of )?at most {len(JPEG):,}"):
            inputs.to_batch([sent], network)


def test_threads_read_at_the_same_time(network):
    files = [picture("cloves", number) for number in range(40)] + [encode(scene(2), "TIFF")] * 40
    limit = PIL.Image.MAX_IMAGE_PIXELS
    one_by_one = inputs.to_batch(files, network)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda data: inputs.read(data, network), files))
    assert np.array_equal(together, one_by_one)
    assert limit == PIL.Image.MAX_IMAGE_PIXELS
