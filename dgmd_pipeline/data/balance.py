"""Rows -> fewer rows and class weights: no class is much larger than the others, and nothing is copied."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgmd_pipeline import manifest
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


def balance_classes(
    images: Iterable[Image], indexes: Mapping[str, int], limit: float | None, folder: Path
) -> dict[str, Any]:
    """Write the rows that `balance` keeps and the class weights into `folder`; return the counts of each label."""
    before = [row for row in images if row.label in indexes]
    after = balance(before, indexes, limit)
    manifest.write(folder / "images.csv", Example, after)
    weights = class_weights(after)
    manifest.write_json(folder / "class_weights.json", weights)
    return {
        "before": dict(sorted(Counter(row.label for row in before).items())),
        "after": dict(sorted(Counter(row.label for row in after).items())),
        "largest weight": round(max(weights.values()), 3),
    }


def summary(counts: Mapping[str, Any]) -> str:
    """Return what `balance_classes` counted, for the log."""
    before, after = counts["before"], counts["after"]
    cut = [f"'{label}' {before[label]:,} -> {after[label]:,}" for label in before if after[label] < before[label]]
    cut = cut[:5] + ([f"{len(cut) - 5} more"] if len(cut) > 5 else [])
    sizes = f"classes of {min(after.values()):,} to {max(after.values()):,}"
    return (
        f"{sum(before.values()):,} -> {sum(after.values()):,} images in {sizes}"
        + (f"; cut down: {', '.join(cut)}" if cut else "")
        + f"; largest class weight {counts['largest weight']:.2f}"
    )
