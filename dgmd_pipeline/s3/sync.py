"""A listing of the bucket <-> what lies in a folder: what is new, changed or gone, and what need not be fetched."""

import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.manifest import LISTING, REJECTED, Rejected, SourceObject
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.download import download
from dgmd_pipeline.workflow import disk

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


class Downloaded(NamedTuple):
    """What a download has left in a folder."""

    objects: list[SourceObject]  # that are in the folder
    fetched: list[SourceObject]  # of these, by this download
    rejected: list[Rejected]


def download_folder(
    client: Client,
    bucket: str,
    prefix: str,
    listed: tuple[list[SourceObject], list[Rejected]],
    folder: Path,
    resume_dir: Path,
    up_to_date: Path | None,
    what: str,
    show: Callable[..., Iterable[SourceObject | Rejected]],
) -> Downloaded:
    """Download what is listed and not yet in `folder`; write `listing.csv` and `rejected.csv`.

    Objects in the folder `up_to_date`, an earlier download of the same bucket and prefix, are reused, and so is what a
    download that was stopped left in `folder`; `resume_dir` is for its notes. `what` names the download in errors of
    the disk, `show` shows progress, see `progress.progress`.
    Raises NoUsableInput where no object can be used, PipelineError where the disk has no room.
    """
    objects, rejected = listed
    if not objects:
        raise _nothing_usable(bucket, prefix, rejected)
    with disk.disk_errors_explained(folder.parent, what, _allocated_bytes(objects)):
        known = manifest.read(up_to_date / LISTING, SourceObject) if up_to_date else ()
        arrived, missing = reuse(objects, folder, resume_dir / LISTING, up_to_date or folder, known)
        if arrived:
            log.info("  %s of %s objects already downloaded", f"{len(arrived):,}", f"{len(objects):,}")
        disk.check_space(folder, what, _allocated_bytes(missing))
        fetched: list[SourceObject] = []
        with closing(download(client, bucket, missing, folder)) as items:
            for item in show(items, len(missing), "objects", size=lambda item: getattr(item, "size", 0)):
                if isinstance(item, SourceObject):
                    fetched.append(item)
                else:
                    rejected.append(item)
    arrived += fetched
    if not arrived:
        raise _nothing_usable(bucket, prefix, rejected)
    manifest.write(folder / LISTING, SourceObject, sorted(arrived, key=lambda item: item.path))
    manifest.write(folder / REJECTED, Rejected, sorted(rejected))
    return Downloaded(arrived, fetched, rejected)


def _allocated_bytes(objects: Iterable[SourceObject]) -> int:
    return sum(disk.allocated_bytes(item.size) for item in objects)


def _nothing_usable(bucket: str, prefix: str, rejected: Sequence[Rejected]) -> NoUsableInput:
    return NoUsableInput(
        f"None of the {len(rejected):,} objects in s3://{bucket}/{prefix} can be used; the first one is "
        f"{rejected[0].path}: {rejected[0].detail}. Upload images as {prefix}/<label>/<file>."
    )


def check_untracked_files(folder: Path) -> None:
    """Raise NoUsableInput where a downloaded folder, which is to be replaced, also has files that were put there."""
    found = untracked_files(folder, manifest.read(folder / LISTING, SourceObject))
    if found:
        raise NoUsableInput(
            f"{folder} holds {len(found):,} files that were not downloaded and would be lost, the first one is "
            f"{found[0]}. Upload them to the bucket or move them away, and run again."
        )


def compare_folder(folder: Path, objects: Sequence[SourceObject]) -> tuple[str, str | None, int, int] | None:
    """Compare a downloaded folder with a new listing; None where it is up to date.

    Returns the differences in words, the fingerprint of the listing where it differs, and number and bytes of objects.
    """
    known = list(manifest.read(folder / LISTING, SourceObject))
    left_out = {row.path for row in manifest.read(folder / REJECTED, Rejected)}
    usable = [item for item in objects if item.key not in left_out]
    words = [f"{count:,} {word}" for word, count in changes(known, usable)._asdict().items() if count]
    new_fingerprint = fingerprint(usable) if words else None
    for count, word in (
        (len(objects) - len(usable), "left out before"),  # archived ones may have been restored
        (missing_files(folder, known), "lost in the folder"),
    ):
        if count:
            words.append(f"{count:,} {word}")
    return (", ".join(words), new_fingerprint, len(objects), sum(item.size for item in objects)) if words else None
