"""A draft -> a complete folder: commit, recovery after a kill, and the lock.

A step writes into a draft folder beside its target, and renames the draft at the end. So a folder that exists is
complete: docs/decisions/0001-a-step-is-a-folder.md.
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

RESUME = ".resume"  # folder in a draft, with what is needed to resume it; never in a finished folder
FINGERPRINT = "purpose"  # file in RESUME: the fingerprint of what the draft will become


@contextlib.contextmanager
def draft(target: Path, fingerprint: str | None = None) -> Iterator[Path]:
    """Provide a folder beside `target`. It replaces `target` when the block ends, and is removed if the block fails.

    With a `fingerprint` the draft can be resumed: it has a folder RESUME. Once the caller has written a file there, the
    draft stays if the block fails or the process is killed, and the next call with the same fingerprint provides it.
    """
    folder, old = _beside(target)
    try:
        if fingerprint is None or _fingerprint(folder) != fingerprint:
            disk.remove(folder)
            folder.mkdir()
            if fingerprint:
                (folder / RESUME).mkdir()
                (folder / RESUME / FINGERPRINT).write_text(fingerprint, "utf-8")
        yield folder
        # Two renames: a single one cannot replace a folder that is not empty. `recover` handles a kill between the two.
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
    """Give a replaced folder the draft's name, then remove it: a partly removed folder must never be put back."""
    disk.remove(folder)
    old.rename(folder)
    disk.remove(folder)


def _fingerprint(folder: Path) -> str | None:
    try:
        return (folder / RESUME / FINGERPRINT).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _can_resume(folder: Path) -> bool:
    resume_dir = folder / RESUME
    return resume_dir.is_dir() and any(path.name != FINGERPRINT for path in resume_dir.iterdir())


def recover(data_dir: Path, names: Iterable[str]) -> None:
    """Repair what a killed run left of the folders `names`: put a folder back, or remove a draft.

    A draft that can be resumed stays.
    """
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
    """Return where a folder is: at its path, or where a killed run left it until `recover` puts it back."""
    old = _beside(target)[1]
    return old if old.exists() and not target.exists() else target


def _beside(target: Path) -> tuple[Path, Path]:
    """Return the paths of a folder's draft and of the folder that the draft replaces."""
    return target.with_name(f".draft-{target.name}"), target.with_name(f".old-{target.name}")


def sweep(data_dir: Path, done: Iterable[str]) -> None:
    """Remove the drafts of steps that are `done`: nothing will resume them."""
    for name in done:
        disk.remove(_beside(data_dir / name)[0])


def folder_bytes(folder: Path) -> int:
    """Return how many bytes the files in a folder have, at any depth, without those in RESUME."""
    total = 0
    for path, below, names in os.walk(folder):
        below[:] = [name for name in below if name != RESUME]
        total += sum(os.lstat(f"{path}/{name}").st_size for name in names)  # a Path would take longer than the call
    return total


@contextlib.contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    """Lock `data_dir` for one run. The kernel releases the lock when the process ends.

    Raises Busy, naming the process that has the lock.
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
        if error.errno not in disk.FULL:  # the lock works without the name of its holder
            raise


def _read_holder(file: FileIO) -> str:
    """Return what the holder wrote. A holder that started at the same moment may not have written it yet."""
    for _ in range(20):
        file.seek(0)
        if text := file.read():
            return text.decode()
        time.sleep(0.01)
    return "a process that has just started or is about to end"
