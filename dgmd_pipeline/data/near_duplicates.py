"""Groups near-duplicate images by their thumbnails.

A perceptual hash finds candidate pairs; a comparison of their thumbnails confirms them.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import Image

THUMBNAIL_SIZE = 16  # pixels, width and height
_MAX_DISTANCE = 10  # number of bits that may differ between the hashes of a candidate pair
# `_candidates` sorts the hashes sixteen times. Before each sort, it rotates them by one of these numbers of bits. Two
# hashes are neighbours if they are at most _NEIGHBOURS places apart after at least one of the sorts.
_ROTATIONS = range(0, 64, 4)
_NEIGHBOURS = 8
_CHUNK = 1024  # thumbnails or pairs that are processed at a time; 1,024 thumbnails are 0.8 MB
# The rows of the DCT matrix for the 8 lowest frequencies, times 1,024, rounded to integers. Sums of integers are exact
# in float64, so the hash does not depend on the order of additions.
_COSINES = np.rint(1024 * np.cos(np.pi / THUMBNAIL_SIZE * np.outer(np.arange(8), np.arange(THUMBNAIL_SIZE) + 0.5)))
_LUMA = np.array([299.0, 587.0, 114.0])  # weights of red, green and blue, times 1,000
_NEW = manifest.MISSING  # `_identify` returns this instead of a position for an image that is not in `known`
# A bit of the hash is set if its DCT coefficient exceeds this threshold. If the pixels have noise with a standard
# deviation of one level (of 255), most coefficients get noise with a standard deviation of THUMBNAIL_SIZE / 2. The
# threshold is twice this value. _LUMA scales the coefficients by 1,000, and each of the two products with _COSINES
# scales them by 1,024.
_NOISE = 2 * THUMBNAIL_SIZE / 2 * 1000 * 1024**2


HASH = np.dtype(
    [
        ("sha256", "S32"),  # of the image file
        ("path", "S16"),  # the first half of the SHA-256 of the file's path
        ("hash", "<u8"),  # see `_hash`
        ("brightness", "<i8"),
    ]
)


class Known(NamedTuple):
    """What an earlier call of `group` has found: the hashes of its images, and the pairs of near-duplicates."""

    hashes: np.ndarray  # HASH [n], in the order of the images
    # int64 [m, 2]: positions of pairs of near-duplicates whose hashes are neighbours. In each pair, the first position
    # is the smaller one. The pairs are in ascending order.
    copies: np.ndarray


NOTHING_KNOWN = Known(np.empty(0, HASH), np.empty((0, 2), np.int64))


def group(
    images: list[Image], thumbnails: np.ndarray, positions: np.ndarray, known: Known | None = None
) -> tuple[list[Image], Known]:
    """Return the images with `group` filled in. An image and its near-duplicates form a group.

    The name of a group is the smallest SHA-256 of its images.
    `thumbnails` is uint8 RGB [n, 16, 16, 3]; the thumbnail of images[i] is thumbnails[positions[i]]. `known` is the
    second result of an earlier call. It only saves time: most pairs of images of the earlier call are not compared
    again. In both calls, the images must be in the order of their paths.
    """
    hashes, old = _identify(images, known)
    new = np.flatnonzero(old == _NEW)
    hashes["hash"][new], hashes["brightness"][new] = _hash(thumbnails, positions[new])
    candidates, copies = _candidates(hashes, old, known or NOTHING_KNOWN)
    sizes = np.array([(image.width, image.height) for image in images], np.float64).reshape(-1, 2)
    found = [copies]
    for start in range(0, len(candidates), _CHUNK):
        pairs = candidates[start : start + _CHUNK]
        left, right = pairs.T
        found.append(
            pairs[_are_copies(thumbnails[positions[left]], thumbnails[positions[right]], sizes[left], sizes[right])]
        )
    copies = np.unique(np.concatenate(found), axis=0)
    names = _smallest_names([image.sha256 for image in images], copies)
    return [image._replace(group=name) for image, name in zip(images, names, strict=True)], Known(hashes, copies)


def _smallest_names(names: list[str], copies: np.ndarray) -> list[str]:
    """Return for each position the smallest name in its group.

    The two positions of a pair in `copies` are in the same group. If two pairs share a position, all their positions
    are in the same group.
    """
    parents = list(range(len(names)))  # a disjoint-set forest (union-find)

    def find_root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for one, other in copies.tolist():
        parents[find_root(one)] = find_root(other)
    roots = [find_root(index) for index in range(len(names))]
    smallest: dict[int, str] = {}
    for root, name in zip(roots, names, strict=True):
        smallest[root] = min(name, smallest.get(root, name))
    return [smallest[root] for root in roots]


def _identify(images: list[Image], known: Known | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a HASH record and a position in `known` (int64) for each image. A new image has the position _NEW.

    In the records of new images, `hash` and `brightness` are 0.
    """
    hashes = np.zeros(len(images), HASH)
    hashes["sha256"] = [bytes.fromhex(image.sha256) for image in images]
    paths = (image.path.encode("utf-8", "surrogateescape") for image in images)
    hashes["path"] = [hashlib.sha256(path).digest()[:16] for path in paths]
    if known is None:
        return hashes, np.full(len(images), _NEW)
    old = manifest.positions_of(hashes["sha256"], known.hashes["sha256"])
    at = np.flatnonzero(old != _NEW)
    moved = known.hashes["path"][old[at]] != hashes["path"][at]
    old[at[moved]] = _NEW
    at = at[~moved]
    hashes[at] = known.hashes[old[at]]
    return hashes, old


def _hash(thumbnails: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pHash's 64 bits (uint64) and the brightness (int64, the sum of the luminance) of each thumbnail.

    Each bit belongs to one of the 8 x 8 lowest DCT coefficients of the luminance. It is set if the coefficient exceeds
    _NOISE. An image and its resized and re-encoded copy have hashes that differ by at most 3 bits in 95 % of the pairs,
    and by at most 5 bits in 99 % of the pairs.

    The source is Zauner 2010, "Implementation and benchmarking of perceptual image hash functions". The source uses the
    median of the coefficients as the threshold. With this threshold, noise alone would decide the bits of a flat image.
    So this function uses _NOISE instead.
    """
    hashes = np.empty(len(positions), np.uint64)
    brightness = np.empty(len(positions), np.int64)
    for start in range(0, len(positions), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        luma = thumbnails[positions[chunk]] @ _LUMA
        bits = (_COSINES @ luma @ _COSINES.T).reshape(-1, 64) > _NOISE
        bits[:, 0] = False  # this bit is not used, because its coefficient is the mean luminance
        hashes[chunk] = np.packbits(bits, axis=1).view(">u8")[:, 0]
        brightness[chunk] = luma.sum((1, 2))
    return hashes, brightness


def _candidates(hashes: np.ndarray, old: np.ndarray, known: Known) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs that are to be compared, and the known near-duplicates that are still neighbours.

    Both are int64 [pairs, 2]; the first index is the smaller one. Only neighbours whose hashes differ by at most
    `_MAX_DISTANCE` bits are compared.

    The hashes are sorted sixteen times, each time rotated by four more bits. (Charikar 2002 permutes the bits at random
    instead.) If a long sequence of consecutive bits is equal in two hashes, the hashes are likely to be neighbours in
    the rotation that moves this sequence to the front. In each of the sixteen orders, a hash is paired only with the
    next eight hashes. So the number of pairs is at most 16 x 8 = 128 times the number of hashes, even if all hashes are
    equal. Equal hashes are sorted by brightness.

    In a test, some of 300,000 random hashes were copied, and a few bits of each copy were changed. A copy was a
    neighbour of its original in 100 % of the cases with 2 changed bits, in 99.9 % of the cases with 4 changed bits, and
    in 95 % of the cases with 6 changed bits.

    The call that returned `known` has compared the images in `known`. So neighbours are compared only in two cases. In
    the first case, at least one of the two images is not in `known`. In the second case, both are in `known`, but an
    image that was sorted between them has been removed, so they may have become neighbours only now.
    """
    position_of = np.full(len(known.hashes) + 1, manifest.MISSING)  # old position -> present position
    position_of[old] = np.arange(len(old))
    position_of[_NEW] = manifest.MISSING
    copies = position_of[known.copies]
    copies = copies[(copies != manifest.MISSING).all(axis=1)]
    everything, position = _with_removed(hashes, position_of[:-1], known.hashes)
    is_new = old == _NEW
    are_neighbours = np.zeros(len(copies), bool)
    rank = np.empty(len(hashes), np.int64)
    found = np.empty(0, np.int64)
    for rotation in _ROTATIONS:
        bits = everything["hash"]
        rotated = bits << np.uint64(rotation) | bits >> np.uint64(64 - rotation)
        order = position[np.lexsort((everything["brightness"], rotated))]
        present = order != manifest.MISSING
        removed_before, order = np.cumsum(~present)[present], order[present]
        rank[order] = np.arange(len(order))
        are_neighbours |= np.abs(np.diff(rank[copies], axis=1)[:, 0]) <= _NEIGHBOURS
        pending = [found]
        for step in range(1, min(_NEIGHBOURS + 1, len(order))):
            left, right = order[:-step], order[step:]
            chosen = is_new[left] | is_new[right] | (removed_before[:-step] != removed_before[step:])
            left, right = left[chosen], right[chosen]
            close = np.bitwise_count(hashes["hash"][left] ^ hashes["hash"][right]) <= _MAX_DISTANCE
            left, right = left[close], right[close]
            pending.append(np.minimum(left, right) * len(hashes) + np.maximum(left, right))
        found = np.unique(np.concatenate(pending))
    return np.stack(np.divmod(found, max(len(hashes), 1)), axis=1), copies[are_neighbours]


def _with_removed(hashes: np.ndarray, position_of: np.ndarray, old_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the HASH records of present and removed images in one array, and for each record its position in `hashes`.

    The position of a removed image is MISSING. The array is in the order of the paths of all images, removed ones
    included. `_candidates` sorts it by hash and brightness. The sort is stable: if hashes and brightness are equal, the
    path decides, as in the earlier call.
    """
    removed = np.flatnonzero(position_of == manifest.MISSING)
    # For each removed image: the position in `hashes` of the last present image before it.
    predecessors = np.maximum.accumulate(np.append(manifest.MISSING, position_of))[removed]
    places = np.concatenate([np.arange(len(hashes)), predecessors])
    order = np.argsort(places, kind="stable")
    position = np.concatenate([np.arange(len(hashes)), np.full(len(removed), manifest.MISSING)])
    return np.concatenate([hashes, old_hashes[removed]])[order], position[order]


def _are_copies(left: np.ndarray, right: np.ndarray, left_size: np.ndarray, right_size: np.ndarray) -> np.ndarray:
    """Return which pairs of thumbnails (uint8 [n, 16, 16, 3]) show the same image: bool [n].

    `left_size` and `right_size` are the widths and heights of the images, in pixels: [n, 2].

    Two images are compared by their RMS difference at 8 x 8 pixels, in levels (of 255). A copy that was made smaller is
    blurred, so it differs from its original by a multiple of the image's Laplacian. Such a multiple is fitted to the
    difference (least squares) and subtracted before the RMS is computed. This hardly lowers the RMS of two different
    images, for example two handwritten digits.

    The tolerance depends on the contrast of the images and on the shortest side of the smaller image. JPEG blocks, and
    the rounding of the size to whole pixels, change an image of 32 pixels a lot. They hardly change an image of 300
    pixels. Photographs of two items of an industrial product differ only a little more than copies do: two solar cells
    of 300 pixels differ by at least 0.78 levels, and the tolerance for them is 0.5 to 0.6 (docs/measurements/leaks.md).
    Images that differ by a tint of 10 %, by heavy noise or by a crop that is moved by 8 of 360 pixels do not count as
    copies. For flat images the tolerance is 0.5. Two images of different plain colours have an RMS of at least 0.57, so
    they never count as copies.
    """
    shortest = np.minimum(left_size.min(1), right_size.min(1))
    stretch = np.abs(np.log(left_size[:, 0] * right_size[:, 1] / (left_size[:, 1] * right_size[:, 0])))
    # The pairs are on the last axis. If the colours were on the last axis, NumPy's innermost loops would have three
    # steps, and a pair would take 22 us instead of 3.
    left, right = (
        each.reshape(-1, THUMBNAIL_SIZE**2 * 3).T.astype(np.float32, order="C").reshape(8, 2, 8, 2, 3, -1).mean((1, 3))
        for each in (left, right)
    )
    contrast = np.minimum(*(np.sqrt(each.var((0, 1)).mean(0)) for each in (left, right)))
    noise = 0.5 + np.minimum(np.minimum(1.5, (40 / shortest) ** 2), 0.3 * contrast)
    tolerance = np.hypot(noise, (0.015 + 0.5 / shortest) * contrast)
    difference, total = left - right, left + right
    padded = np.pad(total, ((1, 1), (1, 1), (0, 0), (0, 0)), mode="edge")
    blur = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * total
    square = (difference**2).mean((0, 1, 2))
    explained = (difference * blur).mean((0, 1, 2)) ** 2 / np.maximum((blur**2).mean((0, 1, 2)), 1e-6)
    return (
        # Rounding to whole pixels changes the aspect ratio of a copy by a little less than 0.02 + 1.5 / shortest.
        (stretch < 0.02 + 1.5 / shortest)
        & (square - explained < tolerance**2)
        # A striped image differs from a plain grey one by a multiple of `blur`. Only this condition tells them apart.
        & (square < (4 * tolerance) ** 2)
    )
