"""Limits of the time and memory for decoding one image."""

import contextlib
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import PIL.Image

from dgmd_pipeline.errors import WorkerDied

MAX_PIXELS = 100_000_000  # a usual photograph has 12 megapixels; photographs of phones have up to 200
# Largest size of a file. The whole file is read into memory. 100 megapixels as an uncompressed 16-bit TIFF are 600 MB.
MAX_BYTES = 500_000_000
# Bytes that a file and the decoding of its image may need. 100 megapixels need 0.9 GB as a JPEG and 1.7 GB as a WebP.
MAX_MEMORY = 1_250_000_000
# Scans of a JPEG. libtiff has the same limit. libjpeg writes 10 scans for colours and 18 for CMYK. mozjpeg writes at
# most 12 scans, and Photoshop writes at most 5 scans. Decoding a scan of 100 megapixels takes at least 0.04 s, even if
# the scan is empty.
MAX_SCANS = 100
# Seconds of processor time. The slowest files within the other limits, such as a JPEG of 100 megapixels in 100 scans,
# take 5 s.
MAX_SECONDS = 20
# Seconds of elapsed time, in case a decoder waits for ever and uses no processor time.
MAX_WAIT = 15 * MAX_SECONDS

# The largest peak of memory while an image is read, converted and resized, in bytes for each pixel. The bytes of the
# file are not included. Measured with 16 megapixels of each format and mode, as the growth of the resident memory of a
# new process.
_BY_FORMAT = {"WEBP": 17, "AVIF": 17}
_BY_MODE = {"F": 19, "I": 17, "I;16": 13, "I;16B": 13}
_OTHERS = 9
_READ_TWICE = ("PNG", "WEBP", "AVIF")  # their readers copy the file

# A function that takes a number of bytes and returns a context manager. The context manager waits until this number of
# bytes may be used, and releases the bytes after its block.
ReserveMemory = Callable[[int], AbstractContextManager[object]]

# A marker in JPEG data, except the restart markers (FF D0 to FF D7), which are inside a scan. FF 00 is not a marker: it
# is a byte of the image. Source: ITU-T T.81, annex B.
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_FRAMES = (*_PROGRESSIVE, 0xC0, 0xC1, 0xC3, 0xC5, 0xC7, 0xC9, 0xCB, 0xCD, 0xCF)


class TooManyScans(PIL.Image.DecompressionBombError):
    """A JPEG has more than `MAX_SCANS` scans."""


def max_pixels(data: bytes) -> int:
    """Return how many pixels a file with these first bytes may have.

    The readers of WebP and AVIF allocate memory for the pixels when they read the header, before `check` is called. So
    these formats have a lower limit, at which their pixels need `MAX_MEMORY` bytes.
    """
    kind = "WEBP" if data[8:12] == b"WEBP" else "AVIF" if data[4:8] == b"ftyp" else None
    return MAX_MEMORY // _BY_FORMAT[kind] if kind else MAX_PIXELS


def check(image: PIL.Image.Image, data: bytes) -> int:
    """Return how many bytes of memory an image and its file need at most. Only the image's header needs to be read.

    Raises PIL.Image.DecompressionBombError for more than `MAX_MEMORY` bytes, and TooManyScans for more than `MAX_SCANS`
    scans.
    """
    by_pixel = max(_BY_FORMAT.get(str(image.format), _OTHERS), _BY_MODE.get(image.mode, _OTHERS))
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(data)
        if scans > MAX_SCANS:
            raise TooManyScans(f"more than {MAX_SCANS} scans, which no known encoder writes")
        if scans > 1:  # libjpeg keeps all coefficients in memory, with 16 bits each
            by_pixel = max(by_pixel, 5 + 2 * len(image.getbands()))
    files = 2 if image.format in _READ_TWICE else 1
    needed = files * len(data) + image.width * image.height * by_pixel
    if needed > MAX_MEMORY:
        raise PIL.Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels of {image.format} (mode {image.mode}) need {needed // 10**6} MB of "
            f"memory; expected at most {MAX_MEMORY // 10**6} MB"
        )
    return needed


def count_scans(data: bytes) -> int:
    """Return in how many scans libjpeg decodes the first image of JPEG data; counting ends above `MAX_SCANS`."""
    scans = at = components = 0
    is_progressive = False
    while scans <= MAX_SCANS and (marker := _MARKER.search(data, at)):
        at = marker.end()
        match code := data[at - 1]:
            case 0xD9:  # end of the image
                break
            case 0x01 | 0xD8:  # markers without a length
                continue
            case 0xDA:  # start of a scan
                scans += 1
                # Unless the image is progressive, a scan of all components is its only scan.
                if not is_progressive and data[at + 2 : at + 3] >= bytes([components]):
                    break
            case _ if code in _FRAMES:
                is_progressive, components = code in _PROGRESSIVE, int.from_bytes(data[at + 7 : at + 8])
        at += int.from_bytes(data[at : at + 2])
    return scans


@contextlib.contextmanager
def limit_time() -> Iterator[None]:
    """In a worker process, end the process if the block takes more than `MAX_SECONDS` or `MAX_WAIT`.

    In other processes, do nothing. Only signals interrupt a decoder in C. The timers send SIGPROF and SIGALRM, which
    have no handler in Python, so the system itself ends the process.
    """
    if multiprocessing.parent_process() is None:
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def explain(death: WorkerDied) -> str:
    """Return why the process that decoded an image died, as a clause."""
    return f"decoding took more than {MAX_SECONDS} s of processor time" if death.by_timer else str(death)
