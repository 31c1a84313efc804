"""Stores the results of an inspection, so that the next inspection opens only new and changed files.

The folder of an inspection has these files:

- `files.csv`: a row for each file whose result can be reused
- `thumbnails`: the thumbnails of the usable files (uint8 [n, 16, 16, 3]), in the order of `files.csv`
- `hashes.npy` and `copies.npy`: the arrays of `near_duplicates.Known`
- `checksums.json`: the SHA-256 of each of the other files
"""

import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.data.near_duplicates import THUMBNAIL_SIZE, Known
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import Image, RawFile, Rejected
from dgmd_pipeline.workflow import files

log = logging.getLogger(__name__)
FILES, THUMBNAILS, HASHES, COPIES, CHECKSUMS = "files.csv", "thumbnails", "hashes.npy", "copies.npy", "checksums.json"
Outcome = Rejected | tuple[Image, bytes]  # a usable image and its thumbnail


class InspectedFile(NamedTuple):
    """A file, without its label, and the result of its inspection."""

    path: str  # below raw/
    version: str  # see `version`
    sha256: str  # as in Image; "" if the file is rejected
    format: str  # as in Image; "" if the file is rejected
    width: int  # as in Image; 0 if the file is rejected
    height: int  # as in Image; 0 if the file is rejected
    reason: str  # as in Rejected; "" if the file is usable
    detail: str  # as in Rejected; "" if the file is usable

    @classmethod
    def of(cls, file: RawFile, version: str, outcome: Outcome) -> "InspectedFile":
        """Return the row for an outcome."""
        if isinstance(outcome, Rejected):
            return cls(file.path, version, "", "", 0, 0, outcome.reason, outcome.detail)
        image = outcome[0]
        return cls(file.path, version, image.sha256, image.format, image.width, image.height, "", "")

    def outcome(self, label: str, thumbnail: bytes) -> Outcome:
        """Return the stored result with `label`, which is the file's present label, and `thumbnail`."""
        if self.reason:
            return Rejected(self.path, label, self.reason, self.detail)
        return Image(self.path, label, self.sha256, self.format, self.width, self.height, self.sha256), thumbnail


class PreviousInspection:
    """The results in the intact folders of earlier inspections.

    If several folders have a result for a path, the last of these folders in `folders` counts.
    """

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        # path -> the row, all thumbnails in the folder of the row, and the position of the row's thumbnail among them
        self._rows: dict[str, tuple[InspectedFile, np.ndarray, int]] = {}
        # The hashes and near-duplicates of the first folder. The other folders are pieces (see `inspection.inspect`),
        # whose images have not been compared.
        self.known: Known | None = None
        for folder in filter(_is_intact, folders):
            usable, thumbnails = 0, open_thumbnails(folder)
            for row in manifest.read(folder / FILES, InspectedFile):
                self._rows[row.path] = row, thumbnails, usable
                usable += not row.reason
            self.known = self.known or Known(np.load(folder / HASHES), np.load(folder / COPIES))

    def find(self, file: RawFile, version: str | None) -> Outcome | None:
        """Return the result for a file that has not changed; None if it is new or has changed."""
        if version is None or file.path not in self._rows:
            return None
        row, thumbnails, position = self._rows[file.path]
        if row.version != version:
            return None
        return row.outcome(file.label, b"" if row.reason else thumbnails[position].tobytes())


def version(path: Path, etag: str | None) -> str | None:
    """Return the size and the ETag of a file as text; without an ETag, the size and the time of its last change.

    Returns None if it is not a regular file. A file with the same version counts as unchanged.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path object would take longer
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return describe(status.st_size, status.st_mtime_ns if etag is None else etag)


def describe(size: int, changed: object) -> str:
    """Return the version of a file of `size` bytes. `changed` is its ETag, or the time of its last change."""
    return f"{size} {changed}"


def count_unchanged(folder: Path, versions: Mapping[str, str | None]) -> int:
    """Return how many files of `versions` (path -> version) have a result in `folder`.

    Returns 0 if the results cannot be read.
    """
    try:
        return sum(versions.get(row.path) == row.version for row in manifest.read(folder / FILES, InspectedFile))
    except PipelineError:
        return 0


def open_thumbnails(folder: Path) -> np.ndarray:
    """Return the thumbnails in a folder: uint8 [n, 16, 16, 3], mapped from disk."""
    shape = -1, THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3
    path = folder / THUMBNAILS
    is_empty = path.stat().st_size == 0  # an empty file cannot be mapped
    return (np.empty(0, np.uint8) if is_empty else np.memmap(path, np.uint8, "r")).reshape(shape)


def write(folder: Path, rows: Iterable[InspectedFile], known: Known) -> None:
    """Write `files.csv`, the arrays and the checksums into a folder that already has the thumbnails."""
    manifest.write(folder / FILES, InspectedFile, rows)
    np.save(folder / HASHES, known.hashes, allow_pickle=False)
    np.save(folder / COPIES, known.copies, allow_pickle=False)
    manifest.write_json(folder / CHECKSUMS, _checksums(folder))


def _checksums(folder: Path) -> Mapping[str, str]:
    return {name: files.sha256(folder / name) for name in (FILES, THUMBNAILS, HASHES, COPIES)}


def _is_intact(folder: Path) -> bool:
    try:
        if manifest.read_json(folder / CHECKSUMS) == _checksums(folder):
            return True
        problem = "a checksum differs"
    except (OSError, PipelineError) as error:
        problem = str(error)
    log.warning("The results in %s are not reused (%s). The files are inspected again", folder, problem)
    return False
