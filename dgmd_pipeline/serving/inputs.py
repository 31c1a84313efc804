"""Converts a request, which has image files or pixels, to the input of the network.

Image files are decoded, and resized to the network's input size, as for training.

A registered model carries this module (see `source`). MLflow's server calls the module from several threads.
"""

import base64
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from dgmd_pipeline.data import decoding, encoding, limits
from dgmd_pipeline.formatting import one_line

if TYPE_CHECKING:
    import keras

    from dgmd_pipeline.manifest import Fit

EXPECTED = "image files (bytes, or base64 in JSON), or unscaled pixels (uint8 [images, height, width, 3], 0 to 255)"
_FILES = (bytes, bytearray, memoryview, str)
# One image is decoded at a time, because `decoding.guard` changes settings of the process. This also limits the memory.
_decoding = threading.Lock()


class InvalidImage(ValueError):
    """The input is not what a model accepts. The message says what was expected and found, or what is damaged."""


def input_size(network: "keras.Model") -> tuple[int, int]:
    """Return the height and width in pixels to which a servable model resizes images.

    A servable model is a complete Keras network that takes unscaled pixels of any size and returns probabilities.
    """
    layer = network.get_layer("resizing")
    return layer.height, layer.width


def input_fit(network: "keras.Model") -> "Fit":
    """Return how a servable model resizes images whose aspect ratio is not that of its input size."""
    layer = network.get_layer("resizing")
    if layer.crop_to_aspect_ratio:
        return "crop"
    return "letterbox" if layer.pad_to_aspect_ratio else "stretch"


def read(data: bytes, network: "keras.Model") -> np.ndarray:
    """Decode an image file and fit it to the input of a servable model: uint8 [height, width, 3].

    A TFRecord for training contains the same pixels for this file. Raises InvalidImage, also for a file that exceeds
    one of `limits`.
    """
    if len(data) > limits.MAX_BYTES:
        raise InvalidImage(f"a file of {len(data):,} bytes; expected at most {limits.MAX_BYTES:,}")
    height, width = input_size(network)
    try:
        with _decoding:
            return encoding.resize(decoding.read_rgb(data), width, height, input_fit(network))
    except (*decoding.DAMAGED, PIL.Image.DecompressionBombError) as error:
        raise InvalidImage(decoding.describe(error)) from error


def to_batch(values: Any, network: "keras.Model") -> np.ndarray:
    """Return the input of one request as a batch for a servable model: uint8 [images, height, width, 3].

    `values` is an image file (bytes or base64), a sequence of image files, or pixels (uint8 [images, height, width, 3])
    of any size, which the model itself resizes. Pixels from JSON are whole numbers from 0 to 255, in nested lists or in
    a NumPy array of the type `object`. Raises InvalidImage.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind not in "OSU":
        return _check_pixels(values)
    items = _list(values)
    if items and all(isinstance(item, _FILES) for item in items):
        return np.stack([_read_one(item, network, number, len(items)) for number, item in enumerate(items, 1)])
    try:
        pixels = np.array(items)
    except ValueError:
        raise InvalidImage(f"Expected {EXPECTED}; found a mixture of these, or arrays of different sizes.") from None
    if pixels.dtype.kind in "iu" and pixels.size and pixels.min() >= 0 and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    return _check_pixels(pixels)


def _list(values: Any) -> list[Any]:
    """Return the images of a request as a list. Each element is a file or a nested list of numbers."""
    if isinstance(values, np.ndarray):
        found = values.reshape(-1 if values.ndim == 0 else values.shape).tolist()
        # NumPy removes zero bytes at the end of each file, because it pads shorter files with zeros. `ljust` adds zero
        # bytes again. It may add more than the file had, which does no harm in any image format.
        return [item.ljust(values.itemsize, b"\0") for item in found] if values.dtype.kind == "S" else found
    return [values] if isinstance(values, _FILES) or not isinstance(values, Sequence) else list(values)


def _read_one(item: Any, network: "keras.Model", number: int, count: int) -> np.ndarray:
    """Read one of several files, given as bytes or base64."""
    try:
        return read(_from_base64(item) if isinstance(item, str) else bytes(item), network)
    except InvalidImage as error:
        raise InvalidImage(f"Image {number} of {count} cannot be read: {error}.") from error


def _from_base64(text: str) -> bytes:
    if 3 * len(text) > 4.1 * limits.MAX_BYTES:  # base64 has 4 characters for 3 bytes, and perhaps line breaks
        raise InvalidImage(f"{len(text):,} characters of base64; expected a file of at most {limits.MAX_BYTES:,} bytes")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise InvalidImage(
            f"a text that is not base64 ({one_line(text[:40])}); expected the content of an image file"
        ) from None


def _check_pixels(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3 and pixels.size:
        return pixels
    found = f"an array of the type {pixels.dtype} and the shape {list(pixels.shape)}"
    if pixels.dtype.kind in "iuf" and pixels.size:
        found += f" with values from {pixels.min():g} to {pixels.max():g}"
    scaled = ". Do not scale pixels: the model does it" if pixels.dtype.kind == "f" else ""
    raise InvalidImage(f"Expected {EXPECTED}; found {found}{scaled}.")
