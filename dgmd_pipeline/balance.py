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
    """Return class index -> weight, such that every class weighs the same and the mean over the images is 1."""
    counts = Counter(row.class_index for row in rows)
    total = sum(counts.values())
    return {index: total / (len(counts) * count) for index, count in sorted(counts.items())}
