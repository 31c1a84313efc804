"""Decodes image files to RGB pixels, with a limit of pixels and without output from the libraries."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

# Pillow registers these three readers on import. Without the imports, it would load all its readers for the first file
# that is not JPEG, PNG, GIF or BMP.
import PIL.AvifImagePlugin
import PIL.Image
import PIL.TiffImagePlugin
import PIL.WebPImagePlugin
from PIL.ExifTags import Base as ExifTag

from dgmd_pipeline.data import colour_modes, file_types, limits, png
from dgmd_pipeline.formatting import one_line

PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the workers already occupy all cores

# An allow-list, because some of Pillow's other readers start programs. The JPEG reader also opens a camera's MPO
# (several JPEGs in one file) and returns its first image.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
# Errors that Pillow's readers raise for damaged content. Pillow 13.0 raised the first three in a test with 440,000
# damaged files (bytes changed, cut, inserted; 22 encodings of all formats except AVIF). Pillow's own code expects the
# others from damaged data, or older versions of Pillow raised them.
DAMAGED = (
    OSError,  # includes UnidentifiedImageError
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,  # IndexError, KeyError
    EOFError,
    struct.error,
    zlib.error,
    ArithmeticError,  # OverflowError, ZeroDivisionError
    AssertionError,
    RuntimeError,  # the AVIF reader raises it for most kinds of damage
    MemoryError,  # the header asks for more memory than the machine has
)
# EXIF orientation -> the operation that makes the image upright. ImageOps.exif_transpose applies the same operations,
# but it also rewrites the EXIF data. Therefore it takes 0.2 ms longer, and fails if another tag is damaged (16 of 3,000
# files whose EXIF data had up to ten bytes changed).
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_SWAPS_WIDTH_AND_HEIGHT = (5, 6, 7, 8)


def open_rgb(path: Path, max_pixels: int = limits.MAX_PIXELS) -> PIL.Image.Image:
    """Read an image file with `read_rgb`. The content, not the name, determines the format."""
    return read_rgb(path.read_bytes(), max_pixels)


def read_rgb(data: bytes, max_pixels: int = limits.MAX_PIXELS) -> PIL.Image.Image:
    """Decode the content of an image file, and return the image as RGB (see `to_rgb`).

    Call it from one thread at a time: `guard` changes settings of the process.
    Raises PIL.Image.DecompressionBombError, before decoding, if the image has more than `max_pixels` pixels or exceeds
    a limit of `limits.check`. Raises one of `DAMAGED` if the content is damaged.
    """
    with guard(data, max_pixels):
        header = open_header(data)
        limits.check(header, data)
        return to_rgb(header)


def thumbnails(raw: Path, paths: Mapping[int, str], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """Return key -> thumbnail of the image. `paths` is key -> path of the image file below `raw`.

    Each thumbnail is uint8 [height, width, 3] and fits into `size` (width, height). Unreadable files are omitted.
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
    """Return the first frame in mode RGB, with the orientation applied, on a white background.

    `colour_modes.normalise` converts the modes that Pillow does not convert correctly. Pillow converts the other modes
    (CMYK with Adobe's inversion, LAB through littleCMS). Colour profiles are not applied. Raises one of `DAMAGED`.
    """
    if image.tell():
        image.seek(0)
    samples = colour_modes.load(image)
    orientation = read_orientation(image)
    image = colour_modes.normalise(image, samples)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = PIL.Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        image = background
    elif image.mode != "RGB":
        image = image.convert("RGB")
    colour_modes.check(image, samples)
    return apply_orientation(image, orientation)


def open_header(data: bytes) -> PIL.Image.Image:
    """Read the header of an image in one of `FORMATS`. Call it inside `guard`.

    Raises one of `DAMAGED`. The message of a PIL.UnidentifiedImageError names the type of the file.
    """
    if data.startswith(png.SIGNATURE):
        data = png.without_metadata(data)
    try:
        return PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise PIL.UnidentifiedImageError(_why_unidentified(data)) from None


def _why_unidentified(data: bytes) -> str:
    file_type = file_types.identify(data)
    if file_type in FORMATS:
        reader, _ = PIL.Image.OPEN[file_type]
        try:
            reader(io.BytesIO(data), "")
        except DAMAGED as error:  # PIL.Image.open drops this error
            return f"{file_type} that cannot be read: {error}"
        return f"{file_type} with a damaged header"
    return f"{file_type}; expected an image in the format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


def describe(error: Exception) -> str:
    """Return the message of an error in `DAMAGED` as one line of limited length.

    If a library wrote the message, the line begins with the type of the error.
    """
    own = isinstance(error, PIL.UnidentifiedImageError | colour_modes.UnknownRange)
    return one_line(str(error) if own else f"{type(error).__name__}: {error}")


def read_orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, or 1 (upright) if the EXIF data is missing or damaged.

    An AVIF stores its orientation in properties of the image (`irot` and `imir`). Pillow copies the orientation from
    these properties into the EXIF data.
    """
    if image.format == "AVIF":
        image.info.pop("xmp", None)  # Pillow would use the orientation in XMP if the properties say "upright"
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except DAMAGED:
        return 1


def apply_orientation(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """Return the image upright, given the EXIF orientation that it is stored with."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def oriented_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the width and height of the upright image, given its stored width and height."""
    return size[::-1] if orientation in _SWAPS_WIDTH_AND_HEIGHT else size


@contextlib.contextmanager
def guard(data: bytes, max_pixels: int = limits.MAX_PIXELS) -> Iterator[list[warnings.WarningMessage]]:
    """While `data` is decoded, refuse more than `max_pixels` pixels, and keep the libraries' messages off stderr.

    Yields the list that collects Pillow's warnings. Pillow warns above MAX_IMAGE_PIXELS and refuses above twice that
    number, so MAX_IMAGE_PIXELS is set to half of the smaller one of `max_pixels` and `limits.max_pixels`. libtiff
    writes to stderr by itself, so stderr is redirected for files that begin like a TIFF. Both changes affect the whole
    process: use one guard at a time.
    """
    previous = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = min(max_pixels, limits.max_pixels(data)) // 2
    silence = _discard_stderr() if data[:2] in (b"II", b"MM") else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(record=True) as caught, silence:
            warnings.simplefilter("always")
            yield caught
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = previous


@contextlib.contextmanager
def _discard_stderr() -> Iterator[None]:
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(devnull)
        os.close(stderr)
