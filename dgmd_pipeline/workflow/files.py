"""Files in step folders: checksums that are computed once in a run, and hard links."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

_checksums: dict[tuple[int, int, int, int], str] = {}  # by device, inode, size and time of modification


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits. Raises OSError.

    A process reads a file once, also if it is hard-linked into another folder, until its content changes.
    """
    status = path.stat()
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _checksums:
        with path.open("rb") as file:
            _checksums[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _checksums[key]


def link(source: Path, target: Path) -> None:
    """Create `target` as a hard link to a file, or as a copy where that is impossible. Raises OSError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(source, target)  # the disk has no hard links, or the file belongs to another user
