"""Image files for tests."""

import io

import numpy as np
import PIL.Image

from dgmd_pipeline.data import decoding


def scene(seed: int = 0, width: int = 96, height: int = 64) -> PIL.Image.Image:
    """Soft colours with edges, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    return coarse.resize((width, height), PIL.Image.Resampling.BICUBIC)


def encode(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # a copy: saving leaves an encoder's options in the image
    return buffer.getvalue()


def turned(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


def stored_as(upright: PIL.Image.Image, kind: str, orientation: int) -> bytes:
    """A file in which the picture lies turned and whose EXIF says so."""
    back = {6: 8, 8: 6}.get(orientation, orientation)  # what undoes it; every other one undoes itself
    stored = upright.transpose(decoding._TRANSPOSE[back]) if back > 1 else upright
    options = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": turned(orientation)}
    return encode(stored, kind, **options)
