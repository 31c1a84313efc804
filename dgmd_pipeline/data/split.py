"""Assigns rows to the training or the validation split. Hashes decide, so that every machine makes the same split."""

import logging
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.data import columns
from dgmd_pipeline.data.subset_sum import nearest_subset
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Example

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Which rows are in the validation split, and how many groups of near-duplicates have several labels."""

    validation: np.ndarray  # bool [rows]
    groups_across_labels: int  # number of groups with images of several labels; these groups are in the training split


def write_splits(rows: Path, fraction: float, folder: Path) -> dict[str, int]:
    """Write `training.csv` and `validation.csv` into `folder` (see `split`), and return the counts.

    `rows` is a CSV file of `Example` rows. The rows of each split have the same order as in `rows`.

    Warns of labels without validation images. Raises NoUsableInput if no label has validation images.
    """
    numbers = columns.LabelNumbers()
    labels, ranks = [], []
    for batch in manifest.read_columns(rows, Example, "label", "group"):
        labels.append(numbers.of(batch["label"]))
        ranks.append(columns.ranks("split", batch["group"].to_pylist()))
    label_of = np.concatenate(labels)
    found = split(label_of, np.concatenate(ranks), fraction)
    for name, chosen in (("training", ~found.validation), ("validation", found.validation)):
        batches = columns.select(manifest.read_columns(rows, Example), chosen)
        manifest.write_columns(folder / f"{name}.csv", Example, batches)
    if not found.validation.any():
        raise NoUsableInput(
            "No label has images for the validation split. Each label has a single image, or only near-duplicates "
            "of each other or of other labels' images. Add images that differ."
        )
    images = np.bincount(label_of[found.validation], minlength=len(numbers))
    if missing := sorted(name for name, count in zip(numbers.names, images, strict=True) if not count):
        log.warning("labels without validation images (a single image or only near-duplicates): %s", ", ".join(missing))
    validation = int(found.validation.sum())
    return {
        "training": len(label_of) - validation,
        "validation": validation,
        "across labels": found.groups_across_labels,
    }


def summary(counts: Mapping[str, int]) -> str:
    """Return the log line for the counts of `write_splits`."""
    across = counts["across labels"]
    return f"{counts['training']:,} training, {counts['validation']:,} validation" + (
        f"; near-duplicate groups across labels, all in training: {across:,}" if across else ""
    )


def split(labels: np.ndarray, groups: np.ndarray, fraction: float) -> Split:
    """Put `round(fraction * n)` of each label's n images, at least 1 and at most n - 1, into the validation split.

    `labels` (integers >= 0 [rows]) and `groups` (uint64 [rows, 2], `columns.ranks` of the near-duplicate groups)
    describe the rows. Groups are never divided. If no set of the label's groups has exactly this number of images, the
    nearest possible number is used. If several sets of groups have this number, groups of lower rank are preferred. A
    label that is a single group goes into the training split, and so does a group with images of several labels.
    """
    order = columns.order(groups)
    is_first = np.append(True, (groups[order[1:]] != groups[order[:-1]]).any(axis=1))
    group_of = np.empty(len(labels), np.int64)  # numbered by rank
    group_of[order] = np.cumsum(is_first) - 1
    sizes = np.bincount(group_of)
    label_of = np.empty(len(sizes), np.int64)
    label_of[group_of] = labels
    across_labels = np.zeros(len(sizes), bool)
    across_labels[group_of[label_of[group_of] != labels]] = True
    candidates = np.flatnonzero(~across_labels)
    candidates = candidates[np.argsort(label_of[candidates], kind="stable")]
    counts = np.bincount(labels).tolist()
    edges = np.searchsorted(label_of[candidates], np.arange(len(counts) + 1)).tolist()
    chosen = np.zeros(len(sizes), bool)
    for count, (first, stop) in zip(counts, pairwise(edges), strict=True):
        if first < stop:
            target = min(max(round(fraction * count), 1), count - 1)
            positions = nearest_subset(sizes[candidates[first:stop]].tolist(), target, limit=count - 1)
            chosen[candidates[first:stop][positions]] = True
    return Split(chosen[group_of], int(across_labels.sum()))
