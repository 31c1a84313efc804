"""Starts runs on a schedule or at an interval, each in its own process, one after the other."""

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim

from dgmd_pipeline.commands import status
from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.formatting import counted

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)
NEXT = ".next-run"  # file in DATA_DIR that contains the time of the next run
POLL_INTERVAL = 30.0  # seconds: the maximum delay of a run after a clock change, or after the machine slept


def schedule(values: "Settings", interval: float, arguments: Sequence[str]) -> None:
    """Run `run --refresh` with `arguments` at the times of SCHEDULE, or with pauses of `interval` seconds.

    Ends when a signal arrives. Raises SettingsError if SCHEDULE and `interval` are both set, or TZ is not a time zone.
    """
    if values.schedule and interval:
        raise SettingsError(f"SCHEDULE={values.schedule} and --time {interval:g}: expected one of the two.")
    times = at(values.schedule, zone(values.tz)) if values.schedule else every(interval)
    command = [sys.executable, sys.argv[0], "run", "--refresh", *arguments]
    before = last_status(values)

    def ended(code: int, seconds: float) -> None:
        nonlocal before
        until = before.until if before else None
        _report(values, code, seconds, last_status(values) != before, until)
        before = last_status(values)

    try:
        run_on_schedule(command, _announced(times, values.data_dir), ended)
    finally:
        with contextlib.suppress(OSError):
            (values.data_dir / NEXT).unlink(missing_ok=True)


def _announced(times: Iterable[datetime], data_dir: Path) -> Iterator[datetime]:
    """Yield the times, and write each of them to NEXT for `health`."""
    for due in times:
        with contextlib.suppress(OSError):  # before the first run, the folder may be missing
            (data_dir / NEXT).write_text(due.isoformat(timespec="seconds"), "utf-8")
        yield due


def read_next(data_dir: Path) -> str | None:
    """Return the start time of the active schedule's next run (ISO 8601); None without a schedule, or during a run."""
    try:
        time = (data_dir / NEXT).read_text("utf-8")
        return time if datetime.fromisoformat(time) > _now() else None
    except (OSError, ValueError):
        return None


def last_status(values: "Settings") -> status.Status | None:
    """Return the last run's status; None if no status exists or DATA_DIR cannot be read."""
    with contextlib.suppress(OSError):
        return status.read(values.data_dir)
    return None


def _report(values: "Settings", code: int, seconds: float, published: bool, until: str | None) -> None:
    """Log a failed run. If the run was killed or could not start, publish a status for it.

    `published`: whether the run has published its own status. If it has, this function publishes none.
    """
    from dgmd_pipeline.commands import run

    killed = f"killed by signal {-code}, {status.KILLED}" if code < 0 else ""
    may_end_before_it_begins = code in (1, SettingsError.exit_code)
    code = 128 - code if killed else code  # as in a shell, and as Docker shows it
    if code:
        log.error("Run failed with exit code %d%s; the schedule continues.", code, f" ({killed})" if killed else "")
    if not published and (killed or may_end_before_it_begins):
        run.publish_status(values, None, code, killed or "the run could not start; see the log", seconds, until)


def _now() -> datetime:
    return datetime.now().astimezone()


def at(expression: str, zone: tzinfo, clock: Callable[[], datetime] = _now) -> Iterator[datetime]:
    """Yield the times of a cron expression from now on, in a time zone.

    Skips times that have already passed when the caller takes them from the iterator.
    """
    times = CronSim(expression, clock().astimezone(zone))
    while True:
        due, skipped = next(times), 0
        while due <= clock():
            due, skipped = next(times), skipped + 1
        if skipped:
            log.info("Skipped %s: the previous run was still active.", counted(skipped, "scheduled run"))
        yield due


def every(seconds: float) -> Iterator[datetime]:
    """Yield the current time first. After that, yield a time that is always `seconds` seconds in the future."""
    yield _now()
    while True:
        yield _now() + timedelta(seconds=seconds)


def zone(name: str | None) -> tzinfo:
    """Return the time zone `name` (the value of TZ), or the system's time zone if `name` is empty.

    Raises SettingsError if `name` is unknown.
    """
    if not name:
        try:  # `astimezone()` would return today's offset, which is wrong after the next clock change
            with Path("/etc/localtime").open("rb") as file:
                return ZoneInfo.from_file(file)
        except OSError:
            return UTC
    try:
        return ZoneInfo(name.removeprefix(":"))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise SettingsError(f"TZ={name}: expected the name of a time zone, like Europe/Berlin or UTC.") from None


def run_on_schedule(command: Sequence[str], times: Iterable[datetime], ended: Callable[[int, float], None]) -> None:
    """Run `command` at each of the times, until a signal arrives.

    After each run, calls `ended` with the exit code (-N if signal N killed the run) and the duration in seconds.
    """
    for due in times:
        if due > _now():
            log.info("Next run: %s", due.strftime("%Y-%m-%d %H:%M:%S %Z"))
        while (remaining := due.timestamp() - time.time()) > 0:
            time.sleep(min(remaining, POLL_INTERVAL))
        start = time.monotonic()
        code = _run(command)
        ended(code, time.monotonic() - start)


def _run(command: Sequence[str]) -> int:
    # The run has its own process group, so Ctrl-C on a terminal reaches only the schedule. The schedule stops the run.
    child = subprocess.Popen(command, process_group=0)  # noqa: S603 - our own command
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
