"""200,000 images of 1,000 classes: CPU seconds, memory and bytes of an evaluation after its predictions.

The probabilities are made up (0.8 GB). The measurement includes the metrics, their tables, the file of
predictions, the comparison with production, whose answers come in blocks, and the plots. Each repeat is a new process.
Its memory is the peak after the libraries are loaded, and includes the array.

    python -m benchmarks.evaluating [--repeats 3]
"""

import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import measure
from dgmd_pipeline import manifest
from dgmd_pipeline.evaluation import metrics, predictions, report, review
from dgmd_pipeline.evaluation.predictions import Predictions

IMAGES, CLASSES, BLOCK = 200_000, 1_000, 4_096
SECONDS = 8  # the goal


class Cost(NamedTuple):
    """The cost of an evaluation."""

    seconds: float  # of CPU time
    peak: int  # bytes of memory
    file: int  # bytes of the file of predictions


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=3).repeats
    costs = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            costs.append(worker.submit(evaluate).result())
    array = 4 * IMAGES * CLASSES
    seconds = [cost.seconds for cost in costs]
    measure.show(
        measure.Claim(
            f"evaluate {IMAGES:,} x {CLASSES:,} probabilities: CPU seconds, of {SECONDS}",
            [each / SECONDS for each in seconds], 1, at_least=False, figures=measure.median(seconds, " s"),
        ),
        measure.Claim(
            "the same: peak memory, times the array", [cost.peak / array for cost in costs], 2, at_least=False,
            figures=f"{measure.median([cost.peak / 1e9 for cost in costs])} GB / {array / 1e9:.3g} GB",
        ),
        measure.Claim(
            "the same: file of predictions, times the array", [cost.file / array for cost in costs], 0.05,
            at_least=False, figures=f"{measure.median([cost.file / 1e6 for cost in costs])} MB / {array / 1e6:,.3g} MB",
        ),
    )  # fmt: skip


def evaluate() -> Cost:
    """Evaluate made-up probabilities in this process."""
    import matplotlib.figure
    import scipy.stats
    import sklearn.metrics

    del matplotlib, scipy, sklearn
    random = np.random.default_rng(0)
    truth = random.integers(0, CLASSES, IMAGES)
    labels = [f"label {number:04}" for number in range(CLASSES)]
    rows = [
        manifest.Example(f"{labels[true]}/{number:07}.jpg", labels[true], true, f"{number:064x}", "")
        for number, true in enumerate(truth.tolist())
    ]
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets VmHWM
    production = review.answers(made_up(truth, 1))
    probabilities = predictions.gather(made_up(truth, 0), IMAGES, CLASSES)
    start = cpu_seconds()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = metrics.evaluate(Predictions(probabilities, truth, labels, [row.path for row in rows]), folder)
        answers = review.answers([probabilities])
        model = review.CandidateModel(folder, labels, frozenset(), frozenset(labels), None, answers)
        images = review.ValidationImages(folder, rows)
        compared = review.compare(model, model._replace(version=1, answers=production), images)
        report.draw(folder, content(labels, measured), compared)
        file = (folder / predictions.PREDICTIONS).stat().st_size
    return Cost(cpu_seconds() - start, memory("VmHWM") - before, file)


def made_up(truth: np.ndarray, seed: int):
    """Yield blocks of probabilities of a model that is right for about two thirds of the images."""
    random = np.random.default_rng(seed)
    for first in range(0, len(truth), BLOCK):
        own = truth[first : first + BLOCK]
        block = 2 * random.standard_normal((len(own), CLASSES), np.float32)
        block[np.arange(len(own)), own] += 7
        np.exp(block, out=block)
        yield block / block.sum(axis=1, keepdims=True)


def content(labels: list[str], measured: metrics.Measurements) -> report.Content:
    nothing: dict[int, np.ndarray] = {}
    return report.Content(
        model_name="", created="", source="", settings={}, labels=labels, measured=measured, thumbnails=nothing,
        suspects=None, suspect_thumbnails=nothing, leaks=None, leak_thumbnails=nothing, history=(), head=None,
        counts=(), rejected=(), seconds=(),
    )  # fmt: skip


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory(name: str) -> int:
    """Return a line of this process's status in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text("ascii").partition(f"{name}:")[2].split()[0])


if __name__ == "__main__":
    main()
