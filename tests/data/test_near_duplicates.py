from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.images import encode, encode_with_orientation, put, scene, upright

from dgmd_pipeline.data import near_duplicates
from dgmd_pipeline.data.inspection import find, inspect
from dgmd_pipeline.manifest import Image


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def put_png(raw: Path, path: str, image: PIL.Image.Image) -> None:
    put(raw, path, encode(image, "PNG", compress_level=1))


def put_copies(raw: Path, label: str, name: str, image: PIL.Image.Image) -> None:
    """The image as PNG, and re-encoded and resized copies of it."""
    put_png(raw, f"{label}/{name} original", image)
    put(raw, f"{label}/{name} q50", encode(image, "JPEG", quality=50))
    put(raw, f"{label}/{name} q95", encode(image, "JPEG", quality=95))
    put(raw, f"{label}/{name} webp", encode(image, "WEBP", method=0))
    for share in (0.5, 0.75, 1.5):
        resized = image.resize((round(image.width * share) + 1, round(image.height * share)))
        put(raw, f"{label}/{name} {share}", encode(resized, "JPEG", quality=75))


def inspect_all(raw: Path) -> list[Image]:
    usable, rejected = inspect(find(raw), raw, raw.parent)
    assert not rejected
    return usable


def groups(raw: Path) -> list[list[str]]:
    """The sorted paths of each group, sorted."""
    found: dict[str, list[str]] = {}
    for row in inspect_all(raw):
        found.setdefault(row.group, []).append(row.path)
    return sorted(sorted(paths) for paths in found.values())


def names_in_groups(raw: Path) -> list[set[str]]:
    """The first word of the file names in each group."""
    return [{Path(path).name.split()[0] for path in paths} for paths in groups(raw)]


def test_resized_and_reencoded_copies_share_the_smallest_sha256_across_labels(raw):
    put_copies(raw, "a", "x", scene(0, 160, 120))
    put(raw, "b/other label.jpg", encode(scene(0, 120, 90), "JPEG", quality=60))
    put_png(raw, "b/another.png", scene(1, 160, 120))
    found: dict[str, set[str]] = {}
    for row in inspect_all(raw):
        found.setdefault(row.group, set()).add(row.sha256)
    assert sorted(map(len, found.values())) == [1, 8]
    assert all(group == min(hashes) for group, hashes in found.items())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_with_an_exif_orientation_and_its_upright_copy_are_near_duplicates(kind, raw):
    for orientation in range(1, 9):
        data = encode_with_orientation(scene(orientation, 160, 120), kind, orientation)
        put(raw, f"a/{orientation} stored", data)
        put(raw, f"a/{orientation} upright", encode(upright(data), "BMP"))
    assert groups(raw) == [[f"a/{number} stored", f"a/{number} upright"] for number in range(1, 9)]


def test_copies_of_handwritten_digits_are_near_duplicates_and_different_digits_are_not(raw):
    from sklearn.datasets import load_digits

    sizes = (24, 28, 32, 40, 48, 64)
    for index, digit in enumerate(load_digits().images):
        grey = PIL.Image.fromarray((digit * 255 / 16).astype(np.uint8))
        image = grey.resize((sizes[index % 6],) * 2, PIL.Image.Resampling.BICUBIC)
        name = f"{index:04}"
        if index % 20 == 0 and image.width >= 28:
            put_copies(raw, f"{index % 7}", name, image)
        else:
            kind = ("PNG", "JPEG", "BMP")[index % 3]
            put(raw, f"{index % 7}/{name} only", encode(image, kind))
    assert sorted(names_in_groups(raw), key=min) == [{f"{index:04}"} for index in range(1797)]


def test_digits_at_half_the_size_without_their_edges_are_near_duplicates(raw):
    from sklearn.datasets import load_digits

    for index, digit in enumerate(load_digits().images[::20]):
        image = PIL.Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((32, 32))
        put_png(raw, f"a/{index:02}.png", image)
        put_png(raw, f"b/{index:02}.png", image.resize((16, 16)))
    assert groups(raw) == [[f"a/{index:02}.png", f"b/{index:02}.png"] for index in range(90)]


def test_crops_tints_and_noise_of_a_photograph_are_different_images_each_with_its_copies(raw):
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    count = 0
    for photo in load_sample_images().images:
        whole = PIL.Image.fromarray(photo)
        crop = whole.crop((80, 60, 440, 300))
        pixels = np.asarray(crop, np.float64)
        different = [whole, crop, *(whole.crop((x, 60, x + 360, 300)) for x in (0, 40, 160))]
        different += [
            PIL.Image.fromarray(np.clip(pixels * tint, 0, 255).astype(np.uint8)) for tint in ((1.2, 1, 1), 0.8)
        ]
        different += [PIL.Image.fromarray(np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8))]
        for image in different:
            put_copies(raw, "photo", f"{count:02}", image)
            count += 1
    assert names_in_groups(raw) == [{f"{index:02}"} for index in range(count)]


def cell(number: int) -> PIL.Image.Image:
    """A grey square with two bright lines, and a faint dark spot whose place differs for each number."""
    y, x = np.mgrid[:300, :300]
    spot_x, spot_y = 60 + 60 * (number % 4), 75 + 75 * (number // 4)
    spot = 8 * np.exp(-((x - spot_x) ** 2 + (y - spot_y) ** 2) / (2 * 20**2))
    edge = 40 * np.exp(-np.minimum(np.minimum(x, 299 - x), np.minimum(y, 299 - y)) / 10)
    lines = 30 * (np.exp(-(((x - 100) / 8) ** 2)) + np.exp(-(((x - 200) / 8) ** 2)))
    return PIL.Image.fromarray((140 + lines - edge - spot).astype(np.uint8))


def test_industrial_images_that_differ_by_a_faint_spot_are_different_images_each_with_its_copies(raw):
    for number in range(12):
        put_copies(raw, "cell", f"{number:02}", cell(number))
    assert names_in_groups(raw) == [{f"{number:02}"} for number in range(12)]


@pytest.mark.parametrize("size", [(401, 533), (521, 389), (1025, 771)])
def test_a_jpeg_whose_draft_size_is_rounded_up_is_a_near_duplicate(raw, size):
    image = scene(0, 640, 480).resize(size)
    put_png(raw, "a/1.png", image)
    put(raw, "a/2.jpg", encode(image, "JPEG", quality=90))
    put(raw, "a/3.jpg", encode(image.resize((size[0] // 2, size[1] // 2)), "JPEG", quality=90))
    assert groups(raw) == [["a/1.png", "a/2.jpg", "a/3.jpg"]]


def test_flat_images_of_different_colours_are_different_images(raw):
    for red in range(0, 256, 5):
        for green in (0, 1, 128):
            put_png(raw, f"a/{red} {green}.png", PIL.Image.new("RGB", (20, 20), (red, green, 90)))
    assert len(groups(raw)) == 52 * 3


def test_a_wave_differs_from_the_grey_plane_that_it_blurs_to_and_from_a_fainter_wave(raw):
    wave = np.tile(np.cos(np.pi / 64 * 7 * (np.arange(64) + 0.5)), (64, 1))
    for height in (0, 30, 60):
        put_png(raw, f"a/{height}.png", PIL.Image.fromarray((128 + height * wave).astype(np.uint8)))
    assert len(groups(raw)) == 3


def test_an_image_stretched_to_double_width_is_a_different_image(raw):
    put_png(raw, "a/1.png", scene(0, 64, 64))
    put_png(raw, "a/2.png", scene(0, 64, 64).resize((128, 64)))
    assert len(groups(raw)) == 2


def candidates(hashes: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """The pairs of new images that are compared."""
    images = np.zeros(len(hashes), near_duplicates.HASH)
    images["hash"], images["brightness"] = hashes, brightness
    nothing = near_duplicates.Known(images[:0], np.empty((0, 2), np.int64))
    return near_duplicates._candidates(images, np.full(len(hashes), -1), nothing)[0]


@pytest.mark.parametrize("kinds", [1, 3, 1000])
def test_the_number_of_comparisons_is_bounded_for_equal_hashes(kinds):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, kinds, np.uint64)[rng.integers(0, kinds, 20_000)]
    pairs = candidates(hashes, rng.integers(0, 1000, 20_000))
    assert 4 * 20_000 < len(pairs) <= 128 * 20_000
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_equal_hashes_with_similar_brightness_become_candidates():
    brightness = np.random.default_rng(0).permutation(1000) * 10
    brightness = np.concatenate([brightness, brightness + 1])
    found = set(map(tuple, candidates(np.zeros(2000, np.uint64), brightness).tolist()))
    assert found >= {(index, 1000 + index) for index in range(1000)}


def test_hashes_that_differ_by_a_few_bits_anywhere_become_candidates():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 20_000, np.uint64)
    near = hashes[:1000].copy()
    for row in range(1000):
        for bit in rng.choice(64, 4, replace=False):
            near[row] ^= np.uint64(1) << np.uint64(bit)
    found = set(map(tuple, candidates(np.concatenate([hashes, near]), np.zeros(21_000, np.int64)).tolist()))
    assert sum((row, 20_000 + row) in found for row in range(1000)) >= 990
    assert all(one < other for one, other in found)
