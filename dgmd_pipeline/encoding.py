"""From a picture file to the JPEG that a record holds: decoded no larger than is needed, stretched, encoded.

The records hold what the model would make of the original, so the encoding has to lose next to nothing: against
`keras.layers.Resizing` of the full decode, a mean difference of at most 1 level and a 99th percentile of at most 5.
Measured over 60 photographs of about 160 kB (640 x 427 to 1200 x 900, noise of 1 to 6 levels) at 256 x 192, CPU time
for one picture; "over" is the share of single pictures that miss the mark:

    encoding          bytes   write ms   read ms (tf.io)   mean    p99   over
    JPEG 95, 4:2:0   20,800       0.22              0.54   2.25   13.6    100 %
    JPEG 95, 4:4:4   28,200       0.32              0.55   1.52    7.4    100 %
    JPEG 97, 4:4:4   36,600       0.33              0.61   1.16    5.2     95 %
    JPEG 98, 4:4:4   42,400       0.35              0.68   0.96    4.0     25 %
    JPEG 99, 4:4:4   55,000       0.40              0.78   0.73    2.8      0 %   <- this one
    JPEG 100, 4:4:4  68,600       0.48              0.91   0.58    2.4      0 %
    PNG, level 1     86,800       4.2               1.7    0.26    0.7      0 %   no loss but rounding
    BMP             147,500       0.16              0.43   0.26    0.7      0 %

Noise does not break it: of 60 levels in the original it is 0.9 and 3.2.
"""

import functools
from pathlib import Path

import numpy as np
import PIL.Image
import simplejpeg

from dgmd_pipeline import images

try:
    import cykooz_resizer
except ModuleNotFoundError:  # no wheel for Linux on arm64
    cykooz_resizer = None

QUALITY = 99
SUBSAMPLING = "4:4:4"

# The segments of a usual JPEG: baseline or progressive frame, tables, comment and APPn; in APP1 are EXIF and XMP.
_APP1 = b"\xff\xe1"
_USUAL = {bytes((0xFF, code)) for code in (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)}


def encode(path: Path, width: int, height: int) -> bytes:
    """Return the picture of a file, `stretched`, as a JPEG of quality 99 with 4:4:4 sampling. Raises what that does."""
    pixels = stretched(path, width, height)
    colours = "RGBX" if pixels.shape[2] == 4 else "RGB"
    return simplejpeg.encode_jpeg(pixels, QUALITY, colours, SUBSAMPLING.replace(":", ""))


def stretched(path: Path, width: int, height: int) -> np.ndarray:
    """Return the picture of a file as a person sees it, bilinear and antialiased: uint8 [height, width, 3 or 4].

    The first three values are RGB (see `images.to_rgb`), a fourth means nothing. A JPEG is decoded at 1/2, 1/4 or 1/8
    if that is at least twice this size; it is read to its end all the same. For one thread of a process at a time.
    Raises PIL.Image.DecompressionBombError before decoding more than `images.MAX_PIXELS`, and one of `images.DAMAGED`.
    """
    data, size = path.read_bytes(), (width, height)
    pixels = _by_simplejpeg(data, size)
    return _by_pillow(data, size) if pixels is None else pixels


def _by_simplejpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """Return a usual JPEG in colour and without any fault, stretched to `size` as it is seen; None for all other files.

    libjpeg-turbo as in Pillow, so the same values, but they come as the resize wants them, at four bytes a pixel, and
    opening is cheaper: a tenth less for a picture. What is not usual is kept from simplejpeg: the libjpeg-turbo in
    1.9.0 writes beyond the end of its memory where a lossless JPEG is decoded at half its size.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB") or width * height > images.MAX_PIXELS:
            return None
        orientation = _orientation(data)
        if orientation is None:
            return None
        size = images.exchanged(size, orientation)
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or (width >= 2 * size[0] * f and height >= 2 * size[1] * f))
        least = {"min_width": -(-width // factor), "min_height": -(-height // factor)}
        pixels = simplejpeg.decode_jpeg(data, "RGBX", **least)
    except (ValueError, KeyError):  # no JPEG, a fault that Pillow may step over, or a sampling without a name: 4:4:1
        return None
    return _upright(_resized(_shared(pixels), size, (0, 0, width / factor, height / factor)), orientation)


def _orientation(data: bytes) -> int | None:
    """Return the EXIF orientation of a JPEG whose header could be read, or None if that has any unusual segment.

    Pillow, which takes 0.1 ms to open a picture, is asked only where there is EXIF or XMP.
    """
    at, found = 2, False
    while (marker := data[at : at + 2]) != b"\xff\xda":  # the pixels begin
        if marker not in _USUAL:
            return None
        found = found or marker == _APP1
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if not found:
        return 1
    with images.guarded(data):
        return images.orientation(images.opened(data))


def _by_pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return any picture stretched to `size` as it is seen: uint8 [height, width, 3]."""
    with images.guarded(data):
        image = images.opened(data)
        if image.format not in ("JPEG", "MPO"):
            return _resized(images.to_rgb(image), size)
        orientation = images.orientation(image)
        size = images.exchanged(size, orientation)
        reduced = image.draft("RGB", (2 * size[0], 2 * size[1]))
        return _upright(_resized(image.convert("RGB"), size, reduced and reduced[1]), orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return pixels if orientation == 1 else np.asarray(images.turned(PIL.Image.fromarray(pixels), orientation))


def _resized(
    image: PIL.Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Return a picture, or its part from (0, 0) to the end of `box`, as one of `size`: bilinear and antialiased.

    1026 pixels at half the size are 513, but 771 are 385.5, stored as 386: without the box a quarter of a pixel of
    displacement, mean difference 1.4 levels instead of 0.6.
    Pillow's own resize, which does it on Linux and arm64, takes eight times as long; three values in twenty are another
    by one level, none by more.
    """
    if cykooz_resizer is None:
        return np.asarray(image.resize(size, PIL.Image.Resampling.BILINEAR, box))
    alg = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    options = cykooz_resizer.ResizeOptions(alg, crop_box=box and cykooz_resizer.CropBox(*box))
    if image.mode == "RGB":
        small = PIL.Image.new("RGB", size)
        _resizer().resize_pil(image, small, options)
        return np.asarray(small)
    pixels = np.empty((size[1], size[0], 4), np.uint8)
    _resizer().resize_pil(image, _shared(pixels), options)
    return pixels


def _shared(pixels: np.ndarray) -> PIL.Image.Image:
    """Return uint8 [height, width, 4] as a picture of Pillow's in the same memory.

    Of the modes that can share it, CMYK is the one that cykooz.resizer takes without making anything of the fourth.
    """
    return PIL.Image.frombuffer("CMYK", pixels.shape[1::-1], pixels, "raw", "CMYK", 0, 1)


@functools.cache  # its buffers are used again: a third of a resize. Not for threads, which would meet in them
def _resizer() -> "cykooz_resizer.Resizer":
    return cykooz_resizer.Resizer()
