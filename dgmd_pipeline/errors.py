"""What a person is told when a run cannot do what was asked, and the exit code that goes with it.

The message of a `PipelineError` is complete: what was expected, what came, where, and what to do. It is printed
without a traceback. Any other exception is a fault of ours and is shown with one.
"""


class PipelineError(Exception):
    """A reason to stop that its reader can do something about. Exit code 30: a step failed."""

    exit_code = 30


class SettingsError(PipelineError):
    """The environment asks for something impossible. Exit code 2."""

    exit_code = 2


class Busy(PipelineError):
    """Another run holds `DATA_DIR`. Exit code 10."""

    exit_code = 10


class NoUsableInput(PipelineError):
    """There is nothing to train on: no bucket, no access, no pictures, fewer than two labels. Exit code 20."""

    exit_code = 20


class Refused(PipelineError):
    """A model does not meet the conditions for production, or there is nothing to go back to. Exit code 40."""

    exit_code = 40


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came. A KeyboardInterrupt, because Luigi takes anything else for a failed task."""
