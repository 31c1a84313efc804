"""Image files for tests."""

import hashlib
import io
import struct
import zlib
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


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, bits: int, *chunks: bytes, after: bytes = b"") -> bytes:
    """A PNG of samples with `bits` bits and with chunks before and after its pixels. Pillow cannot write all of these.

    `samples` is grey [height, width], RGB [height, width, 3] or RGBA [height, width, 4].
    """
    height, width, *channels = samples.shape
    if bits < 8:
        shifts = 8 - bits * (1 + np.arange(width) % (8 // bits))
        rows = np.add.reduceat(samples.astype(int) << shifts, np.arange(0, width, 8 // bits), axis=1).astype(np.uint8)
    else:
        rows = samples.astype(f">u{bits // 8}")
    colour = {3: 2, 4: 6}[channels[0]] if channels else 0
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(samples: np.ndarray, tags: dict[int, int | list[int]] | None = None, pack: bytes = b"") -> bytes:
    """A TIFF of samples [height, width] or [height, width, channels] as they are: with their type and byte order.

    `tags` adds or replaces tags. `pack` replaces the bytes of the samples, for bits that NumPy has not. Pillow cannot
    write all of these.
    """
    height, width, *channels = samples.shape
    count = channels[0] if channels else 1
    order = ">" if samples.dtype.byteorder == ">" else "<"
    kinds = {"u": 1, "i": 2, "f": 3}
    given = tags or {}
    pixels = pack or samples.tobytes()
    if given.get(259) == 8:
        pixels = zlib.compress(pixels)
    entries = {
        **{256: width, 257: height, 258: [samples.dtype.itemsize * 8] * count, 259: 1, 262: 1 if count < 3 else 2},
        **{273: 8, 277: count, 278: height, 279: len(pixels), 339: [kinds[samples.dtype.kind]] * count},
        **given,
    }
    pixels += b"\0" * (len(pixels) % 2)
    directory, elsewhere = struct.pack(order + "H", len(entries)), b""
    end = 8 + len(pixels) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, list) else [value]
        short = len(values) > 1 or max(values) < 65536
        data = struct.pack(f"{order}{len(values)}{'H' if short else 'I'}", *values)
        directory += struct.pack(order + "HHI", tag, 3 if short else 4, len(values))
        if len(data) > 4:
            directory += struct.pack(order + "I", end + len(elsewhere))
            elsewhere += data
        else:
            directory += data.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(order + "I", 8 + len(pixels)) + pixels + directory + b"\0\0\0\0" + elsewhere


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
        "AVIF": encode_with_orientation(image, "AVIF", 6),
        "AVIF alpha": encode(image.convert("RGBA"), "AVIF", quality=90),
        "AVIF animated": encode(image, "AVIF", save_all=True, append_images=[scene(1)]),
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
