"""Row -> its side, training or validation, by content alone: the same images give the same split on every machine."""

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
    """The two sides, each sorted by path, and what near-duplicate groups made impossible."""

    training: list[Example]
    validation: list[Example]
    unvalidated: list[str]  # labels that have no image on the validation side
    across: int  # groups that span labels; they are all on the training side


def split(rows: Iterable[Example], fraction: float) -> Split:
    """Put `round(fraction * n)` of each label's n images, at least 1 and at most n - 1, on the validation side.

    Near-duplicate groups are never torn apart, so a label made of groups comes as near to that number as they allow,
    and one that is a single group goes to training whole. A group that spans labels goes to training.
    """
    rows = sorted(rows, key=attrgetter("path"))  # no two are the same; comparing whole rows takes twice as long
    counts = Counter(row.label for row in rows)
    sizes = Counter(row.group for row in rows)
    labels: dict[str, str] = {}
    across = {row.group for row in rows if labels.setdefault(row.group, row.label) != row.label}
    groups: dict[str, list[str]] = defaultdict(list)
    for group, label in labels.items():
        if group not in across:
            groups[label].append(group)
    chosen: set[str] = set()
    for label, candidates in groups.items():
        candidates.sort(key=_rank)
        wanted = min(max(round(fraction * counts[label]), 1), counts[label] - 1)
        positions = _choose([sizes[group] for group in candidates], wanted, most=counts[label] - 1)
        chosen.update(candidates[position] for position in positions)
    training = [row for row in rows if row.group not in chosen]
    validation = [row for row in rows if row.group in chosen]
    unvalidated = sorted(counts.keys() - {row.label for row in validation})
    return Split(training, validation, unvalidated, len(across))


def _rank(group: str) -> bytes:
    return hashlib.sha256(f"split {group}".encode()).digest()


def _choose(sizes: Sequence[int], wanted: int, most: int) -> list[int]:
    """Return the positions of sizes whose sum is as near to `wanted` as can be, from 1 to `most`, first ones first.

    A subset sum over bit sets: bit s of `reach[i]` says whether sizes[i:] can give the sum s.
    """
    bound = min(most, wanted + max(sizes))
    full = (1 << (bound + 1)) - 1
    reach = [1]
    for size in reversed(sizes):
        sums = (reach[-1] | reach[-1] << size) & full
        reach.append(full if sums == full else sums)  # one object for all full sets: memory stays linear
    reach.reverse()
    reachable = [total for total in range(1, bound + 1) if reach[0] >> total & 1]
    if not reachable:
        return []
    rest = min(reachable, key=lambda total: abs(total - wanted))
    chosen = []
    for position, size in enumerate(sizes):
        if size <= rest and reach[position + 1] >> (rest - size) & 1:
            chosen.append(position)
            rest -= size
    return chosen


def split_images(rows: Iterable[Example], fraction: float, folder: Path) -> dict[str, int]:
    """Write the two splits into `folder`, as `training.csv` and `validation.csv`, and return the counts.

    Raises NoUsableInput where no label has images that can be kept for validation.
    """
    splits = split(rows, fraction)
    manifest.write(folder / "training.csv", Example, splits.training)
    manifest.write(folder / "validation.csv", Example, splits.validation)
    if not splits.validation:
        raise NoUsableInput(
            "No label has images that can be kept for validation: each is a single group of near-duplicates. "
            "Add images that differ."
        )
    if splits.unvalidated:
        log.warning("labels without validation images (near-duplicates only): %s", ", ".join(splits.unvalidated))
    return {"training": len(splits.training), "validation": len(splits.validation), "across labels": splits.across}


def summary(counts: Mapping[str, int]) -> str:
    """Return what `split_images` counted, for the log."""
    across = counts["across labels"]
    return f"{counts['training']:,} training, {counts['validation']:,} validation" + (
        f"; near-duplicate groups across labels, all in training: {across:,}" if across else ""
    )
