"""Rows -> fewer rows and class weights. A cap on the class size removes images; no image is repeated."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import Example, Image

MAX_LISTED = 5  # labels in the log line
# "before" and "after" are the numbers of images by label.
BalanceCounts = TypedDict("BalanceCounts", {"before": dict[str, int], "after": dict[str, int], "largest weight": float})


def write_balanced(
    images: Iterable[Image], indexes: Mapping[str, int], limit: float | None, folder: Path
) -> BalanceCounts:
    """Write the rows of `balance` and their class weights into `folder`, and return the counts of each label."""
    labelled = [image for image in images if image.label in indexes]
    rows = balance(labelled, indexes, limit)
    weights = class_weights(rows)
    manifest.write(folder / "images.csv", Example, rows)
    manifest.write_json(folder / "class_weights.json", weights)
    return {
        "before": dict(sorted(Counter(image.label for image in labelled).items())),
        "after": dict(sorted(Counter(row.label for row in rows).items())),
        "largest weight": round(max(weights.values()), 3),
    }


def summary(counts: BalanceCounts) -> str:
    """Return the log line for the counts of `write_balanced`."""
    before, after = counts["before"], counts["after"]
    cut = [f"'{label}' {before[label]:,} -> {after[label]:,}" for label in before if after[label] < before[label]]
    cut = cut[:MAX_LISTED] + ([f"{len(cut) - MAX_LISTED} more"] if len(cut) > MAX_LISTED else [])
    sizes = f"classes of {min(after.values()):,} to {max(after.values()):,}"
    return (
        f"{sum(before.values()):,} -> {sum(after.values()):,} images in {sizes}"
        + (f"; cut down: {', '.join(cut)}" if cut else "")
        + f"; largest class weight {counts['largest weight']:.2f}"
    )


def balance(images: Iterable[Image], indexes: Mapping[str, int], limit: float | None) -> list[Example]:
    """Return the images of the labels in `indexes`, sorted by path, and reduce large classes.

    A class has at most `limit` (>= 1) times the mean class size; None keeps all images. The content hash decides which
    images remain: the same images give the same rows, and most rows remain when others arrive.
    """
    classes: dict[str, list[Example]] = defaultdict(list)
    for image in images:
        if image.label in indexes:
            row = Example(image.path, image.label, indexes[image.label], image.sha256, image.group)
            classes[image.label].append(row)
    cap = int(limit * sum(map(len, classes.values())) / len(classes)) if limit else None
    return sorted(row for rows in classes.values() for row in sorted(rows, key=_rank)[:cap])


def _rank(row: Example) -> bytes:
    return hashlib.sha256(f"balance {row.sha256}".encode()).digest()


def class_weights(rows: Iterable[Example]) -> dict[int, float]:
    """Return class index -> weight: the inverse square root of the class size, scaled to a mean of 1 over the images.

    Inverse frequencies, which give every class the same total weight, cost up to 0.8 points of accuracy where the
    imbalance is mild: docs/measurements/head.md. Square root: Mahajan et al., "Exploring the Limits of Weakly
    Supervised Pretraining", 2018, section 2.2.
    """
    counts = Counter(row.class_index for row in rows)
    mean = sum(count**0.5 for count in counts.values()) / sum(counts.values())
    return {index: 1 / (mean * count**0.5) for index, count in sorted(counts.items())}
