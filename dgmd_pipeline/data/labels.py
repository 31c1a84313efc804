"""The label map: the class index of each label, and the labels with enough images to be used."""

import json
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.manifest import changed_file_error

log = logging.getLogger(__name__)


class LabelRow(NamedTuple):
    """A label of the images or of an earlier label map."""

    label: str
    class_index: int  # -1: models have no output for the label, because it never had enough images
    images: int  # number of usable images
    state: str  # "used", "too few" (images) or "gone" (no images, but a label of an earlier label map)


def write_label_map(counts: Mapping[str, int], known: Sequence[str], minimum: int, folder: Path) -> dict[str, int]:
    """Write the label map (see `assign`) into `folder`, and return the numbers of used labels and of model outputs.

    `mapping.json` is for users of the model; `labels.csv` also contains the number of images of each label. Warns of
    unused and of confusable labels.
    """
    rows = assign(counts, known, minimum)
    outputs = [row.label for row in rows if row.class_index >= 0]
    write_mapping(folder / "mapping.json", outputs)
    manifest.write(folder / "labels.csv", LabelRow, rows)
    for state, meaning in (
        ("too few", f"fewer than {minimum} usable images, left out"),
        ("gone", "no images any more, kept as an output"),
    ):
        if unused := [row.label for row in rows if row.state == state]:
            log.warning("labels with %s: %s", meaning, ", ".join(unused))
    for group in confusable_labels(row.label for row in rows if row.state == "used"):
        log.warning("Possible duplicate labels (case or spacing differs): %s", ", ".join(map(repr, group)))
    return {"labels": sum(row.state == "used" for row in rows), "outputs": len(outputs)}


def assign(counts: Mapping[str, int], known: Sequence[str], minimum: int) -> list[LabelRow]:
    """Assign class indexes to labels.

    `known` are the labels of the earlier label map, in the order of their class indexes. These labels keep their
    indexes. New labels get the next indexes, in alphabetical order.

    `counts` maps each label to its number of usable images. A label with fewer than `minimum` images is not used: it
    keeps its index if it is in `known`, and gets no index otherwise. The rows are in the order of their indexes. Rows
    without an index come last. Raises NoUsableInput if fewer than two labels can be used.
    """
    used = {label for label, count in counts.items() if count >= minimum}
    if len(used) < 2:
        listed = ", ".join(f"{label} ({count})" for label, count in sorted(counts.items())) or "none"
        raise NoUsableInput(
            f"A classifier needs at least two labels with {minimum} usable images each (MIN_IMAGES_PER_LABEL); "
            f"labels with usable images: {listed}. Add labelled images. DATA_DIR/inspected/rejected.csv lists the "
            "images that were left out."
        )
    names = [*known, *sorted(used - set(known))]
    rows = [
        LabelRow(label, index, count := counts.get(label, 0), _state(count, minimum))
        for index, label in enumerate(names)
    ]
    rows += [LabelRow(label, -1, counts[label], "too few") for label in sorted(counts.keys() - set(names))]
    return rows


def _state(count: int, minimum: int) -> str:
    if count >= minimum:
        return "used"
    return "too few" if count else "gone"


def confusable_labels(labels: Iterable[str]) -> list[list[str]]:
    """Return the groups of labels that differ only in case, outer or repeated spaces, or Unicode form."""
    groups = defaultdict(list)
    for label in labels:
        groups[" ".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def write_mapping(path: Path, labels: Sequence[str]) -> None:
    """Write `{"0": "allspice", "1": "anise", ...}`, the file that users of the model read."""
    mapping = {str(index): label for index, label in enumerate(labels)}
    path.write_text(json.dumps(mapping, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_mapping(path: Path) -> list[str]:
    """Return the labels in the order of their class indexes.

    Raises PipelineError unless the file maps "0", "1", ... without gaps to different labels.
    """
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        labels = [mapping[str(index)] for index in range(len(mapping))]
        if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
            raise ValueError("a label is not a string, or occurs twice")
    except FileNotFoundError as error:
        raise changed_file_error(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(
            f'{path}: expected {{"0": "<label>", "1": "<label>", ...}} without gaps, found something else ({error}). '
            "Correct the file, or delete its folder to number the labels again."
        ) from None
    return labels
