import struct

import numpy as np
import PIL.Image
import pytest
from PIL.ExifTags import Base as ExifTag
from support.images import encode, encode_with_orientation, exif, samples, scene, upright

from dgmd_pipeline.data import decoding
from dgmd_pipeline.data.decoding import open_rgb, to_rgb


def centre_colour(image: PIL.Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (PIL.Image.new("1", (9, 9), 1), (255, 255, 255)),
        (PIL.Image.new("L", (9, 9), 100), (100, 100, 100)),
        (PIL.Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
        (PIL.Image.new("RGBX", (9, 9), (1, 2, 3, 0)), (1, 2, 3)),
        (PIL.Image.new("RGBA", (9, 9), (10, 20, 30, 0)), (255, 255, 255)),
        (PIL.Image.new("RGBA", (9, 9), (10, 20, 30, 255)), (10, 20, 30)),
        (PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 51)), (204, 204, 204)),
        (PIL.Image.new("LA", (9, 9), (0, 51)), (204, 204, 204)),
        (PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 0)).convert("PA"), (255, 255, 255)),
        (PIL.Image.new("CMYK", (9, 9), (255, 0, 0, 0)), (0, 255, 255)),
        (PIL.Image.new("YCbCr", (9, 9), (100, 128, 128)), (100, 100, 100)),
        (PIL.Image.new("LAB", (9, 9), (255, 128, 128)), (255, 255, 255)),
        (PIL.Image.new("I;16", (9, 9), 65535), (255, 255, 255)),
        (PIL.Image.new("I;16", (9, 9), 128 * 257), (128, 128, 128)),
        (PIL.Image.new("I;16B", (9, 9), 128 * 257), (128, 128, 128)),
        (PIL.Image.new("I", (9, 9), 128 * 257), (128, 128, 128)),
        (PIL.Image.new("F", (9, 9), 0.4), (102, 102, 102)),
        (PIL.Image.new("F", (9, 9), 102.3), (102, 102, 102)),
        (PIL.Image.new("F", (9, 9), float("nan")), (0, 0, 0)),
        (PIL.Image.new("F", (9, 9), float("inf")), (255, 255, 255)),
        (PIL.Image.new("F", (9, 9), float("-inf")), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, PIL.Image.Image) else "-".join(map(str, value)),
)
def test_every_mode_becomes_rgb_with_transparency_on_white(image, expected, recwarn):
    assert centre_colour(to_rgb(image)) == pytest.approx(expected, abs=1)
    assert not recwarn.list


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encode(PIL.Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK"), "JPEG"))
    assert centre_colour(open_rgb(tmp_path / "x.jpg")) == pytest.approx((200, 60, 30), abs=4)


@pytest.mark.parametrize(
    "name", ["JPEG of two images", "PNG animated", "WEBP animated", "AVIF animated", "GIF animated", "TIFF pages"]
)
def test_the_first_of_several_images_in_a_file_is_used(name, tmp_path):
    (tmp_path / "x").write_bytes(samples()[name])
    first = np.asarray(scene(), np.float64)
    assert np.abs(np.asarray(open_rgb(tmp_path / "x")) - first).mean() < 12
    with PIL.Image.open(tmp_path / "x") as image:
        image.seek(1)
        assert np.abs(np.asarray(to_rgb(image)) - first).mean() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_as_pillow_does(kind, orientation, tmp_path):
    data = encode_with_orientation(scene(0, 400, 240), kind, orientation)
    (tmp_path / "x").write_bytes(data)
    image = open_rgb(tmp_path / "x")
    assert image.size == ((240, 400) if orientation > 4 else (400, 240))
    assert np.array_equal(image, upright(data))


def test_the_properties_of_an_avif_count_and_not_the_orientation_in_its_exif_or_xmp_data(tmp_path):
    tags = PIL.Image.Exif()
    tags[ExifTag.ImageWidth] = 6
    in_exif = encode(scene(), "AVIF", exif=tags.tobytes()).replace(b"\x01\0\0\x04", b"\x01\x12\0\x04")
    in_xmp = encode(scene(), "AVIF", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    for data in (in_exif, in_xmp):
        (tmp_path / "x").write_bytes(data)
        assert open_rgb(tmp_path / "x").size == (96, 64)


def test_damage_to_another_exif_tag_does_not_affect_the_orientation(tmp_path):
    tags = exif(6)
    tags[ExifTag.XResolution] = 72.0
    damaged = tags.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x00\x00\x05")  # an ImageWidth that is a fraction
    data = encode(scene(), "JPEG", exif=damaged)
    with pytest.raises(struct.error):
        upright(data)  # the reason why `decoding` does not use Pillow's function
    (tmp_path / "x").write_bytes(data)
    assert open_rgb(tmp_path / "x").size == (64, 96)


def test_damaged_files_raise_only_the_documented_exceptions(tmp_path):
    data = encode(scene(), "JPEG")
    for name, content in {"garbage": b"nothing", "cut": data[: len(data) // 2], "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(decoding.DAMAGED):
            open_rgb(tmp_path / name)
