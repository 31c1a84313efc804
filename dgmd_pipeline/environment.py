"""The environment of a user without a home or a temporary folder, or of a Windows file -> one that libraries accept."""

import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def remove_carriage_returns() -> None:
    """Remove the carriage return that a file with Windows line endings leaves at the end of a value."""
    ended = {name: value.rstrip("\r") for name, value in os.environ.items() if value.endswith("\r")}
    if ended:
        log.warning("A carriage return at the end of these variables is ignored: %s", ", ".join(sorted(ended)))
    os.environ.update(ended)


def wants_colours() -> bool:
    """Return whether a terminal may show colours: NO_COLOR has no value (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def provide_home(data_dir: Path) -> None:
    """Make DATA_DIR (default: `data_dir`) the home of a user who has none, because libraries fail without one."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - Path.home raises
        os.environ["HOME"] = str(Path(os.environ.get("DATA_DIR") or data_dir).absolute())


def provide_temporary_folder(folder: Path) -> None:
    """Make `folder`, which need not exist yet, the one for temporary files if none of the system's is writable."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder.absolute())
        os.environ.setdefault("MPLCONFIGDIR", f"{tempfile.tempdir}/matplotlib")  # Matplotlib warns about a home like it
