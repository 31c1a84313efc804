"""Formats bytes, durations, shares, tables and URIs as text that is safe to show."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime


def utc_now() -> str:
    """Return the current time in UTC as ISO 8601, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def local_time(time: datetime) -> str:
    """Return a time in the local time zone, as in "2026-11-27 03:00:00+01:00"."""
    return time.astimezone().isoformat(" ", "seconds")


def format_bytes(size: int) -> str:
    """Return a number of bytes with a decimal unit, for example "382.7 MB"."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:  # larger values would be shown as 1000.0
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign: "+1.3", "-0.4" or "0.0"."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text[1:] == "0.0" else text


def redact(text: str) -> str:
    """Remove user, password and query from every URI in a text: they may be secrets."""
    # User and password end at the last @, because a password may contain / and quotes. S3 URIs are not changed: they
    # have no user, but their keys may contain @.
    text = re.sub(r"\b(?!s3:)([a-zA-Z][\w+.-]*://)\S*@", r"\1", text)
    return re.sub(r"(\b[a-zA-Z][\w+.-]*://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)


def format_seconds(seconds: float) -> str:
    """Return a duration as text: "under 0.1 s", "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def printable(key: str) -> str:
    """Return `key` with unprintable characters escaped, for CSV files and terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)


def one_line(text: str, limit: int = 1000) -> str:
    """Return a text from a file or a library as one line of at most `limit` printable characters.

    In a longer text, "..." replaces the middle. Both ends stay, because errors begin with the cause, and paths end with
    the file's name.
    """
    return _cut(printable(_cut(" ".join(text.split()), limit)), limit)


def _cut(line: str, limit: int) -> str:
    end = limit // 4
    return line if len(line) <= limit else f"{line[: limit - end - 5]} ... {line[-end:]}"


def percent(share: float) -> str:
    """Return a share (0 to 1) in percent: "99.7 %", "50 %". Only 1 is "100 %", and only 0 is "0 %"."""
    value = round(100 * share, 1)
    if 0 < share < 1:
        value = min(max(value, 0.1), 99.9)
    return f"{value:g} %"


def counted(count: int, noun: str) -> str:
    """Return a number with a noun: "1 epoch", "1,200 epochs"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def whole_percentages(parts: Sequence[float]) -> list[int]:
    """Return the shares of `parts` in whole percent, rounded so that they sum to 100.

    At least one part must be above 0. The method is the largest remainder method.
    """
    total = sum(parts)
    exact = [100 * part / total for part in parts]
    percents = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: percents[index] - exact[index])
    for index in by_remainder[: 100 - sum(percents)]:
        percents[index] += 1
    return percents


def as_user(user: int) -> str:
    """Return the options of Docker and of Docker Compose that start the container as a user."""
    return f"`docker run --user {user}`, or PIPELINE_USER={user} in .env with Docker Compose"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line of text for each row, with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def describe_reuse(count: int, what: str, new: int) -> str:
    """Return the number of things, and how many are new and how many reused: "1,600 images (12 new, 1,588 reused)".

    If all things are new, the part in parentheses is missing.
    """
    return f"{count:,} {what}" + (f" ({new:,} new, {count - new:,} reused)" if new < count else "")
