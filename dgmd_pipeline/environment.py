"""Prepares the environment for libraries: defaults, home folder, temporary folder, values without carriage returns."""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)
LIBRARY_DEFAULTS = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorFlow shows only errors when it starts
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a batch job sends no usage statistics
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # 5 retries take about a minute; 7, the default, take four minutes
    "GIT_PYTHON_REFRESH": "quiet",
    # Pillow keeps two blocks of up to 16 MB for the next image. Without this setting, Pillow would allocate new blocks
    # for every image. The allocation would take a third of the time for writing a record.
    "PILLOW_BLOCKS_MAX": "2",
    # mimalloc, pyarrow's own allocator, keeps freed memory. The rows of a million images take 407 MiB with mimalloc,
    # and 336 MiB with the system's allocator.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
# A frozen backbone processes several batches in parallel, each with one thread. This is up to 1.5 times as fast as
# one batch with all threads (docs/measurements/speed.md).
FROZEN_DEFAULTS = {"TF_NUM_INTRAOP_THREADS": "1"}
# Variables that a Dask worker unsets. Dask's nanny, the parent process of a worker, sets MALLOC_TRIM_THRESHOLD_. With
# this variable, freed memory returns to the system sooner. But each new large buffer causes page faults, and the
# conversion of an image takes twice the CPU time. Memory need not return sooner, because the processes of a worker end
# with the run.
DASK_VARIABLES = ("MALLOC_TRIM_THRESHOLD_",)


def remove_carriage_returns() -> None:
    """Remove the carriage return that a file with Windows line endings leaves at the end of a value."""
    ended = {name: value.rstrip("\r") for name, value in os.environ.items() if value.endswith("\r")}
    if ended:
        log.warning("A carriage return at the end of these variables is ignored: %s", ", ".join(sorted(ended)))
    os.environ.update(ended)


def provide(defaults: Mapping[str, str], unset: Sequence[str] = ()) -> None:
    """Set the variables in `defaults` that are not set yet, and remove the variables in `unset`."""
    for name in unset:
        os.environ.pop(name, None)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def wants_colours() -> bool:
    """Return whether a terminal may show colours: NO_COLOR is unset or empty (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def provide_home(data_dir: Path) -> None:
    """Make DATA_DIR (default: `data_dir`) the home of a user who has none, because libraries fail without one."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - Path.home raises
        os.environ["HOME"] = str(Path(os.environ.get("DATA_DIR") or data_dir).absolute())


def provide_temporary_folder(folder: Path) -> None:
    """Use `folder` for temporary files if the system has no writable folder for them. `folder` need not exist yet."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder.absolute())
        # Without this variable, Matplotlib would warn if the home folder is not writable either.
        os.environ.setdefault("MPLCONFIGDIR", f"{tempfile.tempdir}/matplotlib")
