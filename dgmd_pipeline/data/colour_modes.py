"""Converts an image in any of Pillow's modes to an 8-bit mode, with the brightness that viewers show.

Pillow converts most modes. This module handles the modes that Pillow does not convert, or converts wrongly: grey of 12,
16 and 32 bits, signed and floating-point values, TIFFs in which 0 is white (WhiteIsZero), transparent colours of PNG,
and alpha channels that contain only zeros.
"""

import numpy as np
import PIL.Image
from PIL import TiffTags

_TAGS = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}
_BITS, _SIGN, _PHOTOMETRIC, _EXTRA = (
    _TAGS[name] for name in ("BitsPerSample", "SampleFormat", "PhotometricInterpretation", "ExtraSamples")
)
_SIGNED, _WHITE_IS_ZERO = (2,), 0  # values of two tags
_PNG_GREY = {"L;2": 85, "L;4": 17}  # raw mode (see `load`) -> factor by which Pillow multiplies samples
# libtiff returns values in the byte order of the machine, but Pillow 13.0 takes them for big-endian in these cases.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class UnknownRange(ValueError):
    """Neither the header nor the values of a file show which value is black and which value is white."""


def load(image: PIL.Image.Image) -> str:
    """Decode the current frame, and return its raw mode: Pillow's name for the type of the samples in the file.

    Examples are "L;2" and "RGB;16B"; "" means that Pillow gives no raw mode. Pillow forgets the raw mode when it
    decodes an image. Raises one of `decoding.DAMAGED`.
    """
    tile = next(iter(getattr(image, "tile", ())), None)
    samples = ""
    if tile is not None and tile.args:
        samples = str(tile.args if isinstance(tile.args, str) else tile.args[0])
        if tile.codec_name == "libtiff" and samples in _NATIVE:
            image.tile = [tile._replace(args=(_NATIVE[samples], *tile.args[1:]))]  # type: ignore[attr-defined]
    image.load()
    return samples


def normalise(image: PIL.Image.Image, samples: str) -> PIL.Image.Image:
    """Return a decoded image in a mode of 8 bits that Pillow converts to RGB and RGBA correctly.

    Grey is scaled to 8 bits from one of these ranges:

    - signed integers of 8 or 16 bits: the range of their type
    - unsigned 12-bit integers: 0 to 4,095
    - other integers: the smallest of 0 to 255, 0 to 4,095 and 0 to 65,535 that contains all values, because 16-bit
      files often hold 8-bit or 12-bit values
    - floating-point numbers: 0 to 1 or, if a value is above 1.25, 0 to 255. Values may lie outside
      the range by up to a quarter of its width, and are then clipped

    An alpha channel of zeros is removed from a BMP, and from a TIFF whose tags do not declare an alpha channel.
    `samples` is what `load` returned. Raises UnknownRange if the values are in none of these ranges, or if the result
    would be almost uniformly black, white or grey.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image)
    if image.mode == "L" and _tag(image, _SIGN) == _SIGNED:
        return image.point([value ^ 128 for value in range(256)])
    if image.mode == "La":
        return image.convert("LA")
    if _is_alpha_unset(image):
        return image.convert("RGB")
    if "transparency" in image.info:
        image.info["transparency"] = _transparent_pixel(image.info["transparency"], samples)
    return image


def check(image: PIL.Image.Image, samples: str) -> None:
    """Raise UnknownRange if an RGB image is nearly black because its 16-bit values are small.

    Pillow drops the lower 8 bits of each value. `samples` is what `load` returned.
    """
    if ";16" in samples and samples.startswith(("RGB", "LA")) and (high := int(np.max(image.getextrema()))) < 16:
        raise UnknownRange(
            f"its 16-bit colours are nearly black, at most {high * 256 + 255:,} of 65,535. Convert it to 8 bits"
        )


def _grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale integer or floating-point grey to 8 bits. Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    grey = _scale_floats(values) if image.mode == "F" else _scale_integers(values, image)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only samples of up to 8 bits
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return PIL.Image.fromarray(grey)


def _scale_floats(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    low, high = float(values.min(where=finite, initial=0)), float(values.max(where=finite, initial=0))
    white = 1 if high <= 1.25 else 255
    # If the range is 0 to 255 and no value reaches 16, the image would be nearly black.
    if not -white / 4 <= low <= high <= white * 1.25 or 1.25 < high < 16:
        raise UnknownRange(
            f"its floating-point values are between {low:g} and {high:g}; expected 0 to 1, or 0 to 255. "
            "Convert it to 8 bits"
        )
    scaled = np.nan_to_num(values)
    np.clip(scaled, 0, white, out=scaled)
    scaled *= 255 // white
    return np.rint(scaled, out=scaled).astype(np.uint8)


def _scale_integers(values: np.ndarray, image: PIL.Image.Image) -> np.ndarray:
    bits, signed = _tag(image, _BITS), _tag(image, _SIGN) == _SIGNED
    if bits == (32,) and not signed:
        values = values.view(np.uint32)
    low, high = int(values.min()), int(values.max())
    if signed and bits == (16,):
        if high - low < 4096:
            raise UnknownRange(
                f"its signed 16-bit values are from {low:,} to {high:,}, less than a sixteenth of their range. "
                "Convert it to 8 bits"
            )
        values, white = values + 32768, 65535
    elif low < 0 or high > 65535:
        raise UnknownRange(
            f"its 32-bit values are from {low:,} to {high:,}; expected 0 to 65,535. Convert it to 8 bits"
        )
    else:
        white = 4095 if bits == (12,) else next(white for white in (255, 4095, 65535) if high <= white)
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled += white // 2
    scaled //= white
    return scaled.astype(np.uint8)


def _tag(image: PIL.Image.Image, number: int) -> object:
    """Return the value of a tag of a TIFF; None for other images, and for a tag that is not in the file."""
    return getattr(image, "tag_v2", {}).get(number)


def _is_alpha_unset(image: PIL.Image.Image) -> bool:
    may_be = image.format == "BMP" or (image.format == "TIFF" and _tag(image, _EXTRA) is None)
    return may_be and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _transparent_pixel(value: object, samples: str) -> object:
    """Convert the transparent colour of a PNG from a value of the file's samples to a value of Pillow's pixels."""
    if isinstance(value, tuple):
        return tuple(part >> 8 if ";16" in samples else part & 255 for part in value)
    if isinstance(value, int) and samples.startswith("L"):
        return value * _PNG_GREY.get(samples, 1) & 255
    return value
