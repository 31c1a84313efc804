"""Encodes an image file for a record: decodes it in full, resizes it to the model's input, compresses it without loss.

A record stores the pixels that the first layers of the served model (training/networks.py) compute from the original
file. Therefore the resizing works in floating point and rounds once. Pillow's own resizing of 8-bit images rounds after
each of its two passes. docs/measurements/records.md compares other ways to decode, resize and store, and their effect
on the model's predictions.
"""

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from dgmd_pipeline.data import decoding, limits

if TYPE_CHECKING:
    from dgmd_pipeline.manifest import Fit

FORMAT = "WEBP"
RECORD_MEMORY = 48  # measured bytes for each pixel of a record, for floating-point channels and the encoder
# `_resize_channel` converts bands of this many pixels to floating point, one band after the other. This halves the time
# for an image of 12 megapixels.
BAND_PIXELS = 2**18


def encode(
    path: Path, width: int, height: int, fit: "Fit", reserve_memory: limits.ReserveMemory = contextlib.nullcontext
) -> bytes:
    """Return the image of a file, resized with `resize`, as a lossless WebP.

    `reserve_memory` is entered with the number of needed bytes.
    Raises what `decoding.open_rgb`, `resize` and `reserve_memory` raise.
    """
    data, file = path.read_bytes(), io.BytesIO()
    with decoding.guard(data), limits.limit_time():
        images = [decoding.open_header(data)]
        needed = limits.check(images[0], data) + _memory_to_resize(images[0].size, width, height)
        with reserve_memory(needed):
            # `pop` leaves no reference to the unconverted image, so its memory is freed after the conversion.
            pixels = PIL.Image.fromarray(resize(decoding.to_rgb(images.pop()), width, height, fit))
            # These settings are the fastest. Slower settings save 5 % of the bytes.
            pixels.save(file, FORMAT, lossless=True, quality=0, method=0)
    return file.getvalue()


def resize(image: PIL.Image.Image, width: int, height: int, fit: "Fit") -> np.ndarray:
    """Return an RGB image resized to `width` x `height` pixels, bilinear and antialiased: uint8 [height, width, 3].

    The fit "stretch" changes the aspect ratio. "letterbox" keeps it and adds black bars. "crop" keeps it and cuts off
    two edges. The widths of bars and edges are whole numbers of pixels of `image`. `keras.layers.Resizing` adds the
    same bars with `pad_to_aspect_ratio`, and cuts off the same edges with `crop_to_aspect_ratio`.

    The resizing has two passes. One pass changes the width, and the other pass changes the height. Raises
    PIL.Image.DecompressionBombError if the first pass would produce more than `limits.MAX_PIXELS` pixels.
    """
    # With `target_width` and its own height, the image would have the aspect ratio of the target. With `target_height`
    # and its own width, the image would have this aspect ratio, too. The division is in float32, as in Keras.
    target_width = int(np.float32(image.height * width) / np.float32(height))
    target_height = int(np.float32(image.width * height) / np.float32(width))
    # The first pass changes the width and cannot add bars at the left and right. So the image is transposed if it needs
    # such bars, or if it is so narrow and tall that the first pass would produce too many pixels.
    narrow = width * image.height > limits.MAX_PIXELS > height * image.width
    if target_width > image.width if fit == "letterbox" else narrow:
        # A separate statement, so that the original image is freed before the call.
        image = image.transpose(PIL.Image.Transpose.TRANSPOSE)
        return resize(image, height, width, fit).transpose(1, 0, 2)
    bar = max(target_height - image.height, 0) // 2 if fit == "letterbox" else 0
    if fit == "crop":
        image = _crop_centre(image, max(min(image.width, target_width), 1), max(min(image.height, target_height), 1))
    if width * (image.height + 2 * bar) > limits.MAX_PIXELS:
        raise PIL.Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels are too narrow to be resized to {width} x {height}"
        )
    channels = [_resize_channel(channel, width, height, bar) for channel in image.split()]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _memory_to_resize(size: tuple[int, int], width: int, height: int) -> int:
    """Return how many bytes `resize` and the encoder need at most, in addition to the bytes of an image of `size`."""
    first_pass = min(max(width * size[1], height * size[0]), limits.MAX_PIXELS)
    return 4 * first_pass + RECORD_MEMORY * width * height


def _crop_centre(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize_channel(channel: PIL.Image.Image, width: int, height: int, bar: int) -> np.ndarray:
    """Return one channel (mode L) with `bar` black rows above and below, resized: float32 [height, width], 0 to 255."""
    bilinear = PIL.Image.Resampling.BILINEAR
    narrowed = PIL.Image.new("F", (width, channel.height + 2 * bar))
    rows = max(BAND_PIXELS // channel.width, 1)
    for top in range(0, channel.height, rows):
        band = channel.crop((0, top, channel.width, min(top + rows, channel.height))).convert("F")
        narrowed.paste(band.resize((width, band.height), bilinear), (0, bar + top))
    return np.asarray(narrowed.resize((width, height), bilinear))
