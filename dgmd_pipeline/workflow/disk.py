"""Checks of free disk space, and explanations of disk errors."""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import as_user, format_bytes

Found = TypeVar("Found")
FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors while a folder is removed, if another process removes or creates files in it at the same time.
BUSY = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
REMOVAL_TIMEOUT = 10.0  # seconds for which `remove` tries again while another process writes in the folder
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the C library puts the semaphores of worker processes
SHOWN = 200  # maximum length of a path in an error text, in characters
SECONDS_KEPT = 24 * 60 * 60  # temporary files that are older than this are removed, because no run still uses them
BLOCK = 4096  # bytes in a block of most disks; a file occupies whole blocks


def allocated_bytes(size: int) -> int:
    """Return how many bytes a file of `size` bytes occupies on most disks."""
    return -(-size // BLOCK) * BLOCK


def check_space(place: Path, what: str, needed: int) -> None:
    """Raise PipelineError if `what` needs more bytes than are free on the disk of `place`."""
    free = shutil.disk_usage(place).free
    if needed > free:
        data_dir = next((path.parent for path in place.parents if path.name.startswith(".draft-")), place.parent)
        raise _full(data_dir, f"{what} needs {format_bytes(needed)}, but only {format_bytes(free)} are free")


def _full(data_dir: Path, need: str) -> PipelineError:
    return PipelineError(f"{data_dir}: the disk is full: {need}. Free space and run again: finished steps are kept.")


@contextlib.contextmanager
def disk_errors_explained(data_dir: Path, what: str = "the run", needed: int | None = None) -> Iterator[None]:
    """If the block raises an OSError that an operator can fix, raise a PipelineError with the remedy instead.

    Other errors are raised as they are.
    `data_dir` is DATA_DIR. `needed` is the approximate number of bytes that `what` writes, if it is known.
    """
    before = _free(data_dir)
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else _place(error, data_dir)
        if error.errno in FULL and place != SHARED_MEMORY:
            raise _explain_full(error, place, data_dir, what, needed, before) from None
        if explanation := _explain(error, place, data_dir, what):
            raise PipelineError(explanation) from None
        raise


def _place(error: OSError, data_dir: Path) -> Path:
    """Return the most likely place of an error without a file name."""
    if error.errno in (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
        try:
            multiprocessing.get_context("spawn").Lock()
        except OSError:
            return SHARED_MEMORY
    if error.errno in FULL:
        with contextlib.suppress(FileNotFoundError):  # there is no folder for temporary files
            return min(data_dir, Path(tempfile.gettempdir()), key=_free)
    return data_dir


def _explain_full(
    error: OSError, place: Path, data_dir: Path, what: str, needed: int | None, before: int
) -> PipelineError:
    status = _nearest(place, os.statvfs)
    if place.is_relative_to(data_dir):
        place = data_dir
    if error.errno == errno.EDQUOT:
        return PipelineError(
            f"{place}: the disk quota of user {os.getuid()} is used up: {what} needs more. Raise the quota, or free "
            "space, and run again: finished steps are kept."
        )
    if status.f_files and not status.f_favail and status.f_bavail:
        return PipelineError(
            f"{place}: the disk has {format_bytes(status.f_bavail * status.f_frsize)} free, but its limit of "
            f"{status.f_files:,} files (inodes) is reached: {what} needs more files. Remove files, or use another "
            "disk, and run again: finished steps are kept."
        )
    if place != data_dir and isinstance(error.filename, str):
        return _full(place, f"{what} needs more")
    if place != data_dir:
        return PipelineError(
            f"{place}: the disk for temporary files is full: {what} needs more. Free space, or set TMPDIR to a folder "
            "on another disk, and run again: finished steps are kept."
        )
    known = needed is not None and needed > before
    need = f"about {format_bytes(needed or 0)}, but only {format_bytes(before)} were free"
    return _full(data_dir, f"{what} needs {need if known else f'more than the {format_bytes(before)} that were free'}")


def _explain(error: OSError, place: Path, data_dir: Path, what: str) -> str | None:
    """Return what is wrong and what to do, or None if the error is not one that an operator can fix."""
    number, named = error.errno or 0, isinstance(error.filename, str)
    it = "DATA_DIR" if place.is_relative_to(data_dir) or data_dir.is_relative_to(place) else "It"
    shown = str(place) if len(str(place)) <= SHOWN else f"{str(place)[:SHOWN]}..."
    if place == SHARED_MEMORY:
        remedy = (
            "Worker processes need shared memory there. Free space, and mount it writable (in Docker: no `--ipc none`)."
        )
    elif number == errno.ENOENT:
        return _explain_missing(place, data_dir, what) if named else None
    elif number == errno.ENOTEMPTY:
        remedy = "Another process writes there: end it, and run again: finished steps are kept."
    elif number in (errno.ENOTDIR, errno.EEXIST):
        remedy = f"{it} must be a folder: choose another path."
    elif number == errno.EROFS:
        remedy = f"{it} must be writable: correct its mount, or choose another path."
    elif number == errno.EBUSY:
        remedy = f"{it} is in use by the system: correct its mount, or choose another path."
    elif number in (errno.EACCES, errno.EPERM):
        remedy = f"{it} {_access(place)}"
    elif number in (errno.ENAMETOOLONG, errno.ELOOP):
        remedy = f"{it} must be shorter: most disks allow 255 bytes for a name and 4,095 for a path."
    elif number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = "its disk allows" if limit == resource.RLIM_INFINITY else f"{format_bytes(limit)}, see `ulimit -f`"
        remedy = f"{what} writes a file that is larger than {allowed}. Raise the limit, or use another disk."
    elif number in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"{error.strerror}: {what} may have {limit:,} files open at once. Raise the limit (`ulimit -n`)."
    elif number in (errno.EIO, errno.ESTALE) or (named and number in (errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV)):
        remedy = "The disk or the network file system failed: check it, and run again: finished steps are kept."
    else:
        return None
    return f"{shown}: {error.strerror}. {remedy}"


def _explain_missing(place: Path, data_dir: Path, what: str) -> str | None:
    """Return the error text if DATA_DIR or the folder of a step was removed, or None if only a file is missing."""
    if not place.is_relative_to(data_dir):
        return None
    for folder in (data_dir, data_dir / "/".join(place.relative_to(data_dir).parts[:1])):
        if not folder.exists() and folder != place:
            return (
                f"{folder} was removed while {what} used it. Run again: finished steps that are still there are kept."
            )
    return None


def _access(place: Path) -> str:
    """Return what to do if this user may not read or write `place`."""
    user, owner = os.getuid(), _nearest(place, os.stat).st_uid
    change = f"`chmod -R u+rwX` it, or `chown -R {user}` it" if owner == user else f"`chown -R {user}` it"
    as_owner = "" if owner in (0, user) else f", run as its owner ({as_user(owner)})"
    return (
        f"must be readable and writable by user {user}, which the pipeline runs as: {change}{as_owner}, or choose "
        "another path."
    )


def _free(folder: Path) -> int:
    """Return how many bytes are free on the disk where `folder` is or will be."""
    return _nearest(folder, shutil.disk_usage).free


def _nearest(path: Path, look: Callable[[Path], Found]) -> Found:
    """Call `look` for `path`, or for the nearest folder above it that exists and is accessible."""
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return look(place)
    raise FileNotFoundError(path)


def prepare_temporary_folder(folder: Path) -> None:
    """Create `folder` if it is the folder for temporary files. Remove everything in it that is older than a day.

    Killed processes have left these files there.
    """
    if folder.absolute() == Path(tempfile.gettempdir()):
        folder.mkdir(exist_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if time.time() - path.lstat().st_mtime > SECONDS_KEPT:
            remove(path)


def remove(folder: Path) -> None:
    """Remove the folder or file at this path, if it exists.

    A worker that has outlived its run may still write to the folder. So a failed removal is tried again, for at most
    REMOVAL_TIMEOUT. Raises OSError, for example if the removal still fails after this time.
    """
    deadline = time.monotonic() + REMOVAL_TIMEOUT
    while os.path.lexists(folder):  # on a read-only disk, `unlink` refuses even if there is nothing to remove
        try:
            shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
        except OSError as error:
            if error.errno not in BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
