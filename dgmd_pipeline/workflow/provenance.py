"""What a finished folder was made from: `_SUCCESS` <-> StepRecord, and fingerprints."""

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

SUCCESS = "_SUCCESS"


@dataclass(frozen=True)
class StepRecord:
    """What `_SUCCESS` says of the folder it is in."""

    step: str  # the folder's name
    format: int  # number of the way it writes, raised when that changes
    identity: str  # hash, or an id of its own
    settings: dict[str, Any]  # those it was made with
    inputs: dict[str, str]  # name of an input -> its identity
    counts: dict[str, Any]  # what it came to, for people
    started: str  # ISO 8601, UTC
    seconds: float
    version: str  # of this package
    images: int | None = None  # that it holds or says something about
    bytes: int | None = None  # of its files
    worked: int | None = None  # images that it worked on in these seconds
    volume: int | None = None  # bytes of pictures that it read or wrote in them


def read_record(folder: Path) -> StepRecord | None:
    """Return the record of a finished folder, or None where there is none that can be read."""
    try:
        values = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
        # Another version may have written more.
        return StepRecord(**{each.name: values[each.name] for each in fields(StepRecord) if each.name in values})
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def digest(value: object) -> str:
    """Return the sha256 of a JSON value, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class FoundFiles(NamedTuple):
    """Files that nobody recorded."""

    identity: str
    files: int
    bytes: int


def walk(folder: Path) -> FoundFiles:
    """Identify files that nobody recorded by paths, sizes and modification times; only those in subfolders count."""
    entries: list[tuple[str, int, int]] = []
    for path, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if Path(path) != folder:
            for name in sorted(name for name in names if not name.startswith(".")):
                status = os.lstat(f"{path}/{name}")  # a Path would take longer than the call
                entries.append((f"{path[len(str(folder)) :]}/{name}", status.st_size, status.st_mtime_ns))
    return FoundFiles(digest(entries), len(entries), sum(size for _, size, _ in entries))
