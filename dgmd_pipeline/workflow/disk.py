"""Free space, and disk errors explained."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.workflow import folders

FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 4096  # bytes: what a file takes on a disk is a multiple of this


def folder_bytes(folder: Path) -> int:
    """Return how many bytes the files in a folder hold, at any depth, RESUME aside."""
    total = 0
    for path, below, names in os.walk(folder):
        below[:] = [name for name in below if name != folders.RESUME]
        total += sum(os.lstat(f"{path}/{name}").st_size for name in names)  # a Path would take longer than the call
    return total


def allocated_bytes(size: int) -> int:
    """Return how many bytes a file of `size` bytes takes on a usual disk."""
    return -(-size // BLOCK) * BLOCK


def check_space(place: Path, what: str, needed: int) -> None:
    """Raise PipelineError where `what` needs more bytes than the disk has left on which `place` is."""
    free = shutil.disk_usage(place).free
    if needed > free:
        data_dir = next((path.parent for path in place.parents if path.name.startswith(".draft-")), place.parent)
        raise _full(
            data_dir, f"{what} needs {formatting.format_bytes(needed)}, {formatting.format_bytes(free)} are free"
        )


def _full(data_dir: Path, need: str) -> PipelineError:
    return PipelineError(f"{data_dir}: the disk is full: {need}. Make room and run again: finished steps are kept.")


@contextlib.contextmanager
def disk_errors_explained(data_dir: Path, what: str = "the run", needed: int | None = None) -> Iterator[None]:
    """Turn what the disk under `data_dir` refuses into a PipelineError; any other OSError passes.

    `needed` is about how many bytes `what` takes, where that is known.
    """
    before = _free(data_dir)
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            known = needed is not None and needed > before
            need = f"about {formatting.format_bytes(needed or 0)}, {formatting.format_bytes(before)} were free"
            raise _full(
                data_dir,
                f"{what} needs {need if known else f'more than the {formatting.format_bytes(before)} that were free'}",
            ) from None
        place = Path(error.filename) if isinstance(error.filename, str) else data_dir
        it = "DATA_DIR" if place.is_relative_to(data_dir) or data_dir.is_relative_to(place) else "It"
        remedy = {
            errno.ENOTDIR: f"{it} has to be a folder: choose another path.",
            errno.EEXIST: f"{it} has to be a folder: choose another path.",
            errno.EROFS: f"{it} has to be writable: mend its mount, or choose another path.",
            errno.EBUSY: f"{it} is in use by the system: mend its mount, or choose another path.",
        } | dict.fromkeys((errno.EACCES, errno.EPERM), f"{it} {_access(place)}")
        if error.errno in remedy:
            raise PipelineError(f"{place}: {error.strerror}. {remedy[error.errno]}") from None
        raise


def _access(place: Path) -> str:
    """Say what mends that this user may not read or write `place`."""
    user, owner = os.getuid(), _nearest(place, os.stat).st_uid
    mend = f"`chmod -R u+rwX` it, or `chown -R {user}` it" if owner == user else f"`chown -R {user}` it"
    as_owner = "" if owner in (0, user) else f", run as its owner (docker run --user {owner})"
    return (
        f"has to be readable and writable for user {user}, whom the pipeline runs as: {mend}{as_owner}, or choose "
        "another path."
    )


def _free(folder: Path) -> int:
    """Return the bytes that are free where `folder` is, or will be."""
    return _nearest(folder, shutil.disk_usage).free


def _nearest(path: Path, look: Callable[[Path], Any]) -> Any:
    """Return what `look` finds at `path`, or at the nearest folder above it that is there and may be looked at."""
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return look(place)
    raise FileNotFoundError(path)


def remove(folder: Path) -> None:
    """Remove a folder where there is one, or the file that is in its place."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()
