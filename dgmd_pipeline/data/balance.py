"""Balances classes: removes images of large classes and computes class weights.

Images of small classes are not repeated.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa

from dgmd_pipeline import manifest
from dgmd_pipeline.data import columns
from dgmd_pipeline.manifest import Example, Image

MAX_LISTED = 5  # labels in the log line
# "before" and "after" map each label to its number of images before and after the balancing.
BalanceCounts = TypedDict("BalanceCounts", {"before": dict[str, int], "after": dict[str, int], "largest weight": float})


def write_balanced(images: Path, indexes: Mapping[str, int], limit: float | None, folder: Path) -> BalanceCounts:
    """Write the rows that `balance` keeps, and the weights of the classes, into `folder`, and return the counts.

    `images` is a CSV file of `Image` rows. The written rows are in the order of this file. `indexes` maps each label
    to its class index. `limit` is as in `balance`.
    """
    numbers = columns.LabelNumbers()
    found = [numbers.of(batch["label"]) for batch in manifest.read_columns(images, Image, "label")]
    # The class index of each label, in the order of `numbers`. Labels that are not used have -1.
    index_of = np.array([indexes.get(name, -1) for name in numbers.names])
    classes = index_of[np.concatenate(found)]
    kept = balance(classes, limit, manifest.read_columns(images, Image, "sha256"))
    batches = _examples(manifest.read_columns(images, Image), classes)
    manifest.write_columns(folder / "images.csv", Example, columns.select(batches, kept))
    before, after = count_classes(classes[classes >= 0]), count_classes(classes[kept])
    weights = class_weights(after)
    manifest.write_json(folder / "class_weights.json", weights)
    present = sorted(name for name in numbers.names if name in indexes)
    return {
        "before": {name: before[indexes[name]] for name in present},
        "after": {name: after[indexes[name]] for name in present},
        "largest weight": round(max(weights.values()), 3),
    }


def _examples(batches: Iterable[pa.RecordBatch], classes: np.ndarray) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in batches:
        indexed = batch.append_column("class_index", pa.array(classes[first : first + batch.num_rows]))
        yield indexed.select(Example._fields)
        first += batch.num_rows


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


def balance(classes: np.ndarray, limit: float | None, hashes: Iterable[pa.RecordBatch]) -> np.ndarray:
    """Return which images to keep (bool [images]), so that large classes are reduced.

    `classes` are the class indexes of the images. Images of unused labels have the index -1 and are never kept. A class
    keeps at most `limit` (>= 1) times the mean class size; if `limit` is None, it keeps all images. `hashes` are
    batches with the column `sha256`, read only if a class is too large. A class that is too large keeps the images
    whose hashes have the lowest ranks (`columns.ranks`). So the order of the images does not affect the choice, and new
    images change it little.
    """
    kept = classes >= 0
    counts = np.bincount(classes[kept])
    cap = int(limit * int(counts.sum()) / np.count_nonzero(counts)) if limit else None
    if cap is None or counts.max() <= cap:
        return kept
    large = kept & (counts > cap)[classes]
    batches = columns.select(hashes, large)
    ranks = np.concatenate([columns.ranks("balance", batch["sha256"].to_pylist()) for batch in batches])
    positions = np.flatnonzero(large)[columns.order(ranks)]
    positions = positions[np.argsort(classes[positions], kind="stable")]  # by class, then by rank
    by_class = classes[positions]
    place = np.arange(len(positions)) - np.searchsorted(by_class, by_class)
    kept[positions[place >= cap]] = False
    return kept


def count_classes(classes: np.ndarray) -> dict[int, int]:
    """Return class index -> number of images, in the order of each class's first image."""
    found, first, counts = np.unique(classes, return_index=True, return_counts=True)
    order = np.argsort(first)
    return dict(zip(found[order].tolist(), counts[order].tolist(), strict=True))


def class_weights(counts: Mapping[int, int]) -> dict[int, float]:
    """Return class index -> weight: the inverse square root of the class size, scaled to a mean of 1 over the images.

    `counts` maps each class index to its number of images.

    The inverse of the class size itself would give every class the same total weight. If the imbalance is mild, such
    weights lower the accuracy by up to 0.8 points, compared with no weights (docs/measurements/head.md). The square
    root is from Mahajan et al., "Exploring the Limits of Weakly Supervised Pretraining", 2018, section 2.2.
    """
    mean = sum(count**0.5 for count in counts.values()) / sum(counts.values())
    return {index: 1 / (mean * count**0.5) for index, count in sorted(counts.items())}
