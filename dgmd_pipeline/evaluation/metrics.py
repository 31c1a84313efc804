"""Metrics and tables of predictions."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.evaluation import predictions as evaluation_predictions
from dgmd_pipeline.evaluation.predictions import Predictions
from dgmd_pipeline.manifest import to_cell

METRICS = "metrics.json"
MAX_MATRIX = 1000  # labels of a confusion matrix; more do not fit on a screen, and memory grows with their square
BINS = 15  # number of intervals of equal width that divide the confidences from 0 to 1
SHOWN = 24  # maximum number of misclassifications of each kind in `Measurements`
MOST_WRONG, MOST_CONFIDENT = "most wrong", "most confident"


class ClassMetrics(NamedTuple):
    """How well the model recognises one label. Shares are 0 to 1."""

    label: str
    precision: float
    recall: float
    f1: float
    images: int  # at least 1


class ConfusedPair(NamedTuple):
    """A label that the model mistakes for another."""

    label: str  # the true one
    predicted: str
    images: int  # at least 1
    share: float  # of the true label's images, 0 to 1


class CalibrationBin(NamedTuple):
    """The images whose highest probability is above `low` and at most `high`."""

    low: float
    high: float
    images: int  # at least 1
    confidence: float  # mean of the images' highest probabilities
    accuracy: float


class Misclassification(NamedTuple):
    """An image whose most probable label is not its own."""

    kind: str  # MOST_WRONG, MOST_CONFIDENT or `label_suspects.SUSPECT`
    key: str  # path below raw/
    label: str  # the image's label in the data
    predicted: str
    probability: float  # of the predicted label
    true_probability: float  # of `label`
    position: int  # among the images, from 0


class Measurements(NamedTuple):
    """The metrics of a model on the validation split."""

    overall: dict[str, float]  # the content of metrics.json
    classes: list[ClassMetrics]  # in the order of the class indexes, without labels that have no images
    confusion_matrix: np.ndarray | None  # int64 [k, k], row: true label; None: more than MAX_MATRIX labels
    confused_pairs: list[ConfusedPair]  # most images first
    calibration: list[CalibrationBin]  # from low to high, without empty bins
    misclassifications: list[Misclassification]  # up to SHOWN of each kind, worst first; an image may be in both kinds


def evaluate(predictions: Predictions, folder: Path, leaked: Sequence[int] | None = None) -> Measurements:
    """Measure predictions and write metrics.json, the tables (CSV, for people) and predictions.npz into `folder`.

    `leaked` holds the positions of the images that have a near-duplicate in training. None means that nobody looked
    for near-duplicates. Otherwise `overall` also has `leaks`, the number of these positions, and
    `accuracy_without_leaks`, the accuracy on all other images. If there are no other images, `accuracy_without_leaks`
    is missing.
    """
    measured = measure(predictions)
    if leaked is not None:
        others = np.delete(predictions.correct, leaked)
        without = {"accuracy_without_leaks": float(others.mean())} if len(others) else {}
        measured = measured._replace(overall=measured.overall | {"leaks": len(leaked)} | without)
    _write_tables(measured, predictions.labels, folder)
    evaluation_predictions.write(predictions, folder)
    return measured


def measure(predictions: Predictions) -> Measurements:
    """Compute all metrics. The predictions are for at least one image.

    `overall` has:
    - the accuracy
    - the unweighted means of precision, recall and F1 over the labels that have images; the mean recall is also the
      balanced accuracy
    - the share of images whose label is among the three most probable labels
    - the log loss in nats
    - the expected calibration error
    - the number of images

    A label without images has no row in `classes`. An image that is predicted as this label still counts as wrong.
    """
    if np.isnan(predictions.confidence).any():
        raise ValueError("the probabilities contain NaN")
    truth, predicted, labels = predictions.truth, predictions.predicted, predictions.labels
    occurring, support = np.unique(truth, return_counts=True)
    hits, answers = (
        np.bincount(each, minlength=len(labels))[occurring] for each in (truth[predictions.correct], predicted)
    )
    precision, recall, f1 = hits / np.maximum(answers, 1), hits / support, 2 * hits / (answers + support)
    bins = _bins(predictions.confidence, predictions.correct)
    overall = {
        "accuracy": float(predictions.correct.mean()),
        "balanced_accuracy": float(recall.mean()),
        "top_3_accuracy": float((predictions.true_ranks() < 3).mean()),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "log_loss": _log_loss(predictions.of_truth),
        "expected_calibration_error": sum(row.images * abs(row.confidence - row.accuracy) for row in bins) / len(truth),
        "images": len(truth),
    }
    names = [labels[index] for index in occurring]
    columns = (values.tolist() for values in (precision, recall, f1, support))
    classes = [ClassMetrics(*row) for row in zip(names, *columns, strict=True)]
    matrix = _confusion_matrix(predictions) if len(labels) <= MAX_MATRIX else None
    return Measurements(overall, classes, matrix, _confused_pairs(predictions), bins, _worst(predictions))


def _confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Return how many images of each label (rows) are predicted as each label (columns), int64 [k, k]."""
    classes = len(predictions.labels)
    cells = np.bincount(predictions.truth * classes + predictions.predicted, minlength=classes**2)
    return cells.reshape(classes, classes)


def _log_loss(of_truth: np.ndarray) -> float:
    """Return the mean log loss (nats) of the true labels' probabilities (float [n]).

    Probabilities below the epsilon of their float type count as this epsilon.

    `sklearn.metrics.log_loss` computes the same value, but it needs all probabilities and five times their memory.
    """
    return float(-np.log(np.maximum(of_truth, np.finfo(of_truth.dtype).eps), dtype=np.float64).mean())


def shares(matrix: np.ndarray) -> np.ndarray:
    """Return a confusion matrix (int [k, k]) as float64 with rows that sum to 1; an empty row stays 0."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _bins(confidence: np.ndarray, correct: np.ndarray) -> list[CalibrationBin]:
    """Sort the images by confidence into BINS of equal width, for the expected calibration error.

    In each bin, the mean confidence and the accuracy differ by some distance. The expected calibration error is the
    mean of these distances, weighted by the numbers of images. Source: Guo, Pleiss, Sun and Weinberger, "On Calibration
    of Modern Neural Networks", ICML 2017, equations 2 and 3, also with 15 bins.
    """
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        CalibrationBin(
            index / BINS,
            (index + 1) / BINS,
            int(inside.sum()),
            float(confidence[inside].mean()),
            float(correct[inside].mean()),
        )
        for index in range(BINS)
        if (inside := number == index).any()
    ]


def _confused_pairs(predictions: Predictions) -> list[ConfusedPair]:
    """Return the confused pairs. Time and memory grow with the images, not with the square of the labels."""
    labels, wrong = predictions.labels, ~predictions.correct
    pairs, counts = np.unique(predictions.truth[wrong] * len(labels) + predictions.predicted[wrong], return_counts=True)
    true, predicted = np.divmod(pairs, len(labels))
    share = counts / np.bincount(predictions.truth, minlength=len(labels))[true]
    place = np.argsort(np.argsort(np.array(labels, np.str_)))  # rank of each label in the order of the names
    order = np.lexsort((place[predicted], place[true], -share, -counts))
    columns = (values[order].tolist() for values in (true, predicted, counts, share))
    return [ConfusedPair(labels[one], labels[other], *rest) for one, other, *rest in zip(*columns, strict=True)]


def _worst(predictions: Predictions) -> list[Misclassification]:
    """Return the images with the least probable true labels, then those with the most probable predicted labels."""
    predicted, confidence, labels = predictions.predicted, predictions.confidence, predictions.labels
    of_true = predictions.of_truth
    wrong = np.flatnonzero(~predictions.correct)
    return [
        Misclassification(
            kind,
            predictions.keys[at],
            labels[predictions.truth[at]],
            labels[predicted[at]],
            float(confidence[at]),
            float(of_true[at]),
            int(at),
        )
        for kind, order in ((MOST_WRONG, of_true), (MOST_CONFIDENT, -confidence))
        for at in wrong[np.argsort(order[wrong], kind="stable")][:SHOWN]
    ]


def _write_tables(measured: Measurements, labels: Sequence[str], folder: Path) -> None:
    (folder / METRICS).write_text(json.dumps(measured.overall, indent=1) + "\n", encoding="utf-8")
    write_table(folder / "per_class.csv", ClassMetrics._fields, measured.classes)
    if (matrix := measured.confusion_matrix) is not None:
        header = ["true label", *labels]
        write_table(folder / "confusion_matrix.csv", header, _with_labels(labels, matrix))
        write_table(folder / "confusion_matrix_normalised.csv", header, _with_labels(labels, shares(matrix)))
    columns = ["true label", "predicted label", "images", "share"]
    write_table(folder / "confused_pairs.csv", columns, measured.confused_pairs)
    write_table(folder / "calibration.csv", CalibrationBin._fields, measured.calibration)
    columns = ["kind", "key", "true label", "predicted label", "probability", "probability of the true label"]
    write_table(folder / "mistakes.csv", [*columns, "position"], measured.misclassifications)


def _with_labels(labels: Sequence[str], rows: np.ndarray) -> Iterable[list[object]]:
    return ([label, *row] for label, row in zip(labels, rows.tolist(), strict=True))


def write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file for people. No spreadsheet takes a cell for a formula (see `manifest.to_cell`)."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(map(to_cell, row) for row in (header, *rows))
