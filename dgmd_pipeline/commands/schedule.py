"""Times -> runs, each in a process of its own, one after the other."""

import logging
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim

from dgmd_pipeline.errors import SettingsError

log = logging.getLogger(__name__)
POLL_INTERVAL = 30.0  # seconds: a clock that was set, or a machine that slept, is noticed after so long


def _now() -> datetime:
    return datetime.now().astimezone()


def at(expression: str, zone: tzinfo, clock: Callable[[], datetime] = _now) -> Iterator[datetime]:
    """Yield the times of a cron expression from now on, in a time zone.

    Those that have gone by when the next one is asked for are passed over.
    """
    times = CronSim(expression, clock().astimezone(zone))
    while True:
        due, passed = next(times), 0
        while due <= clock():
            due, passed = next(times), passed + 1
        if passed:
            log.info("Passed over, because the run before took so long: %d.", passed)
        yield due


def every(seconds: float) -> Iterator[datetime]:
    """Yield the present, and then each time so many seconds after the next one is asked for."""
    yield _now()
    while True:
        yield _now() + timedelta(seconds=seconds)


def zone(name: str | None) -> tzinfo:
    """Return the time zone that `TZ` names, or the system's. Raises SettingsError for a name that is none."""
    if not name:
        try:  # `astimezone()` would give today's offset, and go on with it when clocks change
            with Path("/etc/localtime").open("rb") as file:
                return ZoneInfo.from_file(file)
        except OSError:
            return UTC
    try:
        return ZoneInfo(name.removeprefix(":"))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise SettingsError(f"TZ={name}: expected the name of a time zone, like Europe/Berlin or UTC.") from None


def run_on_schedule(command: Sequence[str], times: Iterable[datetime], ended: Callable[[int, float], None]) -> None:
    """Run `command` at each of the times, until a signal comes.

    `ended` hears of each run's exit code (negative: the signal that killed it) and seconds.
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
    # In a group of its own: a terminal's Ctrl-C comes to it from here alone, once.
    child = subprocess.Popen(command, process_group=0)  # noqa: S603 - our own command
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
