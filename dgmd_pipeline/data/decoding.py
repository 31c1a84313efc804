"""An image file -> RGB pixels, with bounded size and without output from libraries."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

# Pillow registers these two readers on import; otherwise it would import every reader it has on the first file that
# is neither JPEG, PNG, GIF nor BMP.
import PIL.Image
import PIL.TiffImagePlugin
import PIL.WebPImagePlugin

# An allow-list, because some of Pillow's other readers call other programs. A camera's MPO (several JPEGs in one
# file) is opened by the JPEG reader and counts as its first picture.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # a phone's largest mode is 200 megapixels, a usual photograph 12; 4 to 8 bytes each decoded
MAX_BYTES = 500_000_000  # a file is read into memory whole; 100 megapixels as an uncompressed 16-bit TIFF are 600 MB
# What Pillow's readers raise for damaged content. 440,000 damaged files (bytes changed, cut, inserted; 22 encodings
# of the six formats; Pillow 13.0) raised the first three; the others are what Pillow's own code expects of damaged
# data, or what older versions let through.
DAMAGED = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,  # IndexError, KeyError
    EOFError,
    struct.error,
    zlib.error,
    ArithmeticError,  # OverflowError, ZeroDivisionError
    AssertionError,
    MemoryError,  # a header that asks for more than there is
)
_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ACROSS = (5, 6, 7, 8)  # orientations that exchange width and height


def open_rgb(path: Path, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Read a picture file as RGB (see `to_rgb`), by its content.

    Use it in one thread of a process at a time: what Pillow and libtiff have to say is a setting of the process.
    Raises PIL.Image.DecompressionBombError before decoding more than `max_pixels`, and one of `DAMAGED`.
    """
    data = path.read_bytes()
    with guard(data, max_pixels):
        return to_rgb(open_header(data))


def thumbnails(raw: Path, paths: Mapping[int, str], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """Return pictures below `raw` made smaller to fit `size` (width, height), uint8 [height, width, 3], by their keys.

    One that cannot be read any more is left out: it is for looking at only.
    """
    found = {}
    for key, path in paths.items():
        try:
            image = open_rgb(raw / path)
        except (*DAMAGED, PIL.Image.DecompressionBombError):
            continue
        image.thumbnail(size)
        found[key] = np.asarray(image)
    return found


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the first frame as a person sees it: mode RGB, EXIF orientation applied, transparency laid on white.

    16 bits of grey are scaled to 8, not clipped. Floating point is taken to end at 1 or, where it goes beyond, at
    255. Everything else is Pillow's conversion (CMYK with Adobe's inversion, LAB by way of littleCMS). Colour
    profiles are not applied. Raises one of `DAMAGED`.
    """
    if image.tell():
        image.seek(0)
    image.load()
    turn = read_orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = PIL.Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image)
        image = ground
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return apply_orientation(image, turn)


def _grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale integers of 16 bits (beyond: clipped) or floating point to 8 bits; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        top = 1 if values.max() <= 1 else 255
        grey = np.rint(np.clip(values, 0, top) * (255 // top))
    else:
        grey = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
    return PIL.Image.fromarray(grey.astype(np.uint8))


def open_header(data: bytes) -> PIL.Image.Image:
    """Read the header of a picture by one of the readers of `FORMATS`, while `guarded`. Raises one of `DAMAGED`."""
    return PIL.Image.open(io.BytesIO(data), formats=FORMATS)


def read_orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where EXIF is missing or damaged: the picture is whole without it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except DAMAGED:
        return 1


def apply_orientation(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """Return a picture that was stored with an EXIF orientation as a person sees it."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def oriented_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return a width and height as stored for those as seen, or the other way round."""
    return size[::-1] if orientation in _ACROSS else size


@contextlib.contextmanager
def guard(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[list[warnings.WarningMessage]]:
    """While `data` is opened: refuse more than `max_pixels`, and keep from the screen what Pillow and libtiff say.

    Pillow warns beyond MAX_IMAGE_PIXELS and refuses beyond twice that: half of ours there gives one clear refusal, in
    every place where Pillow checks. libtiff writes to the process's standard error whatever Pillow does, so that is
    turned away for files that begin like a TIFF. Both are settings of the process: for one thread at a time.
    Yields the list in which Pillow's warnings arrive.
    """
    before = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = max_pixels // 2
    try:
        with warnings.catch_warnings(record=True) as said, _silence_stderr(data[:2] in (b"II", b"MM")):
            warnings.simplefilter("always")
            yield said
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _silence_stderr(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
