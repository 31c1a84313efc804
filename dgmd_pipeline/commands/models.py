"""The command `models`."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting
from dgmd_pipeline.commands import output, versions
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
    difference: float | None  # of the accuracy to that of the version `compared_with`
    compared_with: str | None
    latency_p50_ms: float | None
    bytes: float | None
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
    columns = ("version", "created", "environment", "accuracy", "difference", "latency", "size")
    header, *lines = formatting.table([columns, *map(_cells, rows)])
    print(header)
    for line, row in zip(lines, rows, strict=True):
        print(line)
        if row.promoted_at:  # on a line of its own: one line would be wider than a terminal
            print(f"{'':9}promoted {row.promoted_at[:10]} by {row.promoted_by}")
    if any(CANDIDATE in row.aliases for row in rows):
        print("* candidate: the version that `promote` selects by default")
    if missing := lookup.missing_registration(values):
        print(missing)


def _row(version: ModelVersion, promoted: Event | None) -> ModelRow:
    def number(name: str) -> float | None:
        value = version.tags.get(f"dgmd.{name}")
        return None if value is None else float(value)

    return ModelRow(
        version=version.version,
        created=datetime.fromtimestamp(version.created, UTC).isoformat(timespec="seconds"),
        environment=version.tags.get(ENVIRONMENT, NON_PRODUCTION),
        aliases=list(version.aliases),
        accuracy=number("validation_accuracy"),
        difference=number("difference"),
        compared_with=version.tags.get("dgmd.compared_with"),
        latency_p50_ms=number("latency_p50_ms"),
        bytes=number("bytes"),
        run=version.run_id,
        promoted_by=promoted.user if promoted else None,
        promoted_at=promoted.time if promoted else None,
    )


def _cells(row: ModelRow) -> tuple[str, ...]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return (
        str(row.version),
        row.created[:10],
        row.environment + (" *" if CANDIDATE in row.aliases else ""),
        text(row.accuracy, "{:.4f}"),
        text(row.difference, "{:+.4f}") + (f" v{row.compared_with}" if row.compared_with else ""),
        text(row.latency_p50_ms, "{:.0f} ms"),
        "" if row.bytes is None else formatting.format_bytes(int(row.bytes)),
    )
