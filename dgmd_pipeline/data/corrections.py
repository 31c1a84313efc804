"""Applies `corrections.csv`, in which an operator corrects labels and excludes files.

    key,label
    shirt/0017.jpg,blouse
    shirt/0031.jpg,exclude

A key is a path below raw/, as in `label_suspects.csv` and `rejected.csv`. The bucket and raw/ remain unchanged.
"""

import contextlib
import csv
import hashlib
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import EXCLUDED, Image, RawFile, Rejected, from_cell

log = logging.getLogger(__name__)
NAME = "corrections.csv"
COLUMNS = ["key", "label"]
EXCLUDE = "exclude"  # in place of a label
MAX_LISTED = 10  # names in a warning


class Corrected(NamedTuple):
    """The files under raw/ after the corrections, and the corrections that match no file or folder."""

    files: list[RawFile]  # to inspect, with their corrected labels
    excluded: list[Rejected]
    relabelled: int  # number of files whose label a correction changed
    unknown_keys: list[str]  # keys without a file, sorted
    new_labels: list[str]  # labels without a folder under raw/, sorted


def read(path: Path) -> dict[str, str]:
    """Return a dictionary that maps each key in the file to its label or EXCLUDE; {} if there is no file.

    The file is UTF-8, with or without a byte order mark. In the tables that the pipeline writes, an apostrophe precedes
    text that looks like a formula. This function removes the apostrophe from keys and labels that were copied from such
    tables. Raises NoUsableInput with the line of the first mistake.
    """
    text = _read_text(path)
    if text is None:
        return {}
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    try:
        header = next(rows, [])
        if header != COLUMNS:
            raise _malformed(path, 1, f"expected the columns key,label, found {','.join(header)[:100]!r}")
        for row in filter(None, rows):
            key, label = _parse(path, rows.line_num, row)
            previous, line = labels.setdefault(key, label), lines.setdefault(key, rows.line_num)
            if previous != label:
                problem = f"{key!r} has the label {label!r} here and {previous!r} in line {line}; keep one of them"
                raise _malformed(path, rows.line_num, problem)
    except csv.Error as error:
        raise _malformed(path, rows.line_num, f"expected comma-separated values ({error})") from None
    return labels


def apply(files: Iterable[RawFile], corrections: Mapping[str, str]) -> Corrected:
    """Correct the labels of the files, and separate the excluded files."""
    remaining, excluded = [], []
    relabelled, labels, keys = 0, set(), set()
    for file in files:
        labels.add(file.label)
        keys.add(file.path)
        label = corrections.get(file.path, file.label)
        if label == EXCLUDE and file.path in corrections:
            excluded.append(Rejected(*file, EXCLUDED, f"by {NAME}"))
        else:
            remaining.append(file._replace(label=label))
            relabelled += label != file.label
    new_labels = {label for key, label in corrections.items() if key in keys} - labels - {EXCLUDE}
    return Corrected(remaining, excluded, relabelled, sorted(corrections.keys() - keys), sorted(new_labels))


def warn_of_mismatches(corrected: Corrected) -> None:
    """Log a warning for keys without a file and one for labels without a folder."""
    for names, problem in (
        (corrected.unknown_keys, f"keys in {NAME} without a file below raw/"),
        (corrected.new_labels, f"labels in {NAME} without a folder below raw/; check their spelling"),
    ):
        if names:
            more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
            log.warning("%s: %s%s", problem, ", ".join(map(repr, names[:MAX_LISTED])), more)


def exclude_copies(
    images: Iterable[Image], excluded: Iterable[Rejected], raw: Path
) -> tuple[list[Image], list[Rejected]]:
    """Exclude the images that have the same bytes and the same label as an excluded file.

    Returns the remaining images, and the rejections of the images that this call excludes. Copies with another label
    remain, so an operator can resolve a conflict between the labels of two copies by excluding one copy.
    """
    originals: dict[tuple[str, str], str] = {}
    for row in excluded:
        # If an excluded file cannot be read, its hash is unknown, so its copies cannot be found.
        with contextlib.suppress(OSError), (raw / row.path).open("rb") as file:
            originals[hashlib.file_digest(file, "sha256").hexdigest(), row.label] = row.path
    others, copies = [], []
    for image in images:
        original = originals.get((image.sha256, image.label))
        if original:
            detail = f"the same file as {original}, which {NAME} excludes"
            copies.append(Rejected(image.path, image.label, EXCLUDED, detail))
        else:
            others.append(image)
    return others, copies


def _read_text(path: Path) -> str | None:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NoUsableInput(
            f"{path} cannot be read ({error.strerror}). Make it a readable file, or remove it."
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _malformed(path, line, "expected UTF-8, found other bytes; save the file as CSV in UTF-8") from None


def _parse(path: Path, line: int, row: list[str]) -> tuple[str, str]:
    """Return the key and the label of a row."""
    if len(row) != len(COLUMNS):
        raise _malformed(path, line, f"expected a key and a label, found {len(row)} values")
    key, label = map(from_cell, row)
    problem = None
    if not key:
        problem = "the key is empty"
    elif not label:
        problem = "the label is empty"
    elif label != label.strip() or not label.isprintable():
        problem = f"the label {label!r} begins or ends with a space, or has a character that cannot be printed"
    elif "/" in label or label.startswith("."):
        problem = f"the label {label!r} contains a slash or begins with a dot"
    if problem:
        raise _malformed(path, line, f"{problem}; expected one label, or {EXCLUDE} to leave the image out")
    return key, EXCLUDE if label.lower() == EXCLUDE else label


def _malformed(path: Path, line: int, problem: str) -> NoUsableInput:
    return NoUsableInput(f"{path}, line {line}: {problem}.")
