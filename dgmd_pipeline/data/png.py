"""Removes those chunks of a PNG file that Pillow reads although they do not affect the pixels."""

import io
import re
import zlib

from PIL.PngImagePlugin import PngStream

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS, _ORIENTATION = b"tRNS", b"eXIf"  # ancillary chunks; the first holds a transparent colour
_TEXT_WITH_ORIENTATION = re.compile(rb"(XML:com\.adobe\.xmp|Raw profile type exif)\0")


def without_metadata(data: bytes) -> bytes:
    """Return a PNG file with only the chunks that determine its pixels and its orientation.

    Pillow refuses the whole image if an ancillary chunk is malformed, has a wrong checksum, or is a text or colour
    profile above 1 MB. libpng leaves out only the chunk, and so do browsers. This function also leaves out all frames
    of an animation except the first frame. If a chunk's length or name is invalid, the rest of the file is left as it
    is.
    """
    view, at = memoryview(data), len(SIGNATURE)
    kept = [view[:at]]
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(view[at : at + 4])
        kind = data[at + 4 : at + 8]
        if end > len(data) or not kind.isalpha():
            break
        if kind[:1].isupper() or _is_needed(kind, view[at + 4 : end]):
            kept.append(view[at:end])
        at = end
    return b"".join([*kept, view[at:]])


def _is_needed(kind: bytes, chunk: memoryview) -> bool:
    """Return whether an ancillary chunk (name, content, checksum) is needed and valid."""
    content = chunk[4:-4]
    if kind not in (_PIXELS, _ORIENTATION) and not _TEXT_WITH_ORIENTATION.match(content):
        return False
    if zlib.crc32(chunk[:-4]) != int.from_bytes(chunk[-4:]):
        return False
    try:
        PngStream(io.BytesIO(content)).call(kind, 0, len(content))
    except (ValueError, SyntaxError):  # because of this chunk, Pillow would refuse the image
        return False
    return True
