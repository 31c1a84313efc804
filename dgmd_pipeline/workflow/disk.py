"""Checks of free disk space, and explanations of disk errors."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import as_user, format_bytes

Found = TypeVar("Found")
FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 4096  # bytes; on most disks, a file occupies a multiple of this


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
    """Turn an OSError that an operator can fix into a PipelineError that says how; re-raise any other.

    `data_dir` is the folder in use. `needed` is the approximate number of bytes that `what` writes, if it is known.
    """
    before = _free(data_dir)
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            known = needed is not None and needed > before
            need = f"about {format_bytes(needed or 0)}, but only {format_bytes(before)} were free"
            raise _full(
                data_dir,
                f"{what} needs {need if known else f'more than the {format_bytes(before)} that were free'}",
            ) from None
        place = Path(error.filename) if isinstance(error.filename, str) else data_dir
        it = "DATA_DIR" if place.is_relative_to(data_dir) or data_dir.is_relative_to(place) else "It"
        remedy = {
            errno.ENOTDIR: f"{it} must be a folder: choose another path.",
            errno.EEXIST: f"{it} must be a folder: choose another path.",
            errno.EROFS: f"{it} must be writable: correct its mount, or choose another path.",
            errno.EBUSY: f"{it} is in use by the system: correct its mount, or choose another path.",
        } | dict.fromkeys((errno.EACCES, errno.EPERM), f"{it} {_access(place)}")
        if error.errno in remedy:
            raise PipelineError(f"{place}: {error.strerror}. {remedy[error.errno]}") from None
        raise


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
    """Return what `look` returns for `path`, or for the nearest folder above it that exists and is accessible."""
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return look(place)
    raise FileNotFoundError(path)


def remove(folder: Path) -> None:
    """Remove the folder or file at this path, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
