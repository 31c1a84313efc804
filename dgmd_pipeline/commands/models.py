"""The command `models`."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting
from dgmd_pipeline.commands import output, versions
from dgmd_pipeline.evaluation import summary
from dgmd_pipeline.registry import promotion
from dgmd_pipeline.registry.promotion import Event
from dgmd_pipeline.registry.store import CANDIDATE, ENVIRONMENT, NON_PRODUCTION
from dgmd_pipeline.registry.versions import ModelVersion
from dgmd_pipeline.tasks import lookup

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings


@dataclass(frozen=True)
class ModelRow:
    """What `models` shows of a version; the fields are the JSON keys."""

    version: int
    created: str  # ISO 8601, UTC
    environment: str
    aliases: list[str]
    accuracy: float | None  # on the validation images, 0 to 1
    difference: float | None  # accuracy minus the accuracy of the version `compared_with`
    compared_with: int | None
    verdict: str | None  # "better", "no difference", "worse", "first", "not compared"; None: from an older pipeline
    failed: list[str]  # conditions for a promotion that the version failed in its own run
    # Median time for one image. It is not comparable between versions: each version was measured at another time, and
    # perhaps on another machine.
    latency_p50_ms: float | None
    # Latency divided by the latency of the version `compared_with`. One process measured both: the two models predicted
    # alternately.
    latency_ratio: float | None
    bytes: int | None
    run: str  # MLflow's id
    promoted_by: str | None
    promoted_at: str | None  # ISO 8601, UTC


def models(values: "Settings", as_json: bool) -> None:
    """Show the versions of the model, the newest first."""
    store, state = versions.read_registry(values)
    promoted = {event.version: event for event in promotion.history(state) if event.done is not False}
    rows = [_row(version, promoted.get(version.version)) for version in state.versions]
    if as_json:
        output.print_json([asdict(row) for row in rows])
        return
    print(f"{values.model_name} at {formatting.redact(store.uri)}")
    columns = ("version", "created (UTC)", "environment", "accuracy", "latency", "size")
    header, *lines = formatting.table([columns, *map(_cells, rows)])
    print(header)
    for line, row in zip(lines, rows, strict=True):
        print(line)
        for more in _more_lines(row):  # not on the first line, which would be wider than a terminal
            print(f"{'':9}{more}")
    if any(row.latency_ratio for row in rows):
        print("latency: for one image, as a multiple of the compared version's latency")
    if any(CANDIDATE in row.aliases for row in rows):
        print("* candidate: the version that `promote` selects by default")
    if missing := lookup.missing_registration(values):
        print(missing)


def _row(version: ModelVersion, promoted: Event | None) -> ModelRow:
    def number(name: str) -> float | None:
        value = version.tags.get(f"dgmd.{name}")
        return None if value is None else float(value)

    def whole(name: str) -> int | None:
        value = number(name)
        return None if value is None else round(value)

    return ModelRow(
        version=version.version,
        created=datetime.fromtimestamp(version.created, UTC).isoformat(timespec="seconds"),
        environment=version.tags.get(ENVIRONMENT, NON_PRODUCTION),
        aliases=list(version.aliases),
        accuracy=number("validation_accuracy"),
        difference=number("difference"),
        compared_with=whole("compared_with"),
        verdict=version.tags.get("verdict"),
        failed=[name for name in version.tags.get("dgmd.failed", "").split(", ") if name],
        latency_p50_ms=number("latency_p50_ms"),
        latency_ratio=number("latency_ratio"),
        bytes=whole("bytes"),
        run=version.run_id,
        promoted_by=promoted.user if promoted else None,
        promoted_at=promoted.time if promoted else None,
    )


def _cells(row: ModelRow) -> tuple[str, ...]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return (
        str(row.version),
        output.minute(row.created),
        row.environment + (" *" if CANDIDATE in row.aliases else ""),
        "" if row.accuracy is None else formatting.percent(row.accuracy),
        text(row.latency_ratio, "x {:.2f}"),
        "" if row.bytes is None else formatting.format_bytes(row.bytes),
    )


def _more_lines(row: ModelRow) -> list[str]:
    """Return the verdict and the promotion of a version."""
    found = []
    if row.verdict or row.difference is not None:
        found.append(summary.comparison(row.verdict or "", row.compared_with, row.difference))
    if row.failed:
        found[-1:] = [f"{', '.join(found)}; failed: {', '.join(row.failed)}"]
    if row.promoted_at:
        found.append(f"promoted {output.minute(row.promoted_at)} by {row.promoted_by}")
    return found
