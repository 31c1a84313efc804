"""The times of the steps that ran, as a table and as metrics."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline import formatting

if TYPE_CHECKING:
    from dgmd_pipeline.workflow.success_file import StepRecord

REST = "the rest"  # the time of a run outside its steps: start, planning, waiting
# Prefix of metric names. MLflow's page shows metrics that begin with system/ separately.
PREFIX = "system/"
SECONDS = f"{PREFIX}step_seconds/"


class Row(NamedTuple):
    """The time of a step."""

    name: str  # name of the step folder, or REST
    seconds: float
    images: float | None  # images per second; None if the step processes no images
    megabytes: float | None  # megabytes per second; None if the step counts no bytes
    share: int  # percentage of the run's time


def table_rows(records: Sequence["StepRecord"], total: float) -> list[Row]:
    """Return a row for each step, and one for the rest of a run of `total` seconds. The shares sum to 100."""
    rest = max(0.0, total - sum(record.seconds for record in records))
    *shares, rest_share = formatting.whole_percentages([*(record.seconds for record in records), rest])
    found = [
        Row(record.step, record.seconds, *_rates(record), share) for record, share in zip(records, shares, strict=True)
    ]
    return [*found, Row(REST, rest, None, None, rest_share)]


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table, and a last line that names the slowest step.

    The table is at most 54 columns wide, because the time stamp takes 26 of the 80 columns of a log line.
    """
    table = [f"  {'step':19} {'seconds':>9} {'img/s':>7} {'MB/s':>8} {'share':>5}"]
    for row in rows:
        megabytes = "" if row.megabytes is None else f"{row.megabytes:,.1f}"
        share = f"{row.share} %"
        table.append(f"  {row.name:19} {row.seconds:>9,.1f} {_images(row):>7} {megabytes:>8} {share:>5}")
    slowest = max((row for row in rows if row.name != REST), key=lambda row: row.seconds)
    total = sum(row.seconds for row in rows)
    speed = f", {_images(slowest)} images/s" if slowest.images else ""
    took = f"{slowest.seconds:,.1f} s of {total:,.1f} s ({slowest.share} %)"
    return [*table, f"Slowest: {slowest.name}, {took}{speed}"]


def metrics(records: Iterable["StepRecord"]) -> dict[str, float]:
    """Return a dictionary: name of a metric -> its value.

    The metrics of a step are its seconds, its speeds, and its share (0 to 1) of the time of all steps.
    """
    records = list(records)
    total = sum(record.seconds for record in records)
    found: dict[str, float] = {}
    for record in records:
        images, megabytes = _rates(record)
        values = {
            f"{SECONDS}{record.step}": record.seconds,
            f"{PREFIX}step_images_per_second/{record.step}": images,
            f"{PREFIX}step_megabytes_per_second/{record.step}": megabytes,
            f"{PREFIX}step_share/{record.step}": record.seconds / total if total else None,
        }
        found |= {name: value for name, value in values.items() if value is not None}
    return found


def _rates(record: "StepRecord") -> tuple[float | None, float | None]:
    """Return images per second and megabytes per second.

    A rate is None if the number of images or bytes is unknown or 0, or if the step took no time.
    """

    def rate(amount: int | None) -> float | None:
        return amount / record.seconds if amount and record.seconds else None

    megabytes = rate(record.volume)
    return rate(record.worked), megabytes and megabytes / 1e6


def _images(row: Row) -> str:
    if row.images is None:
        return ""
    return f"{row.images:,.0f}" if row.images >= 9.95 else f"{row.images:.1f}"
