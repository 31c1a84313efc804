"""Shows the progress of a long step, as a progress bar on a terminal or as lines in a log."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_REPORTS = 1.0


def progress(
    items: Iterable[Item],
    what: str,
    total: int | None,
    unit: str,
    count: Callable[[Item], int] = lambda _: 1,
    size: Callable[[Item], int] | None = None,
    report: Callable[[int, str], None] | None = None,
    note: Callable[[], str] = str,
) -> Iterator[Item]:
    """Yield `items`, and show how many of `total` units are done, and how many are done per second.

    `what` names the work, and `unit` names the units. `count` returns how many units an item has (by default, 1).
    `size` returns the bytes of an item. With `size`, the speed in MB/s is also shown.
    `report` is called about once a second. Its arguments are the percentage of finished units and a text, for example
    "40 of 80 images".
    `note` returns a text that is also shown. The text may be empty.
    """
    done = volume = 0
    start = last = reported = time.monotonic()
    # tqdm draws a bar on a terminal, and is disabled otherwise.
    with tqdm(total=total, desc=f"  {what}", unit=f" {unit}", leave=False, disable=not sys.stderr.isatty()) as bar:
        for item in items:
            done += count(item)
            bar.update(count(item))
            now = time.monotonic()
            if size is not None:
                volume += size(item)
            if not bar.disable:
                speed = "" if size is None else f"{volume / 1e6 / max(now - start, 1e-9):.1f} MB/s"
                bar.set_postfix_str(", ".join(filter(None, (speed, note()))), refresh=False)
            if report and total and now - reported > SECONDS_BETWEEN_REPORTS:
                reported = now
                report(100 * done // total, f"{done:,} of {total:,} {unit}")
            if bar.disable and now - last > SECONDS_BETWEEN_LINES:
                last = now
                speed = f"{done / (now - start):.0f} {unit}/s"
                if size is not None:
                    speed += f", {volume / 1e6 / (now - start):.1f} MB/s"
                speed = ", ".join(filter(None, (speed, note())))
                log.info("  %s: %s of %s %s, %s", what, f"{done:,}", f"{total:,}" if total else "?", unit, speed)
            yield item
