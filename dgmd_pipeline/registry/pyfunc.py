"""A registered model's folder -> the Python function that MLflow's consumers call.

This file is stored with each registered model and is loaded without this package: it imports nothing of it.
MLflow's own function for Keras models prints a progress bar for each call and takes no argument against it.
"""

from pathlib import Path
from typing import Any

import keras


class Quiet:
    """A Keras model that predicts without printing."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def get_raw_model(self) -> keras.Model:
        """Return the Keras model; MLflow's `unwrap_python_model` and similar calls use it."""
        return self.model

    def predict(self, images: Any) -> Any:
        """Return probabilities (float32 [n, classes]) for images (uint8 [n, height, width, 3])."""
        return self.model.predict(images, verbose=0)


def _load_pyfunc(path: str) -> Quiet:
    return Quiet(keras.saving.load_model(Path(path) / "data" / "model.keras"))
