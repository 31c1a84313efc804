"""Files in step folders: cached checksums, hard links, atomic creation of folders, and flushing to the disk."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
EXISTS = (errno.EEXIST, errno.ENOTEMPTY)
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# Files that a warning has already reported as damaged: device and inode of the folder, name of the file.
_damaged: set[tuple[int, int, str]] = set()
# Device, inode, size and modification time of a file -> SHA-256 of the file.
_checksums: dict[tuple[int, int, int, int], str] = {}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits. Raises OSError.

    The result is cached until the file changes. Hard links to the same file share the cached result.
    """
    status = path.stat()
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _checksums:
        with path.open("rb") as file:
            _checksums[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _checksums[key]


def is_intact(path: Path, size: int, checksum: str) -> bool:
    """Return whether a file can be read and has this size in bytes and this SHA-256."""
    try:
        return path.stat().st_size == size and sha256(path) == checksum
    except OSError:
        return False


def warn_of_damage(path: Path, consequence: str) -> None:
    """Log that a file is damaged. A process logs this only once for a file, even if the file's folder is renamed."""
    folder = path.parent.stat()
    key = folder.st_dev, folder.st_ino, path.name
    if key not in _damaged:
        _damaged.add(key)
        log.warning("%s is damaged: %s", path, consequence)


def link(source: Path, target: Path, temporary: Path) -> None:
    """Create `target` as a hard link to `source`, or as a copy if a hard link is impossible.

    A copy is first written to `temporary`, on the same disk, and then renamed. So `target` is never incomplete.
    Raises OSError.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, temporary)  # the disk has no hard links, or the file belongs to another user
        temporary.replace(target)


@contextlib.contextmanager
def commit(target: Path) -> Iterator[Path]:
    """Provide a new folder, which is renamed to `target` when the block succeeds, and removed when the block fails.

    Several attempts may run at the same time, even on several machines. The first that succeeds becomes `target`. The
    folders of the others are removed. Raises OSError.
    """
    attempt = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    attempt.mkdir()
    try:
        yield attempt
        try:
            attempt.rename(target)
        except OSError as error:
            if error.errno not in EXISTS:
                raise
    finally:
        # Files that cannot be removed now are removed later, with the draft of the step.
        shutil.rmtree(attempt, ignore_errors=True)


def attempts(target: Path) -> list[Path]:
    """Return the folders of unfinished attempts to create `target`, the last modified one at the end."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}-*"), key=lambda path: path.stat().st_mtime_ns)


def sync(folder: Path) -> None:
    """Write the files of a folder to the disk, so that a power cut does not leave them empty.

    Calls `syncfs`, which writes all unwritten data of the folder's file system. On a system without `syncfs`, calls
    `sync`. docs/decisions/0026-folders-survive-a-power-cut.md compares `syncfs` with one `fsync` for each file.
    Raises OSError.
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    with _opened(folder) as descriptor:
        if syncfs(descriptor) and (code := ctypes.get_errno()) not in UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(folder))


def sync_names(folder: Path) -> None:
    """Write the list of the names in a folder to the disk.

    Then a power cut does not undo the creation, renaming or removal of files and folders in it.
    Raises OSError.
    """
    with _opened(folder) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:  # some network file systems cannot synchronise a folder
                raise


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
