"""Rows -> fewer rows and class weights: no class is much larger than the others, and nothing is copied."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from dgmd_pipeline.manifest import Example, Image


def balance(images: Iterable[Image], indexes: Mapping[str, int], limit: float | None) -> list[Example]:
    """Keep the images of the labels in `indexes`, of each at most `limit` (>= 1) times the mean class size; None: all.

    Which ones stay is decided by content hash: the same images every time, and mostly the same ones when others
    arrive. Rows come by path.
    """
    classes: dict[str, list[Example]] = defaultdict(list)
    for image in images:
        if image.label in indexes:
            row = Example(image.path, image.label, indexes[image.label], image.sha256, image.group)
            classes[image.label].append(row)
    most = int(limit * sum(map(len, classes.values())) / len(classes)) if limit else None
    kept = [row for rows in classes.values() for row in sorted(rows, key=_rank)[:most]]
    return sorted(kept)


def _rank(row: Example) -> bytes:
    return hashlib.sha256(f"balance {row.sha256}".encode()).digest()


def class_weights(rows: Iterable[Example]) -> dict[int, float]:
    """Return class index -> weight: the inverse of the square root of its images, and 1 in the mean over the images.

    The inverse itself, with which every class weighs the same, costs up to .8 points of accuracy where the imbalance is
    mild: docs/measurements/head.md. Square root: Mahajan et al., "Exploring the Limits of Weakly Supervised
    Pretraining", 2018, section 2.2.
    """
    counts = Counter(row.class_index for row in rows)
    mean = sum(count**0.5 for count in counts.values()) / sum(counts.values())
    return {index: 1 / (mean * count**0.5) for index, count in sorted(counts.items())}
