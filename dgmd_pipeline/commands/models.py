"""The commands `models` and `history`."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dgmd_pipeline import formatting
from dgmd_pipeline.commands import output
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.formatting import format_bytes
from dgmd_pipeline.registry import promotion, versions
from dgmd_pipeline.registry import store as registry_store
from dgmd_pipeline.tasks import outputs

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def models(values: "Settings", as_json: bool) -> None:
    """Show the versions of the model, the newest first."""
    store, found = registered_versions(values)
    promoted = {
        event.version: event for event in promotion.history(store, values.model_name) if event.done is not False
    }
    rows = [_row(entry, promoted.get(entry.version)) for entry in found]
    if as_json:
        output.print_json(rows)
        return
    print(f"{values.model_name} at {formatting.redact(store.uri)}")
    head = ("version", "created", "environment", "accuracy", "difference", "latency", "size")
    shown = [_shown(row) for row in rows]
    title, *lines = formatting.table([head, *([row[name] for name in head] for row in shown)])
    print(title)
    for line, row in zip(lines, shown, strict=True):
        print(line)
        if row["promoted"]:  # in a line of its own: a terminal is not wide enough for one
            print(f"{'':9}promoted {row['promoted']}")
    if any(registry_store.CANDIDATE in row["aliases"] for row in rows):
        print("* candidate: what `promote` takes")


def _row(entry: versions.Entry, event: promotion.Event | None) -> dict[str, Any]:
    def number(name: str) -> float | None:
        value = entry.tags.get(f"dgmd.{name}")
        return None if value is None else float(value)

    return {
        "version": entry.version,
        "created": datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="seconds"),
        "environment": entry.tags.get(registry_store.ENVIRONMENT, registry_store.NON_PRODUCTION),
        "aliases": list(entry.aliases),
        "accuracy": number("validation_accuracy"),
        "difference": number("difference"),
        "compared_with": entry.tags.get("dgmd.compared_with"),
        "latency_p50_ms": number("latency_p50_ms"),
        "bytes": number("bytes"),
        "run": entry.run_id,
        "promoted_by": event and event.who,
        "promoted_at": event and event.when,
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    def words(name: str, form: str) -> str:
        return "" if row[name] is None else form.format(row[name])

    against = f" v{row['compared_with']}" if row["compared_with"] else ""
    return {
        "version": str(row["version"]),
        "created": row["created"][:10],
        "environment": row["environment"] + (" *" if registry_store.CANDIDATE in row["aliases"] else ""),
        "accuracy": words("accuracy", "{:.4f}"),
        "difference": words("difference", "{:+.4f}") + against,
        "latency": words("latency_p50_ms", "{:.0f} ms"),
        "size": "" if row["bytes"] is None else format_bytes(int(row["bytes"])),
        "promoted": f"{row['promoted_at'][:10]} by {row['promoted_by']}" if row["promoted_at"] else "",
    }


def history(values: "Settings", as_json: bool) -> None:
    """Show who made which version production, and why."""
    store, _ = registered_versions(values)
    events = promotion.history(store, values.model_name)
    if as_json:
        output.print_json([event._asdict() for event in events])
        return
    rows: list[Sequence[str]] = [("when", "what", "from", "to", "who", "why")]
    for event in events:
        what = event.action + (" (forced)" if event.forced else "") + ("" if event.done else " (not carried out)")
        rows.append((event.when[:16], what, str(event.former or ""), str(event.version), event.who, event.why))
    output.print_table(rows)


def registered_versions(values: "Settings", repair: bool = True) -> tuple[registry_store.Store, list[versions.Entry]]:
    """Return the registry and the model's versions, after mending what a command that was cut off has left."""
    store = outputs.store(values)
    if store is None:
        raise NoUsableInput(
            f"There is no registry: MLFLOW_TRACKING_URI is not set, and {values.data_dir} holds no embedded one. Set "
            "the one, or DATA_DIR, or run the pipeline first."
        )
    found = versions.entries(store, values.model_name)
    if not found:
        raise NoUsableInput(
            f"There is no version of {values.model_name} in the registry: correct MODEL_NAME, or run the pipeline "
            "first."
        )
    if repair and (mended := promotion.repair(store, values.model_name)):
        log.warning("mended: %s", "; ".join(mended))
        found = versions.entries(store, values.model_name)
    return store, found


def select_version(found: Sequence[versions.Entry], word: str, name: str) -> versions.Entry:
    """Return the version of a number or an @alias."""
    for entry in found:
        if str(entry.version) == word or (word.startswith("@") and word[1:] in entry.aliases):
            return entry
    if word == f"@{registry_store.CANDIDATE}" and found:
        raise NoUsableInput(
            f"No version of {name} waits for a promotion; the newest is {found[0].version}. Name the one that is meant."
        )
    versions = ", ".join(str(entry.version) for entry in found[:10])
    aliases = ", ".join(f"@{alias}" for entry in found for alias in entry.aliases) or "no alias"
    raise NoUsableInput(f"{name} has no version {word}: the newest are {versions}, and there is {aliases}.")
