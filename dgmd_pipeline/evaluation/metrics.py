"""Predictions -> metrics and tables."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.evaluation import predictions
from dgmd_pipeline.manifest import FORMULA

METRICS = "metrics.json"
BINS = 15  # of confidence, equally wide
SHOWN = 24  # mistakes of each kind
MOST_WRONG, MOST_CONFIDENT = "most wrong", "most confident"


class ClassMetrics(NamedTuple):
    """How good the model is on the images of a label, and where it names that label. Shares are 0 to 1."""

    label: str
    precision: float
    recall: float
    f1: float
    images: int  # at least 1


class ConfusedPair(NamedTuple):
    """A label that is taken for another."""

    label: str  # the true one
    predicted: str
    images: int  # at least 1
    share: float  # of the true label's images, 0 to 1


class CalibrationBin(NamedTuple):
    """The images whose highest probability is above `low` and at most `high`."""

    low: float
    high: float
    images: int  # at least 1
    confidence: float  # their mean highest probability
    accuracy: float  # the share that is right


class Misclassification(NamedTuple):
    """An image for which another label than its own has the highest probability."""

    kind: str  # MOST_WRONG, MOST_CONFIDENT or `label_suspects.SUSPECT`
    key: str  # below raw/
    label: str  # the one that the image has in the data
    predicted: str
    probability: float  # of the predicted label
    true_probability: float  # of `label`
    position: int  # among the images that were looked at, from 0


class Measurements(NamedTuple):
    """What there is to know of a model's answers on the validation side."""

    overall: dict[str, float]  # what metrics.json holds
    classes: list[ClassMetrics]  # in the order of the class indexes; none for a label without images
    matrix: np.ndarray  # int64 [classes, classes], the true label in the row and the predicted one in the column
    pairs: list[ConfusedPair]  # most images first
    bins: list[CalibrationBin]  # from low to high; none that is empty
    mistakes: list[Misclassification]  # up to SHOWN of each kind, the worst first; an image may be of both kinds


def evaluate(
    probabilities: np.ndarray,
    truth: np.ndarray,
    labels: Sequence[str],
    keys: Sequence[str],
    folder: Path,
    leaked: Sequence[int] | None = None,
) -> Measurements:
    """Write what `measure` finds into `folder` and return it.

    `leaked` are the positions of the images that have a near-duplicate in training, None where nobody looked. Overall
    are then also `leaks`, their number, and `accuracy_without_leaks`, the accuracy on the others, if there are any.

    `metrics.json` holds these; the CSV files are for people. `predictions.npz` holds what everything can be measured
    from again, see `load`: probabilities (float32), truth (int64) and keys (fixed-width Unicode).
    """
    found = measure(probabilities, truth, labels, keys)
    if leaked is not None:
        right = np.delete(probabilities.argmax(axis=1) == truth, leaked)
        without = {"accuracy_without_leaks": float(right.mean())} if len(right) else {}
        found = found._replace(overall=found.overall | {"leaks": len(leaked)} | without)
    (folder / METRICS).write_text(json.dumps(found.overall, indent=1) + "\n", encoding="utf-8")
    write_table(folder / "per_class.csv", ClassMetrics._fields, found.classes)
    header = ["true label", *labels]
    write_table(folder / "confusion_matrix.csv", header, _named(labels, found.matrix))
    write_table(folder / "confusion_matrix_normalised.csv", header, _named(labels, shares(found.matrix)))
    write_table(folder / "confused_pairs.csv", ["true label", "predicted label", "images", "share"], found.pairs)
    write_table(folder / "calibration.csv", CalibrationBin._fields, found.bins)
    columns = ["kind", "key", "true label", "predicted label", "probability", "probability of the true label"]
    write_table(folder / "mistakes.csv", [*columns, "position"], found.mistakes)
    np.savez_compressed(
        folder / predictions.PREDICTIONS,
        probabilities=probabilities.astype(np.float32),
        truth=truth.astype(np.int64),
        keys=np.array(keys, dtype=np.str_),
    )
    return found


def measure(probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str], keys: Sequence[str]) -> Measurements:
    """Measure the answers `probabilities` (float [n, classes]) to images whose class indexes are `truth` (int [n]).

    `labels` has the name of each index, `keys` the path below raw/ of each image. Overall are: accuracy; the unweighted
    means of precision, recall and F1 over the classes that occur (of recall that is the balanced accuracy); the share
    of images whose label is among the three most probable; log loss (nats); expected calibration error; images.
    A label without images has no row of its own, and counts only where it was predicted.
    """
    from sklearn import metrics

    predicted = probabilities.argmax(axis=1)
    occurring = np.unique(truth)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, predicted, labels=occurring, zero_division=0
    )
    matrix = metrics.confusion_matrix(truth, predicted, labels=np.arange(len(labels)))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :3]  # of equal ones the first, as argmax does
    bins = _bins(probabilities.max(axis=1), predicted == truth)
    overall = {
        "accuracy": float((predicted == truth).mean()),
        "balanced_accuracy": float(recall.mean()),
        "top_3_accuracy": float((best == truth[:, None]).any(axis=1).mean()),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "log_loss": float(metrics.log_loss(truth, probabilities, labels=np.arange(len(labels)))),
        "expected_calibration_error": sum(row.images * abs(row.confidence - row.accuracy) for row in bins) / len(truth),
        "images": len(truth),
    }
    names = [labels[index] for index in occurring]
    columns = (values.tolist() for values in (precision, recall, f1, support))
    return Measurements(
        overall,
        [ClassMetrics(*row) for row in zip(names, *columns, strict=True)],
        matrix,
        _pairs(matrix, labels),
        bins,
        _mistakes(probabilities, truth, labels, keys),
    )


def shares(matrix: np.ndarray) -> np.ndarray:
    """Return a confusion matrix (int [k, k]) as float64 with rows that sum to 1; a row of nothing stays 0."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _bins(confidence: np.ndarray, right: np.ndarray) -> list[CalibrationBin]:
    """Sort the images by confidence into BINS of equal width, for the expected calibration error.

    That is the mean distance between confidence and accuracy, weighted by images: Guo, Pleiss, Sun and Weinberger,
    "On Calibration of Modern Neural Networks", ICML 2017, equations 2 and 3; 15 bins as there.
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        CalibrationBin(
            index / BINS,
            (index + 1) / BINS,
            int(inside.sum()),
            *map(float, (confidence[inside].mean(), right[inside].mean())),
        )
        for index in range(BINS)
        if (inside := number == index).any()
    ]


def _pairs(matrix: np.ndarray, labels: Sequence[str]) -> list[ConfusedPair]:
    share = shares(matrix)
    off = matrix - np.diag(np.diag(matrix))
    found = [
        ConfusedPair(labels[true], labels[predicted], int(off[true, predicted]), float(share[true, predicted]))
        for true, predicted in np.argwhere(off)
    ]
    return sorted(found, key=lambda pair: (-pair.images, -pair.share, pair.label, pair.predicted))


def _mistakes(
    probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str], keys: Sequence[str]
) -> list[Misclassification]:
    predicted = probabilities.argmax(axis=1)
    of_true, highest = probabilities[np.arange(len(truth)), truth], probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != truth)
    return [
        Misclassification(
            kind, keys[at], labels[truth[at]], labels[predicted[at]], float(highest[at]), float(of_true[at]), int(at)
        )
        for kind, badness in ((MOST_WRONG, of_true), (MOST_CONFIDENT, -highest))
        for at in wrong[np.argsort(badness[wrong], kind="stable")][:SHOWN]
    ]


def _named(labels: Sequence[str], rows: np.ndarray) -> Iterable[list[object]]:
    return ([label, *row] for label, row in zip(labels, rows.tolist(), strict=True))


def write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file for people; a cell that a spreadsheet would take for a formula gets an apostrophe before it."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([_cell(value) for value in row] for row in (header, *rows))


def _cell(value: object) -> object:
    """Keep spreadsheets from taking a label or a file name for a formula.

    Source: owasp.org/www-community/attacks/CSV_Injection.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
