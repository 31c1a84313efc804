"""Inspects one file. The result is an `Image` with its thumbnail, or a `Rejected` with the reason."""

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from dgmd_pipeline.data import decoding, limits
from dgmd_pipeline.data.inspected_files import Outcome
from dgmd_pipeline.data.near_duplicates import THUMBNAIL_SIZE
from dgmd_pipeline.errors import TooLittleMemory
from dgmd_pipeline.manifest import Image, RawFile, Rejected

MIN_SIDE = 8  # pixels; the smallest images known to be worth training on are 8 x 8 digits
_DRAFT_SIZE = (8 * THUMBNAIL_SIZE, 8 * THUMBNAIL_SIZE)  # a larger JPEG is decoded at a reduced size, but not below this


class TemporaryRejection(NamedTuple):
    """A rejection that is not reused, because another inspection of the same file may succeed."""

    rejected: Rejected


Result = Outcome | TemporaryRejection


def inspect_file(
    file: RawFile, raw: Path, reserve_memory: limits.ReserveMemory, min_side: int, max_pixels: int
) -> Result:
    """Read, hash and decode a file of `raw`.

    `inspection.inspect` explains the arguments and the reasons for a rejection.
    """
    path = raw / file.path
    try:
        if not path.is_file():  # reading a named pipe would block forever
            return TemporaryRejection(Rejected(*file, "unreadable", "not a regular file, or a broken link"))
        if (size := path.stat().st_size) > limits.MAX_BYTES:
            return Rejected(*file, "too many bytes", f"{size:,}, expected at most {limits.MAX_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        return TemporaryRejection(Rejected(*file, "unreadable", f"cannot be read from the disk: {error.strerror}"))
    if not data:
        return Rejected(*file, "empty", "0 bytes")
    with decoding.guard(data, max_pixels) as caught, limits.limit_time():
        try:
            kind, (width, height), thumbnail = _decode(data, reserve_memory)
        except TooLittleMemory as error:
            advice = "raise the memory limit, and inspect again with --force inspect"
            return TemporaryRejection(Rejected(*file, "too little memory", f"{error}; {advice}"))
        except (PIL.Image.DecompressionBombError, *decoding.DAMAGED) as error:
            return Rejected(*file, *_explain(error, data, caught))
    if min(width, height) < min_side:
        return Rejected(*file, "too small", f"{width} x {height} pixels, expected at least {min_side} on each side")
    sha256 = hashlib.sha256(data).hexdigest()
    return Image(*file, sha256, kind, width, height, sha256), thumbnail.tobytes()


def _decode(data: bytes, reserve_memory: limits.ReserveMemory) -> tuple[str, tuple[int, int], PIL.Image.Image]:
    """Return the format, the width and height of the upright image, and its thumbnail."""
    square, bilinear = (THUMBNAIL_SIZE, THUMBNAIL_SIZE), PIL.Image.Resampling.BILINEAR
    images = [decoding.open_header(data)]
    kind = str(images[0].format)
    with reserve_memory(limits.check(images[0], data)):
        if kind not in ("JPEG", "MPO"):
            # `pop` leaves no reference to the unconverted image, so its memory is freed after the conversion.
            rgb = decoding.to_rgb(images.pop())
            return kind, rgb.size, rgb.resize(square, bilinear)
        image = images[0]
        orientation = decoding.read_orientation(image)
        size = decoding.oriented_size(image.size, orientation)
        draft = image.draft("RGB", _DRAFT_SIZE)
        # libjpeg rounds the reduced size up to whole pixels. `draft[1]` is the box with the exact size. Without this
        # box, the thumbnail of a copy in another size would be shifted.
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image
        thumbnail = rgb.resize(square, bilinear, draft and draft[1])
        return "JPEG", size, decoding.apply_orientation(thumbnail, orientation)


def _explain(error: Exception, data: bytes, caught: list[warnings.WarningMessage]) -> tuple[str, str]:
    """Return the reason and the detail of a rejection, given the error and the warnings of the decoding."""
    if isinstance(error, limits.TooManyScans):
        return "too many scans", str(error)
    if isinstance(error, PIL.Image.DecompressionBombError):
        return "too many pixels", str(error).split(",", 1)[0]
    message = decoding.describe(error)
    truncated = "truncated" in message.lower() or len(data) < _announced_size(data)
    detail = "; ".join(dict.fromkeys([message, *(str(warning.message) for warning in caught)]))
    return "truncated" if truncated else "unreadable", detail


def _announced_size(data: bytes) -> int:
    """Return the size in bytes that the headers of a WebP, TIFF or AVIF announce, 0 for other formats.

    Pillow's readers of these formats raise the same errors for truncated and for damaged files.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8
    if data[:4] in (b"II*\0", b"MM\0*"):  # the offset of the directory, which is usually at the end
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") + 2
    end = 0
    if data[4:8] == b"ftyp":  # the file is a series of boxes, each with its size; 0 means "to the end of the file"
        for _ in range(100):  # an image has fewer boxes
            if end < len(data):
                end += max(int.from_bytes(data[end : end + 4]) or len(data) - end, 8)
    return end
