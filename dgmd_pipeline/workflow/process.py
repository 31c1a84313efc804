"""Checks of this process before every command: the encoding of file names and the limit of open files."""

import resource
import sys

from dgmd_pipeline.errors import SettingsError

# A run on 2 cores has at most 36 open files. Each additional S3 connection or worker process opens more files.
WANTED_FILES, NEEDED_FILES = 1024, 256


def check() -> None:
    """Check the encoding of file names, and increase the limit of open files if the limit is low.

    Raises SettingsError if the limit cannot be increased enough. Also raises SettingsError if the encoding is not
    UTF-8, because labels and keys with non-ASCII characters could not be written.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise SettingsError(
            f"The encoding of file names is {encoding}: expected utf-8. Set PYTHONUTF8=1 or LC_ALL=C.UTF-8."
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < WANTED_FILES:
        soft = WANTED_FILES if hard < 0 else min(WANTED_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if 0 <= soft < NEEDED_FILES:
        raise SettingsError(
            f"This process may have {soft} files open: expected at least {NEEDED_FILES}, see `ulimit -n`."
        )
