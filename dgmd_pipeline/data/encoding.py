"""Image file -> the bytes that a record stores: decoded in full, resized to the model's input, losslessly encoded.

A record stores exactly what the first layers of the served model (training/networks.py) make of the original file.
Therefore the resizing works in floating point and rounds once. Pillow's own resizing of 8-bit images rounds after each
of its two passes. docs/measurements/records.md compares other ways to decode, resize and store, and their effect on the
model's predictions.
"""

import io
from pathlib import Path

import numpy as np
import PIL.Image

from dgmd_pipeline.data import decoding
from dgmd_pipeline.manifest import Fit

FORMAT = "WEBP"
BAND_PIXELS = 2**18  # converted to floating point at a time; halves the time of a 12-megapixel image


def encode(path: Path, width: int, height: int, fit: Fit) -> bytes:
    """Return the image of a file, resized with `resize`, as a lossless WebP.

    Raises what `decoding.open_rgb` and `resize` raise.
    """
    pixels = PIL.Image.fromarray(resize(decoding.open_rgb(path), width, height, fit))
    file = io.BytesIO()
    pixels.save(file, FORMAT, lossless=True, quality=0, method=0)  # the fastest; slower methods save 5 % of the bytes
    return file.getvalue()


def resize(image: PIL.Image.Image, width: int, height: int, fit: Fit) -> np.ndarray:
    """Return an RGB image resized to `width` x `height` pixels, bilinear and antialiased: uint8 [height, width, 3].

    "stretch" changes the aspect ratio. "letterbox" keeps it and adds black bars. "crop" keeps it and cuts off two
    edges. Bars and edges are whole pixels of `image`, as many as `keras.layers.Resizing` adds with
    `pad_to_aspect_ratio` and cuts off with `crop_to_aspect_ratio`.
    Raises PIL.Image.DecompressionBombError if the first pass would produce more than `decoding.MAX_PIXELS` pixels.
    """
    # The width and the height that give the image the target's aspect ratio. Keras divides in float32.
    target_width = int(np.float32(image.height * width) / np.float32(height))
    target_height = int(np.float32(image.width * height) / np.float32(width))
    # The first pass changes the width, along an axis without bars. So the image is transposed if its bars are left and
    # right, or if it is so narrow and tall that the first pass would produce too many pixels.
    narrow = width * image.height > decoding.MAX_PIXELS > height * image.width
    if target_width > image.width if fit == "letterbox" else narrow:
        return resize(image.transpose(PIL.Image.Transpose.TRANSPOSE), height, width, fit).transpose(1, 0, 2)
    bar = max(target_height - image.height, 0) // 2 if fit == "letterbox" else 0
    if fit == "crop":
        image = _crop_centre(image, max(min(image.width, target_width), 1), max(min(image.height, target_height), 1))
    if width * (image.height + 2 * bar) > decoding.MAX_PIXELS:
        raise PIL.Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels are too narrow to be resized to {width} x {height}"
        )
    channels = [_resize_channel(channel, width, height, bar) for channel in image.split()]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


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
