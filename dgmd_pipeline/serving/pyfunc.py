"""The Python function of a registered model, which MLflow calls.

A registered model carries this module (see `source`). MLflow imports the module in the consumer's process.
MLflow's own function for Keras models takes arrays only, and prints a progress bar at each call.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from dgmd_pipeline.serving import inputs


class InvalidInput(MlflowException):
    """The input of a request is not what the model accepts. MLflow's server answers with the status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Return the server's answer without the input, which MLflow would otherwise put before the message."""
        self.message = str(self)
        return super().serialize_as_json()


class ServedModel:
    """A Keras model that also accepts image files, and can return labels."""

    def __init__(self, network: keras.Model, labels: Sequence[str]) -> None:
        """Take a servable model (see `inputs.input_size`), and the labels in the order of the model's outputs."""
        self.network, self.labels = network, labels

    def get_raw_model(self) -> keras.Model:
        """Return the Keras model, for MLflow's `get_raw_model`."""
        return self.network

    def predict(
        self,
        values: Any,  # see `inputs.to_batch`
        params: Mapping[str, Any] | None = None,
    ) -> np.ndarray | list[list[dict[str, str | float]]]:
        """Return the probabilities of all labels for each image: float32 [images, labels].

        With the parameter `top_k` above 0, return for each image the `top_k` most probable labels, the most probable
        first, as [{"label": "cloves", "probability": 0.93}, ...]. Raises InvalidInput.
        """
        top_k = (params or {}).get("top_k") or 0
        if top_k < 0:
            raise InvalidInput(f"Expected the number of labels for each image as `top_k`, 0 or more; found {top_k}.")
        try:
            batch = inputs.to_batch(values, self.network)
        except inputs.InvalidImage as error:
            raise InvalidInput(str(error)) from error
        probabilities = self.network.predict(batch, verbose=0)
        if not top_k:
            return probabilities
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [{"label": self.labels[index], "probability": float(row[index])} for index in order]
            for row, order in zip(probabilities, best, strict=True)
        ]


def _load_pyfunc(path: str) -> ServedModel:
    mapping = json.loads(Path(path, "mapping.json").read_text("utf-8"))
    labels = [mapping[str(index)] for index in range(len(mapping))]
    return ServedModel(keras.saving.load_model(Path(path) / "data" / "model.keras"), labels)
