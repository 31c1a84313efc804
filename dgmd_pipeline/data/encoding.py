"""From an image file to the bytes that a record holds: decoded in full, fitted to the model's size, encoded losslessly.

A record holds exactly what the served model's first layers (`model.fitting`) make of the original file. The resizing
therefore works in floating point and rounds once: Pillow's own, on 8 bits, rounds after each of its two passes.
docs/measurements/records.md says what other ways to decode, resize and store cost, and what they do to the
model's answers.
"""

import io
from pathlib import Path

import numpy as np
import PIL.Image

from dgmd_pipeline.data import decoding
from dgmd_pipeline.manifest import Fit

FORMAT = "WEBP"
BAND = 2**18  # pixels that are held in floating point at a time: less memory to fill, half the time at 12 megapixels


def encode(path: Path, width: int, height: int, fit: Fit) -> bytes:
    """Return the image of a file, `fitted`, as a lossless WebP. Raises what `images.open_rgb` and `fitted` raise."""
    pixels = PIL.Image.fromarray(fitted(decoding.open_rgb(path), width, height, fit))
    file = io.BytesIO()
    pixels.save(file, FORMAT, lossless=True, quality=0, method=0)  # the fastest: a slower one saves a twentieth
    return file.getvalue()


def fitted(image: PIL.Image.Image, width: int, height: int, fit: Fit) -> np.ndarray:
    """Return an RGB image resized to `width` x `height` pixels, bilinear and antialiased: uint8 [height, width, 3].

    "stretch" changes the aspect ratio. "letterbox" keeps it and adds black bars. "crop" keeps it and cuts off two
    sides. Bars and cuts are whole pixels of `image`: as many as `keras.layers.Resizing` adds with
    `pad_to_aspect_ratio` and cuts off with `crop_to_aspect_ratio`.
    Raises PIL.Image.DecompressionBombError where the first pass alone would make more than `images.MAX_PIXELS`.
    """
    # The size that has the target's aspect ratio, for the image's height and for its width. Keras divides in float32.
    wide = int(np.float32(image.height * width) / np.float32(height))
    tall = int(np.float32(image.width * height) / np.float32(width))
    # The first pass is along the axis without bars; of a high and narrow image it would make too many pixels.
    narrow = width * image.height > decoding.MAX_PIXELS > height * image.width
    if wide > image.width if fit == "letterbox" else narrow:
        return fitted(image.transpose(PIL.Image.Transpose.TRANSPOSE), height, width, fit).transpose(1, 0, 2)
    bar = max(tall - image.height, 0) // 2 if fit == "letterbox" else 0
    if fit == "crop":
        image = _centre(image, max(min(image.width, wide), 1), max(min(image.height, tall), 1))
    if width * (image.height + 2 * bar) > decoding.MAX_PIXELS:
        raise PIL.Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels are too narrow to be resized to {width} x {height}"
        )
    planes = [_resized(plane, width, height, bar) for plane in image.split()]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


def _centre(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resized(plane: PIL.Image.Image, width: int, height: int, bar: int) -> np.ndarray:
    """Return one colour (mode L), with `bar` rows of 0 above and below, resized: float32 [height, width], 0 to 255."""
    bilinear = PIL.Image.Resampling.BILINEAR
    narrow = PIL.Image.new("F", (width, plane.height + 2 * bar))
    rows = max(BAND // plane.width, 1)
    for top in range(0, plane.height, rows):
        band = plane.crop((0, top, plane.width, min(top + rows, plane.height))).convert("F")
        narrow.paste(band.resize((width, band.height), bilinear), (0, bar + top))
    return np.asarray(narrow.resize((width, height), bilinear))
