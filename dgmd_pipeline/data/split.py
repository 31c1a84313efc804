"""Rows -> the training and the validation split, by content: the same images give the same split on every machine."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Example

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """The rows of both splits, sorted by path, and the effects of near-duplicate groups."""

    training: list[Example]
    validation: list[Example]
    labels_without_validation: list[str]  # sorted; each is a single group
    groups_across_labels: int  # groups with images of several labels; they are all in the training split


def write_splits(rows: Iterable[Example], fraction: float, folder: Path) -> dict[str, int]:
    """Write `training.csv` and `validation.csv` into `folder` (see `split`), and return the counts.

    Warns of labels without validation images. Raises NoUsableInput where no label has any.
    """
    found = split(rows, fraction)
    manifest.write(folder / "training.csv", Example, found.training)
    manifest.write(folder / "validation.csv", Example, found.validation)
    if not found.validation:
        raise NoUsableInput(
            "No label has images for the validation split: each label is a single group of near-duplicates. "
            "Add images that differ."
        )
    if found.labels_without_validation:
        listed = ", ".join(found.labels_without_validation)
        log.warning("labels without validation images (near-duplicates only): %s", listed)
    return {
        "training": len(found.training),
        "validation": len(found.validation),
        "across labels": found.groups_across_labels,
    }


def summary(counts: Mapping[str, int]) -> str:
    """Return the log line for the counts of `write_splits`."""
    across = counts["across labels"]
    return f"{counts['training']:,} training, {counts['validation']:,} validation" + (
        f"; near-duplicate groups across labels, all in training: {across:,}" if across else ""
    )


def split(rows: Iterable[Example], fraction: float) -> Split:
    """Put `round(fraction * n)` of each label's n images, at least 1 and at most n - 1, into the validation split.

    A near-duplicate group is never divided, so the number is the nearest one that the groups of the label allow. A
    label that is a single group goes into the training split, and so does a group with images of several labels.
    """
    rows = sorted(rows, key=attrgetter("path"))  # paths are unique; comparing whole rows takes twice as long
    counts = Counter(row.label for row in rows)
    sizes = Counter(row.group for row in rows)
    labels: dict[str, str] = {}
    across_labels = {row.group for row in rows if labels.setdefault(row.group, row.label) != row.label}
    groups: dict[str, list[str]] = defaultdict(list)
    for group, label in labels.items():
        if group not in across_labels:
            groups[label].append(group)
    chosen: set[str] = set()
    for label, candidates in groups.items():
        candidates.sort(key=_rank)
        target = min(max(round(fraction * counts[label]), 1), counts[label] - 1)
        positions = _choose([sizes[group] for group in candidates], target, limit=counts[label] - 1)
        chosen.update(candidates[position] for position in positions)
    training = [row for row in rows if row.group not in chosen]
    validation = [row for row in rows if row.group in chosen]
    without_validation = sorted(counts.keys() - {row.label for row in validation})
    return Split(training, validation, without_validation, len(across_labels))


def _rank(group: str) -> bytes:
    return hashlib.sha256(f"split {group}".encode()).digest()


def _choose(sizes: Sequence[int], target: int, limit: int) -> list[int]:
    """Return positions of `sizes` whose sum is nearest to `target`, from 1 to `limit`; earlier positions come first.

    A subset sum with bit sets: bit s of reachable[i] is set if a subset of sizes[i:] has the sum s.
    """
    bound = min(limit, target + max(sizes))
    all_sums = (1 << (bound + 1)) - 1
    reachable = [1]
    for size in reversed(sizes):
        sums = (reachable[-1] | reachable[-1] << size) & all_sums
        reachable.append(all_sums if sums == all_sums else sums)  # one object for all full sets: memory stays linear
    reachable.reverse()
    totals = [total for total in range(1, bound + 1) if reachable[0] >> total & 1]
    if not totals:
        return []
    remaining = min(totals, key=lambda total: abs(total - target))
    chosen = []
    for position, size in enumerate(sizes):
        if size <= remaining and reachable[position + 1] >> (remaining - size) & 1:
            chosen.append(position)
            remaining -= size
    return chosen
