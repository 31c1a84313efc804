"""A model and images -> `Predictions`: probabilities beside the true labels; and their file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.training.vectors import Vectors

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

PREDICTIONS = "predictions.npz"


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's probabilities for n labelled images."""

    probabilities: np.ndarray  # float [n, classes]
    truth: np.ndarray  # int64 [n], class index of the true label
    labels: Sequence[str]  # by class index
    keys: Sequence[str]  # path of each image below raw/

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.truth)

    @property
    def predicted(self) -> np.ndarray:
        """Return the class index with the highest probability, int64 [n]; the first one of equals."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Return whether the predicted label is the true one, bool [n]."""
        return self.predicted == self.truth

    @property
    def confidence(self) -> np.ndarray:
        """Return the probability of the predicted label, float [n]."""
        return self.probabilities.max(axis=1)

    @property
    def true_labels(self) -> np.ndarray:
        """Return the names of the true labels, str [n]."""
        return np.array(self.labels)[self.truth]


def predict(network: "keras.Model", images: "tf.data.Dataset", batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Predict a dataset of (image uint8 [height, width, 3], class index).

    Returns the probabilities (float32 [n, classes]) and the class indexes (int64 [n]), in the dataset's order.
    """
    batches = [(network.predict_on_batch(x), y.numpy()) for x, y in images.batch(batch).prefetch(2)]
    probabilities, truth = zip(*batches, strict=True)
    return np.concatenate(probabilities), np.concatenate(truth)


def predict_head(network: "keras.Model", features: Vectors, batch: int = 1024) -> np.ndarray:
    """Return the probabilities (float32 [n, classes]) of stored features (float32 [n, d]).

    The features are the output of the frozen backbone, so only the network's head runs.
    """
    head = network.get_layer("head")
    starts = range(0, len(features), batch)
    return np.concatenate([head.predict_on_batch(np.asarray(features[start : start + batch])) for start in starts])


def write(predictions: Predictions, folder: Path) -> None:
    """Write `predictions.npz`: probabilities (float32), truth (int64) and keys (fixed-width Unicode)."""
    np.savez_compressed(
        folder / PREDICTIONS,
        probabilities=predictions.probabilities.astype(np.float32),
        truth=predictions.truth.astype(np.int64),
        keys=np.array(predictions.keys, dtype=np.str_),
    )


def read(folder: Path, labels: Sequence[str]) -> Predictions:
    """Return what `write` wrote. The file does not hold the labels: give them by class index."""
    with np.load(folder / PREDICTIONS, allow_pickle=False) as file:
        return Predictions(file["probabilities"], file["truth"], labels, file["keys"].tolist())
