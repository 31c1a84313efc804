"""A model and images -> predicted probabilities."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

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


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the probabilities (float32 [n, classes]), the truth (int64 [n]) and the keys that `evaluate` wrote."""
    with np.load(folder / PREDICTIONS, allow_pickle=False) as kept:
        return kept["probabilities"], kept["truth"], kept["keys"].tolist()
