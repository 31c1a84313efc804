"""A draft -> a folder that is whole: commit, recovery after a kill, the lock, and what the disk refuses.

A step writes into a draft folder beside its target and renames it in place as its last act, so that a folder that
exists is complete: docs/decisions/0001-a-step-is-a-folder.md.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import Busy
from dgmd_pipeline.workflow import disk

RESUME = ".resume"  # in a draft: what it takes to go on with it; never in a finished folder
FINGERPRINT = "purpose"  # in RESUME: what the draft is to become


@contextlib.contextmanager
def draft(target: Path, purpose: str | None = None) -> Iterator[Path]:
    """Give a folder beside `target` to write in; it takes its place when the block ends, or is removed.

    With a `purpose` the draft has a folder RESUME for what it takes to go on with it. Once something is in there, the
    draft stays when the block fails or the process is killed, and is given again to who comes with the same purpose.
    """
    folder, old = _beside(target)
    try:
        if purpose is None or _fingerprint(folder) != purpose:
            disk.remove(folder)
            folder.mkdir()
            if purpose:
                (folder / RESUME).mkdir()
                (folder / RESUME / FINGERPRINT).write_text(purpose, "utf-8")
        yield folder
        # Two renames, because one onto a folder that is not empty fails; `recover` mends a crash between them.
        if target.exists():
            target.rename(old)
        folder.rename(target)
        disk.remove(target / RESUME)
        if old.exists():
            _discard(old, folder)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        if not _can_resume(folder):
            disk.remove(folder)


def _discard(old: Path, folder: Path) -> None:
    """Remove a folder that was replaced, as a draft: one that is only partly removed must never be put back."""
    disk.remove(folder)
    old.rename(folder)
    disk.remove(folder)


def _fingerprint(folder: Path) -> str | None:
    try:
        return (folder / RESUME / FINGERPRINT).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _can_resume(folder: Path) -> bool:
    notes = folder / RESUME
    return notes.is_dir() and any(path.name != FINGERPRINT for path in notes.iterdir())


def recover(data_dir: Path, names: Iterable[str]) -> None:
    """Put back or sweep away what a killed run left of the folders `names`; a draft that can be gone on with stays."""
    for target, folder, old in ((data_dir / name, *_beside(data_dir / name)) for name in names):
        if old.exists():
            if target.exists():
                _discard(old, folder)
            else:
                old.rename(target)
        if not _can_resume(folder):
            disk.remove(folder)
        disk.remove(target / RESUME)


def current_path(target: Path) -> Path:
    """Return where a folder is: in its place, or where a killed run left it and `recover` will find it."""
    old = _beside(target)[1]
    return old if old.exists() and not target.exists() else target


def _beside(target: Path) -> tuple[Path, Path]:
    """Return the paths of a folder's draft and of what it replaces."""
    return target.with_name(f".draft-{target.name}"), target.with_name(f".old-{target.name}")


def sweep(data_dir: Path, done: Iterable[str]) -> None:
    """Remove the drafts of steps that are `done`: nobody will go on with them."""
    for name in done:
        disk.remove(_beside(data_dir / name)[0])


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
            raise Busy(f"{data_dir} is in use by another run: {_read_holder(file)}. Wait until it has ended.") from None
        _write_holder(file, f"process {os.getpid()} on {socket.gethostname()}, started {formatting.utc_now()}")
        yield
        _write_holder(file, "")


def _write_holder(file: FileIO, text: str) -> None:
    file.truncate(0)
    try:
        file.write(text.encode())
    except OSError as error:
        if error.errno not in disk.FULL:  # the lock holds without its holder's name
            raise


def _read_holder(file: FileIO) -> str:
    """Return what the holder wrote; one that was started at the same time may need a moment for it."""
    for _ in range(20):
        file.seek(0)
        if text := file.read():
            return text.decode()
        time.sleep(0.01)
    return "a process that has only just started or is about to end"
