"""What commands print, and the questions that they ask."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import Declined, SettingsError
from dgmd_pipeline.evaluation import gates
from dgmd_pipeline.formatting import format_bytes, percent
from dgmd_pipeline.registry.versions import ModelVersion

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.comparison import ClassComparison, Comparison
    from dgmd_pipeline.evaluation.review import Review
    from dgmd_pipeline.evaluation.serving_benchmark import ServingBenchmark

SHOWN_LABELS = 10


def print_review(name: str, entry: ModelVersion, other: int | None, review: "Review", decision: gates.Decision) -> None:
    """Print the review of a version: comparison with another version, serving benchmark, conditions and verdict."""
    comparison = review.comparison
    print(f"{name} version {entry.version}, run {entry.run_id}")
    print_table([
        ("", f"version {entry.version}", f"version {other}" if other else "", ""),
        *_accuracy_rows(comparison, entry.tags.get("dgmd.validation_accuracy", "")),
        *_benchmark_rows(review.serving_benchmark),
    ])  # fmt: skip
    if comparison:
        _print_labels(comparison.classes, f"version {comparison.version} -> version {entry.version}")
    for gate in gates.grouped(decision.gates):
        state = {True: "holds", False: "FAILS", None: "-"}[gate.passed]
        _print_text(f"  {gate.name:11} {state:6} {gate.text}", indent=21)
    _print_text(f"{decision.headline}. {decision.reason}")
    if decision.drift:
        _print_text(decision.drift)


def _print_text(text: str, indent: int = 0) -> None:
    """Print a text. On a terminal, break it into lines between words."""
    if sys.stdout.isatty():
        width = max(60, shutil.get_terminal_size().columns)
        text = textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False)
    print(text)


def _accuracy_rows(comparison: "Comparison | None", accuracy: str) -> list[Sequence[str]]:
    if comparison is None:
        return [("accuracy", percent(float(accuracy)) if accuracy else "", "", "")]
    return [
        ("accuracy", percent(comparison.accuracy), percent(comparison.production_accuracy), ""),
        ("images", f"{comparison.images:,}", "", f"{comparison.gained:,} gained, {comparison.lost:,} lost"),
    ]


def _benchmark_rows(benchmark: "ServingBenchmark | None") -> list[Sequence[str]]:
    if benchmark is None:
        return []
    latency, size = ["", ""], ["", ""]
    if other := benchmark.production:
        latency = [f"{other.latency_p50_ms:.0f} ms", f"{other.latency_ratio:.2f} times as long"]
        size = [format_bytes(other.bytes), f"{other.size_ratio:.2f} times as large"]
    return [
        ("one image", f"{benchmark.latency_p50_ms:.0f} ms", *latency),
        ("size", format_bytes(benchmark.bytes), *size),
        ("memory", format_bytes(benchmark.peak_memory_bytes), "", ""),
        ("load", f"{benchmark.load_seconds:.1f} s", "", ""),
    ]


def _print_labels(classes: "Sequence[ClassComparison]", versions: str) -> None:
    """Print how the recall of each label changed. The label with the largest decrease comes first."""
    changed = sorted((row for row in classes if row.gained or row.lost), key=lambda row: (row.change, -row.lost))
    if changed:
        print(f"Labels whose predictions differ, recall of {versions}:")
    for row in changed[:SHOWN_LABELS]:
        print(
            f"  {row.label}: {percent(row.production_recall)} -> {percent(row.recall)} of {row.images:,} "
            f"({row.gained:,} gained, {row.lost:,} lost)"
        )
    if (more := len(changed) - SHOWN_LABELS) > 0:
        print(f"  {more:,} more labels whose predictions differ")


def confirm(question: str, yes: bool) -> None:
    """Ask a question, unless `yes` is set.

    Raises Declined if the answer is no. Raises SettingsError if stdin is not a terminal.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError(f'Cannot ask "{question}": stdin is not a terminal. Add --yes.')
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # stdout may be JSON for another program
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Declined("Nothing was changed.")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Provide a folder that is removed when the block ends."""
    Path(gettempdir()).mkdir(parents=True, exist_ok=True)  # it may be DATA_DIR/.tmp, which is missing before a run
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


def minute(time: str) -> str:
    """Return an ISO 8601 time as in "2026-11-26 03:00"."""
    return time[:16].replace("T", " ")
