"""Reads and writes `status.json`, the file in DATA_DIR with the outcome of the last run. The health check reads it."""

import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from dgmd_pipeline.workflow import lock

KILLED = "for example because memory ran out: give the pipeline more memory or fewer cores, and run it again"
NAME = "status.json"
SUCCEEDED, WORSE, UNCHANGED, STOPPED, FAILED = "succeeded", "worse", "unchanged", "stopped", "failed"
PROMOTED, ROLLED_BACK = "promoted", "rolled back"  # only in messages: they are not outcomes of runs
TOLD = {  # value of NOTIFY_ON -> the outcomes that NOTIFY_URL receives
    "always": (SUCCEEDED, WORSE, UNCHANGED, STOPPED, FAILED, PROMOTED, ROLLED_BACK),
    "change": (SUCCEEDED, WORSE, STOPPED, FAILED, PROMOTED, ROLLED_BACK),
    "problem": (WORSE, FAILED),
}


@dataclass(frozen=True)
class Status:
    """The outcome of a run.

    The fields from `version` to `report` are about the registered version. They are None if the run neither registered
    a version nor found that the registered version is up to date.
    """

    outcome: str  # SUCCEEDED, WORSE (than production), UNCHANGED (nothing to do), STOPPED or FAILED
    exit_code: int
    message: str  # sentences
    ended: str  # ISO 8601, UTC
    seconds: float
    model: str
    version: int | None = None
    accuracy: float | None = None  # on the validation images, 0 to 1
    difference: float | None = None  # accuracy minus production's accuracy, on the same images
    low: float | None = None  # lower end of the difference's 95 % interval
    high: float | None = None  # upper end of this interval
    verdict: str | None = None  # "better", "no difference", "worse", "first" or "not compared"
    report: str | None = None  # path of report.html
    step: str | None = None  # the step that failed
    until: str | None = None  # the value of --until
    last_success: str | None = None  # end of the last run with exit code 0: ISO 8601, UTC
    dashboard: str | None = None  # address of the dashboard of the Dask cluster, if the run used a cluster

    @property
    def is_good(self) -> bool:
        """Whether the pipeline works. A worse version does not change this, because production is unchanged."""
        return self.outcome != FAILED


def outcome(exit_code: int, changed: bool, worse: bool = False) -> str:
    """Return the outcome for an exit code.

    `changed`: whether the run did something; `worse`: whether it registered a version that is worse than production.
    """
    if exit_code in (130, 143):
        return STOPPED
    return FAILED if exit_code else WORSE if worse else SUCCEEDED if changed else UNCHANGED


def write(status: Status, data_dir: Path) -> None:
    """Write `status.json` atomically. Raises OSError."""
    path, draft = data_dir / NAME, data_dir / f".{NAME}.part"
    text = json.dumps(asdict(status), indent=1) + "\n"
    try:
        draft.write_text(text, "utf-8")
    except OSError:
        draft.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # the old status is outdated, and its removal makes space on a full disk
        draft.write_text(text, "utf-8")
    draft.replace(path)


def read(data_dir: Path) -> Status | None:
    """Return the status that was written last, or None. Raises OSError if the file cannot be read."""
    try:
        return Status(**json.loads((data_dir / NAME).read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):  # TypeError: written by another version
        return None


def last(data_dir: Path, model: str) -> Status | None:
    """Return the last run's status; None if no run has ended yet. Raises OSError if a file cannot be read.

    A killed run has not written a status, so this function makes one for the run and for `model`. In this status,
    `ended` is the start of the run, because the end is unknown.
    """
    known, run = read(data_dir), lock.last_run(data_dir)
    if run and run.killed and (known is None or known.ended < run.started):
        message = f"The run that started at this time ({run.process}) was killed, {KILLED}."
        success = known.last_success if known else None
        return Status(FAILED, 128 + signal.SIGKILL, message, run.started, 0.0, model, last_success=success)
    return known
