"""`corrections.csv`, which an operator writes -> files with the right label, and files that are left out.

    key,label
    shirt/0017.jpg,blouse
    shirt/0031.jpg,exclude

A key is a path below raw/, as in `label_suspects.csv` and `rejected.csv`. The bucket and raw/ stay as they are.
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
from dgmd_pipeline.manifest import EXCLUDED, FORMULA, Image, RawFile, Rejected

log = logging.getLogger(__name__)
NAME = "corrections.csv"
COLUMNS = ["key", "label"]
MOST_NAMED = 10  # in a warning
EXCLUDE = "exclude"  # in place of a label


class Corrected(NamedTuple):
    """What the corrections make of the files under raw/."""

    files: list[RawFile]  # those to inspect, with their right labels
    excluded: list[Rejected]
    relabelled: int  # files whose label is another now
    unknown: list[str]  # keys that are no file's, sorted
    new: list[str]  # labels that no folder under raw/ has, sorted


def read(path: Path) -> dict[str, str]:
    """Return the label, or EXCLUDE, of each key in the file; nothing where there is no file.

    The file is UTF-8, with or without a byte order mark. The apostrophe that our tables put before what a spreadsheet
    takes for a formula is removed. Raises NoUsableInput, naming the line, where the file is not as expected.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise NoUsableInput(
            f"{path} cannot be read ({error.strerror}). Make it a readable file, or remove it."
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _malformed(path, line, "expected UTF-8, found other bytes; save the file as CSV in UTF-8") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: dict[str, tuple[str, int]] = {}
    try:
        header = next(rows, [])
        if header != COLUMNS:
            raise _malformed(path, 1, f"expected the columns key,label, found {','.join(header)[:100]!r}")
        for row in filter(None, rows):
            key, label = _parsed(path, rows.line_num, row)
            before, line = found.setdefault(key, (label, rows.line_num))
            if before != label:
                problem = f"{key!r} has the label {label!r} here and {before!r} in line {line}; keep one of them"
                raise _malformed(path, rows.line_num, problem)
    except csv.Error as error:
        raise _malformed(path, rows.line_num, f"expected comma-separated values ({error})") from None
    return {key: label for key, (label, _) in found.items()}


def apply(files: Iterable[RawFile], corrections: Mapping[str, str]) -> Corrected:
    """Give the files their right labels and take out those that are excluded."""
    found = Corrected([], [], 0, [], [])
    relabelled, labels, keys = 0, set(), set()
    for file in files:
        labels.add(file.label)
        keys.add(file.path)
        label = corrections.get(file.path, file.label)
        if label == EXCLUDE and file.path in corrections:
            found.excluded.append(Rejected(*file, EXCLUDED, f"by {NAME}"))
        else:
            found.files.append(file._replace(label=label))
            relabelled += label != file.label
    new = {label for key, label in corrections.items() if key in keys} - labels - {EXCLUDE}
    return found._replace(relabelled=relabelled, unknown=sorted(corrections.keys() - keys), new=sorted(new))


def without_copies(
    images: Iterable[Image], excluded: Iterable[Rejected], raw: Path
) -> tuple[list[Image], list[Rejected]]:
    """Take out the images that are the same file as an excluded one of their label; return the others and those.

    The same file under another label stays: excluding one of the two solves the conflict between them.
    """
    hashes: dict[tuple[str, str], str] = {}
    for row in excluded:
        with contextlib.suppress(OSError), (raw / row.path).open("rb") as file:  # a file that is gone has no copies
            hashes[hashlib.file_digest(file, "sha256").hexdigest(), row.label] = row.path
    kept, copies = [], []
    for image in images:
        original = hashes.get((image.sha256, image.label))
        if original:
            detail = f"the same file as {original}, which {NAME} excludes"
            copies.append(Rejected(image.path, image.label, EXCLUDED, detail))
        else:
            kept.append(image)
    return kept, copies


def _parsed(path: Path, line: int, row: list[str]) -> tuple[str, str]:
    """Return key and label of a row."""
    if len(row) != len(COLUMNS):
        raise _malformed(path, line, f"expected a key and a label, found {len(row)} values")
    key, label = (cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell for cell in row)
    problem = None
    if not key:
        problem = "the key is empty"
    elif not label:
        problem = "the label is empty"
    elif label != label.strip() or not label.isprintable():
        problem = f"the label {label!r} has a space at an end or a character that cannot be printed"
    elif "/" in label or label.startswith("."):
        problem = f"the label {label!r} contains a slash or begins with a dot"
    if problem:
        raise _malformed(path, line, f"{problem}; expected one label, or {EXCLUDE} to leave the image out")
    return key, EXCLUDE if label.lower() == EXCLUDE else label


def _malformed(path: Path, line: int, problem: str) -> NoUsableInput:
    return NoUsableInput(f"{path}, line {line}: {problem}.")


def warn(found: Corrected) -> None:
    """Warn of keys without a file and of labels that no folder has."""
    for names, what in (
        (found.unknown, f"keys in {NAME} for which there is no file below raw/"),
        (found.new, f"labels that only {NAME} has; check their spelling"),
    ):
        if names:
            more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
            log.warning("%s: %s%s", what, ", ".join(map(repr, names[:MOST_NAMED])), more)
