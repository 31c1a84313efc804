"""Thumbnails -> groups of near-duplicate images.

A perceptual hash finds candidates; their thumbnails confirm them.
"""

from collections.abc import Iterator

import numpy as np

from dgmd_pipeline.manifest import Image

THUMBNAIL_SIZE = 16  # of a thumbnail, pixels
_TURNS = range(0, 64, 4)
_NEIGHBOURS = 8
_BITS = 10
_CHUNK = 1024  # thumbnails or pairs at a time; 0.8 MB each
# Whole numbers: sums are exact in float64, so that the hash is the same whatever adds them up in whatever order.
_COSINES = np.rint(1024 * np.cos(np.pi / THUMBNAIL_SIZE * np.outer(np.arange(8), np.arange(THUMBNAIL_SIZE) + 0.5)))
_LUMA = np.array([299.0, 587.0, 114.0])
_NOISE = 2 * 1024**2 * 1000 * THUMBNAIL_SIZE / 2  # twice what a noise of one level (of 255) leaves in a coefficient


def group(images: list[Image], thumbnails: np.ndarray, at: np.ndarray) -> list[Image]:
    """Return the rows with `group` filled in; the thumbnail (uint8 RGB) of row i is thumbnails[at[i]]."""
    size = np.array([(image.width, image.height) for image in images], np.float64)
    root = list(range(len(images)))

    def find_root(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for left, right in _candidates(*_hash(thumbnails, at)):
        copies = _are_copies(thumbnails[at[left]], thumbnails[at[right]], size[left], size[right])
        for one, other in zip(left[copies].tolist(), right[copies].tolist(), strict=True):
            root[find_root(one)] = find_root(other)
    roots = [find_root(index) for index in range(len(images))]
    group: dict[int, str] = {}
    for index, image in zip(roots, images, strict=True):
        group[index] = min(image.sha256, group.get(index, image.sha256))
    return [image._replace(group=group[index]) for index, image in zip(roots, images, strict=True)]


def _hash(thumbnails: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pHash's 64 bits (uint64) for each thumbnail, and its brightness (int64, any unit).

    The bits tell which of the 8 x 8 slowest cosines of the luminance are there (Zauner 2010, "Implementation and
    benchmarking of perceptual image hash functions", compares with the median instead; then the bits of a flat
    picture are those of its noise). Resized and re-encoded copies differ by at most 3 bits in 95 %, 5 in 99 %.
    """
    hashes = np.empty(len(at), np.uint64)
    brightness = np.empty(len(at), np.int64)
    for start in range(0, len(at), _CHUNK):
        part = slice(start, start + _CHUNK)
        luma = thumbnails[at[part]] @ _LUMA
        bits = (_COSINES @ luma @ _COSINES.T).reshape(-1, 64) > _NOISE
        bits[:, 0] = False  # the mean
        hashes[part] = np.packbits(bits, axis=1).view(">u8")[:, 0]
        brightness[part] = luma.sum((1, 2))
    return hashes, brightness


def _neighbours(hashes: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs (as two arrays of indexes) that stand close together when the hashes are sorted.

    They are sorted sixteen times, each time turned by four bits more (Charikar 2002 sorts random permutations): two
    hashes stand close where the longest stretch between bits that differ comes first. Each is paired with the next
    eight only, so there are at most 128 pairs for each hash, even if all are the same; brightness decides among
    equals. Found in 300,000 random hashes: all at a distance of 2, 99.9 % at 4, 93 % at 6.
    """
    for turn in _TURNS:
        turned = hashes << np.uint64(turn) | hashes >> np.uint64(64 - turn)
        order = np.lexsort((brightness, turned))
        for step in range(1, min(_NEIGHBOURS + 1, len(order))):
            yield order[:-step], order[step:]


def _candidates(hashes: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield neighbours whose hashes differ by at most `_BITS`, every pair once, `_CHUNK` pairs at a time."""
    known = np.empty(0, np.int64)
    fresh = []
    for count, (left, right) in enumerate(_neighbours(hashes, brightness), start=1):
        close = np.bitwise_count(hashes[left] ^ hashes[right]) <= _BITS
        left, right = left[close], right[close]  # noqa: PLW2901
        fresh.append(np.minimum(left, right) * len(hashes) + np.maximum(left, right))
        if count % _NEIGHBOURS == 0:
            known, fresh = np.unique(np.concatenate([known, *fresh])), []
    known = np.unique(np.concatenate([known, *fresh]))
    for start in range(0, len(known), _CHUNK):
        yield np.divmod(known[start : start + _CHUNK], len(hashes))


def _are_copies(one: np.ndarray, other: np.ndarray, one_size: np.ndarray, other_size: np.ndarray) -> np.ndarray:
    """Tell which pairs of thumbnails (uint8 [n, 16, 16, 3]) of pictures (width, height [n, 2]) show the same picture.

    Compared at 8 x 8, as differences to RMS levels (of 255) after taking out what blur explains: a copy that was
    made smaller differs from its original by a multiple of the Laplacian, two handwritten digits do not.

    The tolerance follows the pictures' contrast and the smaller one's shortest side: rounding to whole pixels and the
    blocks of a JPEG move much of a picture of 32 pixels, and nearly nothing of one of 300. Measured: see
    docs/measurements/leaks.md. Images of one industrial object differ by little more than copies do: two solar cells of
    300
    pixels by 0.78 levels at least, where a tolerance of 0.5 to 0.6 applies.
    Tints by 10 %, heavy noise and crops moved by 8 of 360 pixels are other pictures.

    Flat pictures are copies within 0.5 only, so that no two different colours are.
    """
    side = np.minimum(one_size.min(1), other_size.min(1))
    stretch = np.abs(np.log(one_size[:, 0] * other_size[:, 1] / (one_size[:, 1] * other_size[:, 0])))
    # Pairs on the last axis: with the colours there, NumPy's innermost loops have three steps, and a pair takes 22 us
    # instead of 3.
    one, other = (
        each.reshape(-1, THUMBNAIL_SIZE**2 * 3).T.astype(np.float32, order="C").reshape(8, 2, 8, 2, 3, -1).mean((1, 3))
        for each in (one, other)
    )
    contrast = np.minimum(*(np.sqrt(each.var((0, 1)).mean(0)) for each in (one, other)))
    noise = 0.5 + np.minimum(np.minimum(1.5, (40 / side) ** 2), 0.3 * contrast)
    tolerance = np.hypot(noise, (0.015 + 0.5 / side) * contrast)
    difference, total = one - other, one + other
    framed = np.pad(total, ((1, 1), (1, 1), (0, 0), (0, 0)), mode="edge")
    blur = framed[:-2, 1:-1] + framed[2:, 1:-1] + framed[1:-1, :-2] + framed[1:-1, 2:] - 4 * total
    square = (difference**2).mean((0, 1, 2))
    explained = (difference * blur).mean((0, 1, 2)) ** 2 / np.maximum((blur**2).mean((0, 1, 2)), 1e-6)
    # The last condition: of stripes and a grey plane, blur explains everything.
    return (
        (stretch < 0.02 + 1.5 / side)  # as far as rounding to whole pixels goes, and a little
        & (square - explained < tolerance**2)
        & (square < (4 * tolerance) ** 2)
    )
