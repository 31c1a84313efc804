"""The command `health`."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline import formatting
from dgmd_pipeline.commands import schedule, status
from dgmd_pipeline.tasks import lookup
from dgmd_pipeline.workflow import disk, lock

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)
# If a run reports no progress for longer than this, `health` shows a problem. A run reports its progress after each
# group of images and after each epoch, and the longest epochs take hours.
LONGEST_SILENCE = 6 * 3600.0  # seconds


class Health(NamedTuple):
    """What is known about the runs in a DATA_DIR."""

    last: status.Status | None
    running: lock.Run | None
    next_run: str | None  # ISO 8601
    problems: list[str]  # sentences

    def as_json(self) -> dict[str, object] | None:
        """Return what `health --json` prints: the last status, the active run, the next run and the problems."""
        if not (self.last or self.running or self.next_run or self.problems):
            return None
        running = self.running and {
            name: value for name, value in self.running._asdict().items() if name not in ("silent", "killed")
        }
        more = {"running": running, "next_run": self.next_run, "problems": self.problems}
        return {**(dataclasses.asdict(self.last) if self.last else {}), **more}


def health(values: "Settings", as_json: bool, max_age: float | None = None) -> int:
    """Show the last run, the active one and the next one. Return 0 if nothing needs attention, else 1.

    `max_age` (hours) overrides HEALTH_MAX_AGE. Raises PipelineError if DATA_DIR cannot be read or written.
    """
    with disk.disk_errors_explained(values.data_dir):
        if not values.data_dir.is_dir():
            log.error("%s does not exist: no run has ended there.", values.data_dir)
            return 1
        found = _examine(values, max_age or values.health_max_age)
        if not os.access(values.data_dir, os.W_OK):  # the last run may have been unable to write its status
            reason = errno.EROFS if os.statvfs(values.data_dir).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(reason, os.strerror(reason), str(values.data_dir))
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        for line in _lines(found, values):
            log.info("%s", line)
    return 1 if found.problems or (found.last and not found.last.is_good) else 0


def _examine(values: "Settings", max_age: float | None) -> Health:
    last, run = status.last(values.data_dir, values.model_name), lock.last_run(values.data_dir)
    if last and last.version and (missing := lookup.missing_registration(values)):
        last = dataclasses.replace(last, message=f"{last.message.rstrip('.')}. Since then: {missing}")
    problems = []
    active = run if run and not run.killed else None
    if active and active.silent > LONGEST_SILENCE:
        silent = formatting.format_seconds(active.silent)
        problems.append(f"The active run has made no progress for {silent}. Stop it and see its log.")
    if max_age and (age := _hours_since(last.last_success if last else None)) > max_age:
        when = (
            "No run has succeeded yet" if age == float("inf") else f"The last run that succeeded ended {age:.1f} h ago"
        )
        problems.append(f"{when}. Expected a success in the last {max_age:g} h (HEALTH_MAX_AGE).")
    return Health(last, active, schedule.read_next(values.data_dir), problems)


def _hours_since(time: str | None) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() / 3600 if time else float("inf")


def _lines(found: Health, values: "Settings") -> list[str]:
    last, lines = found.last, []
    if last is None:
        lines.append(f"No run has ended yet in {values.data_dir}.")
    else:
        after = f" after {last.seconds:.0f} s" if last.seconds else ""  # a killed run has not measured its time
        lines.append(f"{_local(last.ended)}: {last.outcome}{after}. {last.message}")
        if not last.is_good and last.last_success:
            lines.append(f"Last success: {_local(last.last_success)}")
    if found.running:
        lines.append(f"Running: {found.running}")
    if found.next_run:
        lines.append(f"Next run: {_local(found.next_run)}")
    return [*lines, *found.problems]


def _local(time: str) -> str:
    with contextlib.suppress(ValueError):
        return formatting.local_time(datetime.fromisoformat(time))
    return time
