"""A listing of the bucket <-> what lies in a folder: what is new, changed or gone, and what need not be fetched."""

import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import SourceObject

log = logging.getLogger(__name__)


def fingerprint(objects: Iterable[SourceObject]) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of what the objects are, whatever their order, wherever they lie."""
    digest = hashlib.sha256()
    for line in sorted((source.path, source.size, source.etag) for source in objects):
        digest.update("\0".join(map(str, line)).encode() + b"\n")
    return digest.hexdigest()


class Changes(NamedTuple):
    """How a listing differs from an earlier one."""

    new: int
    changed: int  # another size or ETag
    gone: int


def changes(before: Iterable[SourceObject], now: Iterable[SourceObject]) -> Changes:
    """Compare two listings by path, size and ETag."""
    earlier = {source.path: (source.size, source.etag) for source in before}
    new = changed = 0
    for source in now:
        known = earlier.pop(source.path, None)
        new += known is None
        changed += known is not None and known != (source.size, source.etag)
    return Changes(new, changed, len(earlier))


def reuse(
    objects: Sequence[SourceObject],
    folder: Path,
    notes: Path,
    former: Path,
    known: Iterable[SourceObject],
) -> tuple[list[SourceObject], list[SourceObject]]:
    """Leave in `folder` what need not be fetched again, and return those objects and the others.

    Kept is what an earlier download that was cut off wrote there, as far as it still is what the listing says; what the
    listing of that time had and this one has not is removed. `notes` is a file that keeps the listing for the next
    time. Of the objects `known` to be in the folder `former`, those that are still listed are linked, or copied where
    the disk has no hard links.
    """
    wanted = {source.path: source for source in objects}
    try:
        noted = list(manifest.read(notes, SourceObject)) if notes.exists() else []
    except PipelineError as error:
        log.warning("%s It is fetched anew.", str(error).partition(" It was")[0])
        for path in folder.iterdir():
            if path != notes.parent:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        noted = []
    for source in noted:
        if wanted.get(source.path) != source:
            _discard(folder, source.path)
    part = notes.with_suffix(".part")
    manifest.write(part, SourceObject, objects)
    part.replace(notes)
    for source in known:
        if wanted.get(source.path) == source and not _is_whole(folder, source) and _is_whole(former, source):
            _link(former / source.path, folder / source.path, part)
    there: list[SourceObject] = []
    missing: list[SourceObject] = []
    for source in objects:
        (there if _is_whole(folder, source) else missing).append(source)
    return there, missing


def missing_files(folder: Path, objects: Iterable[SourceObject]) -> int:
    """Return how many objects that should be in a finished folder are not, or have another size."""
    return sum(not _is_whole(folder, source) for source in objects)


def untracked_files(folder: Path, objects: Iterable[SourceObject]) -> list[str]:
    """Return the paths of files in subfolders of a finished folder that are none of its objects, hidden ones aside."""
    own = {source.path for source in objects}
    found = []
    for path, _, names in os.walk(folder):
        below = os.path.relpath(path, folder)
        found += [f"{below}/{name}" for name in names if f"{below}/{name}" not in own and name[0] != "." != below]
    return sorted(found)


def _is_whole(folder: Path, source: SourceObject) -> bool:
    try:
        status = os.lstat(f"{folder}/{source.path}")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == source.size


def _discard(folder: Path, path: str) -> None:
    """Remove a file and the folders that are empty then: an object may need a folder's place."""
    with suppress(FileNotFoundError, NotADirectoryError):
        (folder / path).unlink()
    for above in list((folder / path).parents)[: path.count("/")]:
        try:
            above.rmdir()
        except OSError:  # not empty, or not there
            break


def _link(source: Path, target: Path, part: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, part)  # a disk without hard links, or files of another owner
        part.replace(target)
