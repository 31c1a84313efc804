"""Bytes, durations, shares, tables and URIs -> text that is safe to show."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def format_bytes(size: int) -> str:
    """Return a number of bytes as people read it: "382.7 MB"."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:  # what would be shown as 1000.0
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def redact(text: str) -> str:
    """Take user, password and query out of every URI in a text: they may be secrets."""
    # Up to the last @: a password may hold / and quotes. An S3 address has no user, but its keys may have an @.
    text = re.sub(r"\b(?!s3:)([a-zA-Z][\w+.-]*://)\S*@", r"\1", text)
    return re.sub(r"(\b[a-zA-Z][\w+.-]*://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)


def format_seconds(seconds: float) -> str:
    """Return a duration for people: "under 0.1 s", "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def printable(key: str) -> str:
    """Return `key` fit for a CSV file and a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)


def whole_percentages(parts: Sequence[float]) -> list[int]:
    """Return the shares of `parts`, not all of them 0, in whole percent: rounded so that they sum to 100."""
    total = sum(parts)
    exact = [100 * part / total for part in parts]
    percents = [int(share) for share in exact]
    nearest = sorted(range(len(parts)), key=lambda place: percents[place] - exact[place])
    for place in nearest[: 100 - sum(percents)]:  # those that lost most when they were cut off
        percents[place] += 1
    return percents


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line of text for each row, with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
