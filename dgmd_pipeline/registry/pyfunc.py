"""A registered model's folder -> the Python function that MLflow calls.

MLflow stores this file with each registered model and loads it without this package, so it imports nothing of it.
MLflow's own function for Keras models prints a progress bar at each call, and no argument turns it off.
"""

from pathlib import Path

import keras
import numpy as np


class Quiet:
    """A Keras model that predicts without printing."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def get_raw_model(self) -> keras.Model:
        """Return the Keras model, for MLflow's `unwrap_python_model` and similar calls."""
        return self.model

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities (float32 [n, classes]) for images (uint8 [n, height, width, 3])."""
        return self.model.predict(images, verbose=0)


def _load_pyfunc(path: str) -> Quiet:
    return Quiet(keras.saving.load_model(Path(path) / "data" / "model.keras"))
