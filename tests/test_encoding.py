import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import simplejpeg
from test_images import encode, scene, stored_as, turned

from dgmd_pipeline import encoding, images

SIZE = (64, 48)  # of what is made; the photos are larger
SIZES = [(97, 61), (8, 3000), (3000, 8), (30, 20), (701, 1501)]  # the last is decoded at a quarter: 175.25 x 375.25


def photo(width: int = 300, height: int = 210) -> PIL.Image.Image:
    """A scene with a sensor's noise."""
    smooth = np.asarray(scene(0, width, height), float)
    noise = np.random.default_rng(0).normal(0, 5, smooth.shape)
    return PIL.Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def noise(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (height, width, 3)))


def padded(data: bytes) -> bytes:
    """Put bytes that mean nothing between two markers, which libjpeg warns of and steps over."""
    at = data.index(b"\xff\xdb")
    return data[:at] + b"nothing" + data[at:]


def lossless(width: int, height: int) -> bytes:
    """A grey picture in the kind of JPEG that stores differences: all are 0, for which the code is one bit, 0."""
    frame = b"\xff\xc3\0\x11\x08" + struct.pack(">HH", height, width) + b"\3\1\x11\0\2\x11\0\3\x11\0"
    table = b"\xff\xc4\0\x14\0\1" + bytes(15) + b"\0"
    scan = b"\xff\xda\0\x0c\3\1\0\2\0\3\0\1\0\0" + bytes(width * height * 3 // 8 + 1)
    return b"\xff\xd8" + frame + table + scan + b"\xff\xd9"


def of_4_4_1() -> bytes:
    """A 4:1:1 JPEG (luminance 4 x 1) that says 1 x 4: as many blocks, if not in their places."""
    data = simplejpeg.encode_jpeg(np.asarray(photo(256, 256)), colorsubsampling="411")
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x41
    return data[:at] + b"\x14" + data[at + 1 :]


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
TURNED = encode(photo(), "JPEG", exif=turned(6))
JPEGS = {
    "4:4:4": encode(photo(), "JPEG", subsampling="4:4:4"),
    "4:2:2": encode(photo(), "JPEG", subsampling="4:2:2"),
    "4:2:0": encode(photo(), "JPEG", subsampling="4:2:0"),
    "progressive": encode(photo(), "JPEG", progressive=True),
    "restart markers": encode(photo(), "JPEG", restart_marker_rows=1),
    "stored as RGB": encode(photo(), "JPEG", keep_rgb=True),
    "a profile and a comment": encode(photo(), "JPEG", icc_profile=b"profile" * 20_000, comment=b"a camera's"),
    "two pictures": encode(photo(), "MPO", save_all=True, append_images=[photo().rotate(180)]),
    "as small as can be": encode(photo(8, 8), "JPEG"),
    "half of the size": encode(photo(257, 771), "JPEG"),
    "a quarter of the size": encode(photo(701, 1501), "JPEG"),
    "an eighth of the size": encode(photo(1027, 1501), "JPEG"),
    "orientation 6 in XMP": encode(photo(), "JPEG", xmp=XMP),
    "orientation 6 behind a comment that looks like pixels": TURNED[:2] + b"\xff\xfe\0\4\xff\xda" + TURNED[2:],
    **{f"noise {width} x {height}": encode(noise(width, height), "JPEG") for width, height in SIZES},
    **{f"orientation {number}": encode(photo(), "JPEG", exif=turned(number)) for number in range(1, 9)},
}
SLOWER = {
    "grey": encode(photo().convert("L"), "JPEG"),
    "CMYK": encode(photo().convert("CMYK"), "JPEG"),
    "grey and turned": encode(photo().convert("L"), "JPEG", exif=turned(6)),
    "orientation 6 behind padding": TURNED.replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1),
    "orientation 6 behind a marker without a segment": TURNED[:2] + b"\xff\xd0" + TURNED[2:],
    "lossless": lossless(70, 50),
    "4:4:1": of_4_4_1(),
    "faulty": padded(JPEGS["4:2:0"]),
}
OTHERS = {
    **{f"PNG {width} x {height}": encode(noise(width, height), "PNG") for width, height in SIZES},
    "PNG": encode(photo(), "PNG", exif=turned(6)),
    "PNG transparent": encode(photo().convert("RGBA").rotate(20), "PNG"),
    "GIF": encode(photo(), "GIF"),
    "WEBP": encode(photo(), "WEBP"),
}


def by_pillow(data: bytes, resize=PIL.Image.Image.resize) -> PIL.Image.Image:
    """What Pillow alone makes of a file, but for the resize."""
    image = PIL.Image.open(io.BytesIO(data))
    size, turn = SIZE, images.orientation(image)
    if image.format not in ("JPEG", "MPO"):
        return resize(images.to_rgb(image), size, PIL.Image.Resampling.BILINEAR)
    size = images.exchanged(size, turn)
    _, box = image.draft("RGB", (2 * size[0], 2 * size[1]))
    return images.turned(resize(image.convert("RGB"), size, PIL.Image.Resampling.BILINEAR, box), turn)


def fast(image: PIL.Image.Image, size: tuple[int, int], _, box=None) -> PIL.Image.Image:
    return PIL.Image.fromarray(encoding._resized(image, size, box))


@pytest.mark.parametrize("name", JPEGS | SLOWER | OTHERS)
def test_a_stretched_picture_is_pillow_s_to_within_a_level(name, tmp_path):
    (tmp_path / "x").write_bytes(data := (JPEGS | SLOWER | OTHERS)[name])
    pixels = encoding.stretched(tmp_path / "x", *SIZE)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (SIZE[1], SIZE[0], 4 if name in JPEGS else 3)
    assert np.abs(pixels[..., :3].astype(int) - np.asarray(by_pillow(data), int)).max() <= 1


@pytest.mark.parametrize("resize", [fast, PIL.Image.Image.resize])
@pytest.mark.parametrize("name", JPEGS | SLOWER | OTHERS)
def test_with_the_same_resize_the_record_is_pillow_s_to_the_last_byte(name, resize, tmp_path, monkeypatch):
    if resize is not fast:
        monkeypatch.setattr(encoding, "cykooz_resizer", None)
    (tmp_path / "x").write_bytes(data := (JPEGS | SLOWER | OTHERS)[name])
    picture = PIL.Image.fromarray(np.asarray(by_pillow(data, resize)))  # without the source's comment and profile
    assert encoding.encode(tmp_path / "x", *SIZE) == encode(picture, "JPEG", quality=99, subsampling="4:4:4")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_orientation_says_before_it_is_stretched(kind, orientation, tmp_path):
    upright = scene(0, 400, 240)
    (tmp_path / "x").write_bytes(stored_as(upright, kind, orientation))
    image = PIL.Image.fromarray(encoding.stretched(tmp_path / "x", 100, 50)[..., :3])
    assert image.size == (100, 50)
    assert np.abs(np.asarray(image.resize((40, 24)), float) - np.asarray(upright.resize((40, 24)), float)).mean() < 3


def test_a_lossless_jpeg_that_would_have_to_be_decoded_at_half_its_size_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(lossless(2 * SIZE[0] * 2, 2 * SIZE[1] * 2))
    with pytest.raises(OSError, match="broken data stream"):
        encoding.encode(tmp_path / "x", *SIZE)


def test_what_is_called_faulty_is_what_only_one_of_the_decoders_objects_to():
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(SLOWER["faulty"])


def test_where_there_is_no_fast_resize_it_works_all_the_same(tmp_path):
    (tmp_path / "x").write_bytes(JPEGS["orientation 6"])
    code = (
        "import sys; sys.modules['cykooz_resizer'] = None\n"
        "from pathlib import Path; import numpy as np; from dgmd_pipeline import encoding\n"
        "np.save('slow.npy', encoding.stretched(Path('x'), 30, 20))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    pixels = encoding.stretched(tmp_path / "x", 30, 20).astype(int)
    assert np.abs(pixels - np.load(tmp_path / "slow.npy")).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_damaged_picture_is_one_of_the_errors_that_are_named(kind, tmp_path):
    data = encode(photo(), kind)
    for name, content in {"garbage": b"nothing", "cut": data[: len(data) // 2], "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match="identify|truncated"):
            encoding.encode(tmp_path / name, *SIZE)


def test_more_pixels_than_are_allowed_are_not_decoded(tmp_path: Path):
    data = bytearray(JPEGS["4:2:0"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x7f\xff\x7f\xff"  # a header of 32,767 x 32,767 pixels
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PIL.Image.DecompressionBombError):
        encoding.encode(tmp_path / "x", *SIZE)
