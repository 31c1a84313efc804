"""A draft -> a folder that is whole: commit, recovery after a kill, the lock, and what the disk refuses.

A step writes into a draft folder beside its target and renames it in place as its last act, so that a folder that
exists is complete. See docs/design.md, section 2.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from dgmd_pipeline.errors import Busy, PipelineError

RESUME = ".resume"  # in a draft: what it takes to go on with it; never in a finished folder
PURPOSE = "purpose"  # in RESUME: what the draft is to become
FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 4096  # bytes: what a file takes on a disk is a multiple of this


@contextlib.contextmanager
def draft(target: Path, purpose: str | None = None) -> Iterator[Path]:
    """Give a folder beside `target` to write in; it takes its place when the block ends, or is removed.

    With a `purpose` the draft has a folder RESUME for what it takes to go on with it. Once something is in there, the
    draft stays when the block fails or the process is killed, and is given again to who comes with the same purpose.
    """
    folder, old = _beside(target)
    try:
        if purpose is None or _purpose(folder) != purpose:
            remove(folder)
            folder.mkdir()
            if purpose:
                (folder / RESUME).mkdir()
                (folder / RESUME / PURPOSE).write_text(purpose, "utf-8")
        yield folder
        # Two renames, because one onto a folder that is not empty fails; `recover` mends a crash between them.
        if target.exists():
            target.rename(old)
        folder.rename(target)
        remove(target / RESUME)
        if old.exists():
            _discard(old, folder)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        if not _can_go_on(folder):
            remove(folder)


def _discard(old: Path, folder: Path) -> None:
    """Remove a folder that was replaced, as a draft: one that is only partly removed must never be put back."""
    remove(folder)
    old.rename(folder)
    remove(folder)


def _purpose(folder: Path) -> str | None:
    try:
        return (folder / RESUME / PURPOSE).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _can_go_on(folder: Path) -> bool:
    notes = folder / RESUME
    return notes.is_dir() and any(path.name != PURPOSE for path in notes.iterdir())


def remove(folder: Path) -> None:
    """Remove a folder where there is one, or the file that is in its place."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()


def recover(data_dir: Path, names: Iterable[str]) -> None:
    """Put back or sweep away what a killed run left of the folders `names`; a draft that can be gone on with stays."""
    for target, folder, old in ((data_dir / name, *_beside(data_dir / name)) for name in names):
        if old.exists():
            if target.exists():
                _discard(old, folder)
            else:
                old.rename(target)
        if not _can_go_on(folder):
            remove(folder)
        remove(target / RESUME)


def standing(target: Path) -> Path:
    """Return where a folder is: in its place, or where a killed run left it and `recover` will find it."""
    old = _beside(target)[1]
    return old if old.exists() and not target.exists() else target


def _beside(target: Path) -> tuple[Path, Path]:
    """Return the paths of a folder's draft and of what it replaces."""
    return target.with_name(f".draft-{target.name}"), target.with_name(f".old-{target.name}")


def sweep(data_dir: Path, done: Iterable[str]) -> None:
    """Remove the drafts of steps that are `done`: nobody will go on with them."""
    for name in done:
        remove(_beside(data_dir / name)[0])


@contextlib.contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    """Hold `data_dir` for one run. The lock is the kernel's and dies with its process.

    Raises Busy, naming the process that holds it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / ".lock").open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{data_dir} is in use by another run: {_holder(file)}. Wait until it has ended.") from None
        _sign(file, f"process {os.getpid()} on {socket.gethostname()}, started {now()}")
        yield
        _sign(file, "")


def _sign(file: FileIO, text: str) -> None:
    file.truncate(0)
    try:
        file.write(text.encode())
    except OSError as error:
        if error.errno not in FULL:  # the lock holds without its holder's name
            raise


def _holder(file: FileIO) -> str:
    """Return what the holder wrote; one that was started at the same time may need a moment for it."""
    for _ in range(20):
        file.seek(0)
        if text := file.read():
            return text.decode()
        time.sleep(0.01)
    return "a process that has only just started or is about to end"


def now() -> str:
    """Return the time as ISO 8601 in UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def volume(folder: Path) -> int:
    """Return how many bytes the files in a folder hold, at any depth, RESUME aside."""
    total = 0
    for path, below, names in os.walk(folder):
        below[:] = [name for name in below if name != RESUME]
        total += sum(os.lstat(f"{path}/{name}").st_size for name in names)  # a Path would take longer than the call
    return total


def on_disk(size: int) -> int:
    """Return how many bytes a file of `size` bytes takes on a usual disk."""
    return -(-size // BLOCK) * BLOCK


def human(size: int) -> str:
    """Return a number of bytes as people read it: "382.7 MB"."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:  # what would be shown as 1000.0
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def check_space(place: Path, what: str, needed: int) -> None:
    """Raise PipelineError where `what` needs more bytes than the disk has left on which `place` is."""
    free = shutil.disk_usage(place).free
    if needed > free:
        data_dir = next((path.parent for path in place.parents if path.name.startswith(".draft-")), place.parent)
        raise _full(data_dir, f"{what} needs {human(needed)}, {human(free)} are free")


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
            need = f"about {human(needed or 0)}, {human(before)} were free"
            raise _full(
                data_dir, f"{what} needs {need if known else f'more than the {human(before)} that were free'}"
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
