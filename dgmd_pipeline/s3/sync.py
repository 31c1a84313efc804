"""Compares a listing of the bucket with the files in a folder, and downloads what cannot be reused."""

import hashlib
import logging
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.errors import NoUsableInput, PipelineError
from dgmd_pipeline.manifest import LISTING, REJECTED, Rejected, SourceObject
from dgmd_pipeline.s3 import errors
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.download import download
from dgmd_pipeline.s3.listing import Listing, Objects, ignores_case
from dgmd_pipeline.workflow import disk, files

log = logging.getLogger(__name__)
SHOWN = 5  # rejected objects in the log; rejected.csv contains all rejected objects

Item = SourceObject | Rejected


class ShowProgress(Protocol):
    """Shows the progress of a download."""

    def __call__(self, items: Iterable[Item], total: int, unit: str, *, size: Callable[[Item], int]) -> Iterator[Item]:
        """Yield `items`, of which there are `total`; `size` returns the size of an item in bytes."""


@dataclass(frozen=True)
class DownloadResult:
    """What a download left in a folder."""

    objects: list[SourceObject]  # all objects in the folder
    fetched: list[SourceObject]  # objects that this download fetched
    rejected: list[Rejected]

    @property
    def counts(self) -> dict[str, int]:
        """Number and bytes of the objects, and the number of objects that were left out."""
        return {"objects": len(self.objects), "bytes": total_bytes(self.objects), "left out": len(self.rejected)}

    @property
    def summary(self) -> str:
        """A line for the log about the objects in the folder. The caller warns of the objects that were left out."""
        objects = formatting.describe_reuse(len(self.objects), "objects", len(self.fetched))
        return f"{objects}, {formatting.format_bytes(total_bytes(self.objects))}"


def total_bytes(objects: Iterable[SourceObject]) -> int:
    """Return the sum of the objects' sizes."""
    return sum(source.size for source in objects)


def download_folder(
    client: Client,
    listing: Listing,
    folder: Path,
    resume_dir: Path,
    previous: Path | None,
    step: str,
    max_failed: float,
    show: ShowProgress,
    fetch: Callable[[Client, str, Iterable[SourceObject], Path], Generator[Item]] = download,
) -> DownloadResult:
    """Download the listed objects into `folder`, and write `listing.csv` and `rejected.csv`.

    Reuses the files that an interrupted download left in `folder`. The listing of that download is in `resume_dir`.
    Also reuses the objects in the folder `previous`, an earlier download of the same bucket and prefix. Errors contain
    the step's name, `step`. `fetch` works like `download`.

    Raises NoUsableInput if no object can be used, or if more than the fraction `max_failed` (0..1) of the objects of a
    label cannot be fetched. Raises PipelineError if the disk has too little space.
    """
    if not listing.objects:
        raise _nothing_usable(listing, listing.rejected)
    available, missing = reuse(listing.objects, folder, resume_dir / LISTING, previous)
    if available:
        log.info("  %s of %s objects already downloaded", f"{len(available):,}", f"{len(listing.objects):,}")
    disk.check_space(folder, step, sum(disk.allocated_bytes(source.size) for source in missing))
    fetched: list[SourceObject] = []
    rejected = list(listing.rejected)
    check_failure = _failure_check(client, listing, max_failed)
    with closing(fetch(client, listing.bucket, missing, folder)) as items:
        for item in show(items, len(missing), "objects", size=lambda item: getattr(item, "size", 0)):
            if isinstance(item, SourceObject):
                fetched.append(item)
            else:
                rejected.append(item)
                check_failure(item)
    objects = available + fetched
    if not objects:
        raise _nothing_usable(listing, rejected)
    manifest.write(folder / LISTING, SourceObject, sorted(objects, key=lambda source: source.path))
    manifest.write(folder / REJECTED, Rejected, sorted(rejected))
    return DownloadResult(objects, fetched, rejected)


def _failure_check(client: Client, listing: Listing, max_failed: float) -> Callable[[Rejected], None]:
    """Return a function that counts a rejected object, and raises NoUsableInput if its label has lost too many objects.

    An object that is gone or archived does not count.
    """
    totals = Counter(path.partition("/")[0] for path in listing.objects.paths)
    failed: Counter[str] = Counter()

    def check(row: Rejected) -> None:
        if row.reason not in (errors.REFUSED, errors.FAILED, errors.CHANGED):
            return
        uri = f"s3://{listing.bucket}/{formatting.printable(row.path)}"
        if failed.total() < SHOWN:
            log.warning("  left out: %s: %s, %s", uri, row.reason, row.detail)
        failed[row.label] += 1
        if failed[row.label] > max_failed * totals[row.label]:
            raise NoUsableInput(
                f"More than {formatting.percent(max_failed)} of the objects of the label {row.label} cannot be "
                f"downloaded ({failed[row.label]:,} of {totals[row.label]:,}); for example {uri}: {row.reason}, "
                f"{row.detail}. {errors.remedy(client, row)} Or raise MAX_REJECTED_PCNT (now {max_failed:g})."
            )

    return check


def _nothing_usable(listing: Listing, rejected: Sequence[Rejected]) -> NoUsableInput:
    return NoUsableInput(
        f"None of the {len(rejected):,} objects in s3://{listing.bucket}/{listing.prefix} can be used. The first one "
        f"is {rejected[0].path}: {rejected[0].detail}. Upload images as {listing.prefix}/<label>/<file>."
    )


def reuse(
    objects: Iterable[SourceObject], folder: Path, resume_listing: Path, previous: Path | None
) -> tuple[list[SourceObject], list[SourceObject]]:
    """Put the objects that can be reused into `folder`. Return these objects, and the objects that must be fetched.

    An interrupted download may have left files in `folder`. Complete files of unchanged objects are kept. Files of
    changed or deleted objects are removed. Unchanged objects in `previous`, the folder of a finished download, are
    linked, or copied if the disk has no hard links. `objects` are stored in the file `resume_listing`. After an
    interruption, the next call reads this file.
    """
    listed = {source.path: source for source in objects}
    complete: set[str] = set()  # paths of the complete files in `folder`
    for source in _interrupted(folder, resume_listing):
        if listed.get(source.path) != source:
            _remove(folder, source.path)
        elif _is_complete(folder, source.path, source.size):
            complete.add(source.path)
    temporary = resume_listing.with_suffix(".part")
    manifest.write(temporary, SourceObject, listed.values())
    temporary.replace(resume_listing)
    if previous is not None:
        _link_unchanged(previous, listed, folder, complete, temporary)
    available: list[SourceObject] = []
    missing: list[SourceObject] = []
    for source in listed.values():
        (available if source.path in complete else missing).append(source)
    return available, missing


def _link_unchanged(
    previous: Path, listed: Mapping[str, SourceObject], folder: Path, complete: set[str], temporary: Path
) -> None:
    """Link the unchanged objects of a finished download into `folder`, and add their paths to `complete`."""
    made: set[Path] = set()
    for path, size, etag in stored_rows(previous):
        now = listed.get(path)
        unchanged = now is not None and (now.size, now.etag) == (size, etag) and _is_complete(previous, path, size)
        if unchanged and path not in complete:
            target = folder / path
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            target.unlink(missing_ok=True)
            files.link(previous / path, target, temporary)
            complete.add(path)


def _interrupted(folder: Path, resume_listing: Path) -> list[SourceObject]:
    """Return the listed objects of the interrupted download in `folder`.

    If the listing is missing or unreadable, returns an empty list. If it is unreadable, this function also removes the
    downloaded files.
    """
    if not resume_listing.exists():
        return []
    try:
        return list(manifest.read(resume_listing, SourceObject))
    except PipelineError as error:
        log.warning("%s: %s. All objects are downloaded again.", resume_listing, error.__cause__)
    for path in folder.iterdir():
        if path != resume_listing.parent:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return []


def _is_complete(folder: Path, path: str, size: int) -> bool:
    try:
        status = os.lstat(f"{folder}/{path}")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _remove(folder: Path, path: str) -> None:
    """Remove a file, and then its empty parent folders.

    If an object `a` has replaced the object `a/b`, an empty folder `a` would prevent the creation of the file `a`.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        (folder / path).unlink()
    for parent in list((folder / path).parents)[: path.count("/")]:
        try:
            parent.rmdir()
        except OSError:  # not empty, or missing
            break


def fingerprint(rows: Iterable[tuple[str, int, str]]) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of rows with path, size and ETag. The rows must be sorted by path."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update("\0".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()


class FolderChanges(NamedTuple):
    """Why a downloaded folder is out of date, and what a new download will contain."""

    reason: str  # for example "3 new, 1 gone"
    fingerprint: str | None  # fingerprint of the new listing; None if the listing has not changed
    objects: int
    bytes: int


def compare_folder(folder: Path, objects: Objects) -> FolderChanges | None:
    """Compare a downloaded folder with a new listing. Return None if the folder is up to date."""
    usable = objects.without({row.path for row in manifest.read(folder / REJECTED, Rejected)}).by_path()
    # Both listings are sorted by path, so they are read side by side. A dictionary of a million objects would take
    # 80 MB.
    known = usable.rows()
    now = next(known, None)
    new = changed = gone = missing = 0
    for stored in stored_rows(folder):
        path, size, _ = stored
        missing += not _is_complete(folder, path, size)
        while now is not None and now[0] < path:
            new += 1
            now = next(known, None)
        if now is None or now[0] != path:
            gone += 1
        else:
            changed += now != stored
            now = next(known, None)
    new += (now is not None) + sum(1 for _ in known)
    changes = {"new": new, "changed": changed, "gone": gone}
    reasons = changes | {
        # A new download tries these objects again, because an archived object may have been restored.
        "left out by the last download": len(objects) - len(usable),
        "missing from the folder": missing,
    }
    reason = ", ".join(f"{count:,} {name}" for name, count in reasons.items() if count)
    if not reason:
        return None
    return FolderChanges(
        reason, fingerprint(usable.rows()) if any(changes.values()) else None, len(objects), sum(objects.sizes)
    )


def stored_rows(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield path, size and ETag of each object in the listing of a downloaded folder, sorted by path."""
    for batch in manifest.read_columns(folder / LISTING, SourceObject, "path", "size", "etag"):
        paths, sizes, etags = (column.to_pylist() for column in batch.columns)
        yield from zip(map(manifest.decode, paths), sizes, map(manifest.decode, etags), strict=True)


def check_untracked_files(folder: Path) -> None:
    """Raise NoUsableInput if a downloaded folder, which will be replaced, contains files that were not downloaded."""
    found = untracked_files(folder, manifest.read(folder / LISTING, SourceObject))
    if found:
        raise NoUsableInput(
            f"{folder} contains {len(found):,} files that were not downloaded and would be lost. The first one is "
            f"{found[0]}. Upload them to the bucket or move them away, and run again."
        )


def untracked_files(folder: Path, objects: Iterable[SourceObject]) -> list[str]:
    """Return the paths of files in the folder's subfolders. System files, and the files of `objects`, are left out."""
    form = str.casefold if ignores_case(folder) else str
    tracked = {form(source.path) for source in objects}
    found = []
    for path, _, names in os.walk(folder):
        subfolder = os.path.relpath(path, folder)
        if subfolder != ".":  # the folder itself contains the pipeline's own files
            found += [path for name in names if not manifest.is_system_file(path := f"{subfolder}/{name}")]
    return sorted(path for path in found if form(path) not in tracked)
