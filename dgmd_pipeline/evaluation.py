"""Model and records -> measurements: how good it is on validation pictures, each counted once."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

METRICS = "metrics.json"
PER_CLASS = "per_class.csv"
CONFUSION = "confusion_matrix.csv"
PREDICTIONS = "predictions.npz"


def predict(network: "keras.Model", pictures: "tf.data.Dataset", batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities (float32 [n, classes]) and true indexes (int64 [n]) of a dataset of (picture, index)."""
    batches = [(network.predict_on_batch(x), y.numpy()) for x, y in pictures.batch(batch).prefetch(2)]
    probabilities, truth = zip(*batches, strict=True)
    return np.concatenate(probabilities), np.concatenate(truth)


def predict_head(network: "keras.Model", features: np.ndarray, batch: int = 1024) -> np.ndarray:
    """Return the probabilities (float32 [n, classes]) of stored features (float32 [n, d]), by the network's head alone.

    The frozen backbone has been through these pictures already; what is left to do is the head.
    """
    head = network.get_layer("head")
    starts = range(0, len(features), batch)
    return np.concatenate([head.predict_on_batch(np.asarray(features[start : start + batch])) for start in starts])


def evaluate(probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str], folder: Path) -> dict[str, float]:
    """Write the measurements into `folder` and return the overall ones.

    `probabilities` is float [n, classes], `truth` int [n] of class indexes, `labels` the name of each index.
    `metrics.json` holds accuracy, the unweighted means of precision, recall and F1 over the classes that occur, log
    loss (nats) and the number of images; `per_class.csv` those of each class; `confusion_matrix.csv` counts with the
    true label in the row and the predicted one in the column; `predictions.npz` the two arrays.
    A label without validation images has no row of its own, and counts only where it was predicted.
    """
    from sklearn import metrics

    predicted = probabilities.argmax(axis=1)
    occurring = np.unique(truth)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, predicted, labels=occurring, zero_division=0
    )
    overall = {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "log_loss": float(metrics.log_loss(truth, probabilities, labels=np.arange(len(labels)))),
        "images": len(truth),
    }
    (folder / METRICS).write_text(json.dumps(overall, indent=1) + "\n", encoding="utf-8")
    rows = zip((labels[index] for index in occurring), precision, recall, f1, support, strict=True)
    _table(folder / PER_CLASS, ["label", "precision", "recall", "f1", "images"], rows)
    matrix = metrics.confusion_matrix(truth, predicted, labels=np.arange(len(labels)))
    _table(
        folder / CONFUSION,
        ["true label", *labels],
        ([labels[index], *counts] for index, counts in enumerate(matrix.tolist())),
    )
    np.savez_compressed(folder / PREDICTIONS, probabilities=probabilities.astype(np.float32), truth=truth)
    return overall


def _table(path: Path, header: Sequence[str], rows: object) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)  # type: ignore[arg-type]
