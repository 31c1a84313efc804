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
import io
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


def encode(path: Path, width: int, height: int) -> bytes:
    """Return the picture of a file, `stretched`, as a JPEG of quality 99 with 4:4:4 sampling. Raises what that does."""
    pixels = stretched(path, width, height)
    colours = "RGBX" if pixels.shape[2] == 4 else "RGB"
    return simplejpeg.encode_jpeg(pixels, QUALITY, colours, SUBSAMPLING.replace(":", ""))


def stretched(path: Path, width: int, height: int) -> np.ndarray:
    """Return the picture of a file as a person sees it, bilinear and antialiased: uint8 [height, width, 3 or 4].

    The first three values are RGB (see `images.to_rgb`), a fourth means nothing. A JPEG is decoded at 1/2, 1/4 or 1/8
    if that is at least twice this size; it is read to its end all the same. Not for several threads of a process.
    Raises PIL.Image.DecompressionBombError before decoding more than `images.MAX_PIXELS`, and one of `images.DAMAGED`.
    """
    data = path.read_bytes()
    with images.guarded(data):
        image = PIL.Image.open(io.BytesIO(data), formats=images.FORMATS)
        if image.format in ("JPEG", "MPO"):
            picture = _of_jpeg(data, image, (width, height))
        else:
            picture = _resized(images.to_rgb(image), (width, height))
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, -1)


def _of_jpeg(data: bytes, image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """Stretch a JPEG, `image` being what Pillow has read of its header, to `size` as the picture is seen.

    What is in colour and without any fault is decoded by simplejpeg, to four bytes a pixel as cykooz.resizer wants
    them: libjpeg-turbo as in Pillow, so the same values, but a seventh of the picture's time is saved. The result then
    has mode CMYK, of the modes with four bands the one in which nobody makes anything of the fourth.
    """
    orientation = images.orientation(image)
    if orientation in images.ACROSS:
        size = size[::-1]
    reduced = image.draft("RGB", (2 * size[0], 2 * size[1]))
    # 1026 pixels at half the size are 513, but 771 are 385.5, stored as 386: without the box a quarter of a pixel
    # of displacement, mean difference 1.4 levels instead of 0.6.
    box = reduced and reduced[1]
    decoded = _decoded(data, image.size) if image.mode == "RGB" else None
    if decoded is None:
        image.load()
        decoded = image if image.mode == "RGB" else image.convert("RGB")
    return images.turned(_resized(decoded, size, box), orientation)


def _decoded(data: bytes, size: tuple[int, int]) -> PIL.Image.Image | None:
    """Decode a JPEG at the scale that gives `size` (width, height), or return None if there is any fault in it."""
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGBX", min_width=size[0], min_height=size[1])
    except ValueError:  # also what Pillow reads all the same, such as other bytes between two markers
        return None
    if pixels.shape != (size[1], size[0], 4):
        return None
    return PIL.Image.frombuffer("CMYK", size, pixels, "raw", "CMYK", 0, 1)


def _resized(
    image: PIL.Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> PIL.Image.Image:
    """Return a picture, or its part from (0, 0) to the end of `box`, as one of `size`: bilinear and antialiased.

    Pillow's own resize, which does it on Linux and arm64, takes eight times as long; three values in twenty are another
    by one level, none by more.
    """
    if cykooz_resizer is None:
        return image.resize(size, PIL.Image.Resampling.BILINEAR, box)
    alg = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    part = box and cykooz_resizer.CropBox(*box)
    small = PIL.Image.new(image.mode, size)
    _resizer().resize_pil(image, small, cykooz_resizer.ResizeOptions(alg, crop_box=part))
    return small


@functools.cache  # its buffers are used again: a third of a resize. Not for threads, which would meet in them
def _resizer() -> "cykooz_resizer.Resizer":
    return cykooz_resizer.Resizer()
