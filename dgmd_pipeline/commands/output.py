"""Output of commands, and their questions."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import Refused, SettingsError
from dgmd_pipeline.evaluation import gates
from dgmd_pipeline.formatting import format_bytes
from dgmd_pipeline.registry.versions import ModelVersion

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.review import Review


def print_review(
    name: str, entry: ModelVersion, other: int | None, known: "Review", gates: Sequence[gates.Gate]
) -> None:
    """Print what is known of a version beside another."""
    rows: list[Sequence[str]] = [("", f"version {entry.version}", f"version {other}" if other else "", "")]
    if found := known.comparison:
        interval = f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
        rows.append((
            "accuracy", f"{found['accuracy']:.4f}", f"{found['production_accuracy']:.4f}",
            f"{100 * found['difference']:+.1f} points ({interval})",
        ))  # fmt: skip
        rows.append(("images", f"{found['images']:,}", "", f"{found['gained']:,} gained, {found['lost']:,} lost"))
    else:
        rows.append(("accuracy", entry.tags.get("dgmd.validation_accuracy", ""), "", ""))
    if tried := known.assessment:
        timed = tried.get("latency_ratio")
        rows.append((
            "one picture", f"{tried['latency_p50_ms']:.0f} ms",
            f"{tried['production_latency_p50_ms']:.0f} ms" if timed else "", f"{timed:.2f} times" if timed else "",
        ))  # fmt: skip
        rows.append((
            "size", format_bytes(tried["bytes"]), format_bytes(tried["production_bytes"]) if timed else "",
            f"{tried['size_ratio']:.2f} times" if timed else "",
        ))  # fmt: skip
        rows.append(("memory", format_bytes(tried["peak_memory_bytes"]), "", ""))
        rows.append(("load", f"{tried['load_seconds']:.1f} s", "", ""))
    print(f"{name} version {entry.version}, run {entry.run_id}")
    print_table(rows)
    for row in (found or {}).get("classes", ()):
        if row["gained"] or row["lost"]:
            print(
                f"  {row['label']}: {row['production_recall']:.0%} -> {row['recall']:.0%} of {row['images']:,} "
                f"({row['gained']:,} gained, {row['lost']:,} lost)"
            )
    for kind in ("here", "there"):
        if labels := (found or {}).get(f"labels_only_{kind}"):
            version = entry.version if kind == "here" else other
            print(f"  only version {version} knows: {', '.join(labels)}")
    for gate in gates:
        state = {True: "holds", False: "FAILS", None: "-"}[gate.passed]
        print(f"  {gate.name:11} {state:6} {gate.text}")


def confirm(question: str, yes: bool) -> None:
    """Return if the answer is yes. Raises Refused if it is not, SettingsError if stdin is not a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError(f"{question} Cannot ask: stdin is not a terminal. Add --yes.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # stdout may be JSON for another program
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("Nothing was changed.")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Provide a folder that is removed when the block ends."""
    with TemporaryDirectory(prefix="dgmd-") as folder:
        yield Path(folder)


def print_result(text: str, as_json: bool, **values: object) -> None:
    """Print a sentence, or the values as JSON."""
    if as_json:
        print_json(values)
    else:
        print(text)


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; the first row is the header."""
    print(*formatting.table(rows), sep="\n")
