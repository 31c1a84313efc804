"""The exceptions for operators, with their exit codes.

The message of a `PipelineError` is complete: what was expected, what was found, where, and what to do. The message
is printed without a traceback. Any other exception is a bug and is printed with its traceback.
"""

import signal
from pathlib import Path


class PipelineError(Exception):
    """A failure that the operator can fix. The exit code is 30, except in some subclasses."""

    exit_code = 30


class SettingsError(PipelineError):
    """A setting is invalid. Exit code 2."""

    exit_code = 2


class Busy(PipelineError):
    """Another run is using `DATA_DIR`. Exit code 10."""

    exit_code = 10


class NoUsableInput(PipelineError):
    """An input is missing or not usable: the bucket, images, labels, a file or a version. Exit code 20."""

    exit_code = 20


class ChangedFile(PipelineError):
    """A file is missing or differs from what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        """Take the file of a step's folder, and the reason as a clause."""
        self._path, self._reason = path, reason
        super().__init__(
            f"{path}: {reason}. It was changed after it was written: delete the folder {path.parent} and run again."
        )

    def __reduce__(self) -> tuple[type["ChangedFile"], tuple[Path, str]]:
        """Pickle what `__init__` takes. By default, it would get only the message."""
        return type(self), (self._path, self._reason)

    def of_version(self, version: int | None) -> PipelineError:
        """Return the same error about a file that was downloaded from a registered version to a temporary folder."""
        return PipelineError(
            f"Version {version} is damaged in the registry ({self._path.name}: {self._reason}). Train a new version, "
            "or use another one."
        )


class Refused(PipelineError):
    """A model does not meet the conditions for promotion, or there is no version to roll back to. Exit code 40."""

    exit_code = 40


class Declined(Refused):
    """The operator answered no. The message is not shown as an error."""


class TooLittleMemory(PipelineError):
    """An operation needs more memory than the run may use for it.

    The message begins with "needs", because the code that reports the error puts a subject before the message.
    """


class WorkerDied(PipelineError):
    """A worker process ended while it worked on an item. The message is a clause that says how the process ended."""

    def __init__(self, exit_code: int) -> None:
        """Take the exit code of the process, which is -N if signal N ended it."""
        self._exit_code = exit_code
        self.by_timer = exit_code == -signal.SIGPROF
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
        text = f"was ended by {name}" if exit_code < 0 else f"ended with exit code {exit_code}"
        cause = ", most likely because memory ran out" if exit_code == -signal.SIGKILL else ""
        super().__init__(f"the process {text}{cause}")

    def __reduce__(self) -> tuple[type["WorkerDied"], tuple[int]]:
        """Pickle the exit code, because `__init__` takes it. By default, `__init__` would get the message."""
        return type(self), (self._exit_code,)


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM was received.

    The base class is KeyboardInterrupt, because Luigi reports any other exception as the failure of a task.
    """
