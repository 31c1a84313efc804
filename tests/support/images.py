"""Image files for tests."""

import hashlib
import io
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.ExifTags import Base as ExifTag

from dgmd_pipeline.manifest import Example


def scene(seed: int = 0, width: int = 96, height: int = 64) -> PIL.Image.Image:
    """Soft colours with edges, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    return coarse.resize((width, height), PIL.Image.Resampling.BICUBIC)


def encode(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # a copy: saving leaves an encoder's options in the image
    return buffer.getvalue()


def exif(orientation: int) -> PIL.Image.Exif:
    tags = PIL.Image.Exif()
    tags[ExifTag.Orientation] = orientation
    return tags


def encode_with_orientation(image: PIL.Image.Image, kind: str, orientation: int) -> bytes:
    """A file with the pixels of the image as they are, and an EXIF orientation."""
    if kind == "TIFF":
        return encode(image, kind, tiffinfo={ExifTag.Orientation: orientation})
    return encode(image, kind, exif=exif(orientation))


def upright(data: bytes) -> PIL.Image.Image:
    """The image of a file in mode RGB, turned upright by Pillow."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return PIL.ImageOps.exif_transpose(image).convert("RGB")


def put(raw: Path, path: str, data: bytes) -> None:
    (raw / path).parent.mkdir(parents=True, exist_ok=True)
    (raw / path).write_bytes(data)


@cache  # the colour profile in one of them contains the time
def samples() -> dict[str, bytes]:
    """`scene()` in each format and in its variants, by name; the first word of a name is the format."""
    image = scene()
    grey16 = PIL.Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    return {
        "JPEG baseline": encode_with_orientation(image, "JPEG", 6),
        "JPEG progressive": encode(image, "JPEG", progressive=True),
        "JPEG grey": encode(image.convert("L"), "JPEG"),
        "JPEG CMYK": encode(image.convert("CMYK"), "JPEG"),
        "JPEG of two images": encode(image, "MPO", save_all=True, append_images=[scene(1)]),
        "PNG": encode_with_orientation(image, "PNG", 3),
        "PNG palette": encode(image.quantize(16), "PNG", transparency=3),
        "PNG alpha": encode(image.convert("RGBA"), "PNG"),
        "PNG 16 bits": encode(grey16, "PNG"),
        "PNG one bit": encode(image.convert("1"), "PNG"),
        "PNG animated": encode(image, "PNG", save_all=True, append_images=[scene(1)]),
        "WEBP": encode_with_orientation(image, "WEBP", 6),
        "WEBP lossless alpha": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "WEBP animated": encode(image, "WEBP", save_all=True, append_images=[scene(1)]),
        "GIF": encode(image, "GIF"),
        "GIF animated": encode(image, "GIF", save_all=True, append_images=[scene(1)]),
        "BMP": encode(image, "BMP"),
        "BMP palette": encode(image.quantize(16), "BMP"),
        "TIFF": encode_with_orientation(image, "TIFF", 6),
        "TIFF LZW": encode(image, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(image, "TIFF", compression="tiff_deflate"),
        "TIFF JPEG": encode(image, "TIFF", compression="jpeg"),
        "TIFF fax": encode(image.convert("1"), "TIFF", compression="group4"),
        "TIFF float": encode(PIL.Image.fromarray(np.asarray(image)[..., 0] / np.float32(255)), "TIFF"),
        "TIFF LAB": encode(image.convert("LAB"), "TIFF"),
        "TIFF pages": encode(image, "TIFF", save_all=True, append_images=[scene(1)]),
    }


def put_image(raw: Path, path: str, index: int, size: tuple[int, int] = (40, 30)) -> Example:
    """Write a file of smooth colours, different for each path, and return its row."""
    rng = np.random.default_rng(list(path.encode("utf-8", "surrogateescape")))
    corners = PIL.Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    file = raw / path
    file.parent.mkdir(parents=True, exist_ok=True)
    corners.resize(size, PIL.Image.Resampling.BICUBIC).save(file, "PNG")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Example(path=path, label=path.partition("/")[0], class_index=index, sha256=digest, group=digest)
