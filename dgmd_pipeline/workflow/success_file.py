"""The file `_SUCCESS` in a step folder, which records what the folder was made from.

This module writes and reads the record, compares it with the current settings and inputs, and computes fingerprints.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]  # a JSON object
SUCCESS = "_SUCCESS"


@dataclass(frozen=True)
class StepRecord:
    """The content of `_SUCCESS`. Each field has the name of its key in the file."""

    step: str  # name of the folder
    format: int  # `Step.format_version` of the code that wrote the folder
    identity: str  # fingerprint of the folder
    settings: Json  # settings that the content depends on
    inputs: dict[str, str]  # name of an input -> its fingerprint
    counts: Json  # results of the step, for people and for later steps
    started: str  # ISO 8601, UTC
    seconds: float
    version: str  # version of dgmd_pipeline that wrote the folder
    images: int | None = None  # number of images that the folder contains or describes
    bytes: int | None = None  # total size of the folder's files
    worked: int | None = None  # images that were processed in `seconds`
    volume: int | None = None  # bytes of images that were read or written in `seconds`


def read_record(folder: Path) -> StepRecord | None:
    """Return the record of a finished folder, or None if the record is missing or cannot be read."""
    try:
        values = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
        # Another version may have written additional fields.
        return StepRecord(**{each.name: values[each.name] for each in fields(StepRecord) if each.name in values})
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def write_record(folder: Path, record: StepRecord) -> None:
    """Write the record of a finished folder."""
    (folder / SUCCESS).write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n", "utf-8")


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class FoundFiles(NamedTuple):
    """The files in a folder without a record."""

    fingerprint: str
    files: int
    bytes: int


def walk(folder: Path) -> FoundFiles:
    """Return the fingerprint of a folder without a record: a hash of paths, sizes and modification times.

    Only files in subfolders count. Names that begin with a dot are skipped.
    """
    entries: list[tuple[str, int, int]] = []
    for path, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if Path(path) != folder:
            for name in sorted(name for name in names if not name.startswith(".")):
                status = os.lstat(f"{path}/{name}")  # creating a Path would take longer than lstat
                entries.append((f"{path[len(str(folder)) :]}/{name}", status.st_size, status.st_mtime_ns))
    return FoundFiles(digest(entries), len(entries), sum(size for _, size, _ in entries))


class Reason(NamedTuple):
    """Why a step has its state in the plan; `str` returns the reason as text."""

    kind: Literal["missing", "unreadable", "external", "forced", "setting", "format", "input", "upstream", "waiting"]
    name: str = ""  # name of the setting or input; for "forced", "upstream" and "waiting", a text instead
    before: str = ""
    now: str = ""

    def __str__(self) -> str:
        return {
            "missing": "folder is missing",
            "unreadable": f"no readable {SUCCESS}: made by an older version, or not by this pipeline",
            "external": "no record of a download: used as it is",
            "setting": f"{self.name.upper()} {self.before} -> {self.now}",
            "format": f"format {self.before} -> {self.now}",
            "input": f"{self.name} changes",
            "waiting": f"only if {self.name} changes",
        }.get(self.kind, self.name)


def differences(record: StepRecord, settings: Json, format_version: int, inputs: Mapping[str, str]) -> list[Reason]:
    """Return the differences between a folder with this record and the folder that would be written now."""
    found = [
        Reason("setting", name, _shown(record.settings, name), _shown(settings, name))
        for name in sorted({*record.settings, *settings})
        if name not in record.settings or name not in settings or record.settings[name] != settings[name]
    ]
    if record.format != format_version:
        found.append(Reason("format", "", str(record.format), str(format_version)))
    changed = (name for name in sorted({*record.inputs, *inputs}) if record.inputs.get(name) != inputs.get(name))
    return [*found, *(Reason("input", name) for name in changed)]


def _shown(settings: Json, name: str) -> str:
    return "(not used)" if name not in settings else "(not set)" if settings[name] is None else str(settings[name])
