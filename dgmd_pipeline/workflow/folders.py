"""Drafts, which become complete folders, and recovery after a kill.

A step writes into a draft folder in the same parent folder as its target. Its last action renames the draft to the
target, so a folder that exists is complete. See docs/decisions/0001-a-step-is-a-folder.md.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dgmd_pipeline.workflow import disk, files

RESUME = ".resume"  # folder in a draft, for the files that are needed to resume the draft; never in a finished folder
FINGERPRINT = "purpose"  # file in RESUME with the fingerprint that the draft was started for


@contextlib.contextmanager
def draft(target: Path, fingerprint: str | None = None, keep_replaced: bool = False) -> Iterator[Path]:
    """Provide a draft folder. It replaces `target` when the block succeeds, and is removed when the block fails.

    The content reaches the disk before the folder gets its name, so `target` is complete even after a power cut.

    A `fingerprint` is a hash that the caller computes. With a fingerprint, the draft has a folder RESUME. If the block
    fails or the process is killed, a draft with files in RESUME is kept. The next call with the same fingerprint
    provides that draft.

    With `keep_replaced`, the replaced folder is kept under another name, where `versions` finds it, until
    `discard_replaced` removes it.
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
        files.sync(folder)
        # Two renames: a single one cannot replace a folder that is not empty. `recover` handles a kill between the two.
        if target.exists():
            target.rename(old)
        folder.rename(target)
        files.sync_names(target.parent)  # before the old folder is removed
        disk.remove(target / RESUME)
        if old.exists() and not keep_replaced:
            _discard(old, folder)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        if not _can_resume(folder):
            disk.remove(folder)


def _discard(old: Path, folder: Path) -> None:
    """Remove a replaced folder. It is first renamed to a draft, so that `recover` never restores a part of it."""
    disk.remove(folder)
    old.rename(folder)
    disk.remove(folder)


def discard_replaced(target: Path) -> None:
    """Remove the folder that `target` has replaced, if it was kept."""
    folder, old = _beside(target)
    if old.exists() and target.exists():
        _discard(old, folder)


def versions(target: Path) -> list[Path]:
    """Return `target` and the folder that it has replaced, if they exist."""
    return [path for path in (target, _beside(target)[1]) if path.exists()]


def _fingerprint(folder: Path) -> str | None:
    try:
        return (folder / RESUME / FINGERPRINT).read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _can_resume(folder: Path) -> bool:
    return bool(_kept(folder))


def _kept(folder: Path) -> list[Path]:
    """Return the finished pieces of a draft: files and folders that the step has written to RESUME.

    The name of an unfinished piece begins with a dot.
    """
    found = (folder / RESUME).iterdir() if (folder / RESUME).is_dir() else ()
    return sorted(path for path in found if path.name != FINGERPRINT and not path.name.startswith("."))


def keep_pieces(folder: Path) -> int:
    """Remove everything from a draft, except the finished pieces in RESUME. Return the number of these pieces."""
    kept = _kept(folder)
    for path in [*folder.iterdir(), *(folder / RESUME).iterdir()]:
        if path.name not in (RESUME, FINGERPRINT) and path not in kept:
            disk.remove(path)
    return len(kept)


def pieces(target: Path) -> list[Path]:
    """Return the finished pieces in the draft of a folder."""
    return _kept(_beside(target)[0])


def resumable(target: Path, fingerprint: str | None) -> Path | None:
    """Return the path of RESUME in the draft of `target`, or None if the draft cannot be resumed.

    The draft can be resumed if RESUME contains finished pieces, and if the draft was started for this fingerprint.
    """
    folder = _beside(target)[0]
    return folder / RESUME if fingerprint and _fingerprint(folder) == fingerprint and _can_resume(folder) else None


def recover(data_dir: Path, names: Iterable[str]) -> None:
    """Clean up the folders `names` after a killed run.

    Remove a replaced folder if the folder that replaced it exists. Otherwise, restore the replaced folder. Remove the
    drafts that cannot be resumed.
    """
    for target, folder, old in ((data_dir / name, *_beside(data_dir / name)) for name in names):
        discard_replaced(target)
        if old.exists():
            old.rename(target)
        if not _can_resume(folder):
            disk.remove(folder)
        disk.remove(target / RESUME)


def current_path(target: Path) -> Path:
    """Return `target`. If a killed run has left only the replaced folder, return the path of the replaced folder."""
    old = _beside(target)[1]
    return old if old.exists() and not target.exists() else target


def _beside(target: Path) -> tuple[Path, Path]:
    """Return the path of a folder's draft, and the path that a replaced folder is renamed to."""
    return target.with_name(f".draft-{target.name}"), target.with_name(f".old-{target.name}")


def sweep(data_dir: Path, done: Iterable[str]) -> None:
    """Remove the drafts of the steps in `done`, because no run will resume these drafts."""
    for name in done:
        disk.remove(_beside(data_dir / name)[0])


def folder_bytes(folder: Path) -> int:
    """Return the total size in bytes of all files in a folder and its subfolders, without RESUME."""
    total = 0
    for path, below, names in os.walk(folder):
        below[:] = [name for name in below if name != RESUME]
        # No Path objects are used, because creating one takes longer than lstat.
        total += sum(os.lstat(f"{path}/{name}").st_size for name in names)
    return total
