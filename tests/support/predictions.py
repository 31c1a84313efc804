"""Predictions and comparisons for tests."""

import numpy as np

from dgmd_pipeline.evaluation.comparison import compare
from dgmd_pipeline.evaluation.predictions import Predictions


def predictions_of(predicted, truth, labels, high=0.9):
    """Predictions with the probability `high` for each predicted label; all labels are given by name."""
    probabilities = np.full((len(predicted), len(labels)), (1 - high) / (len(labels) - 1))
    for row, label in enumerate(predicted):
        probabilities[row, labels.index(label)] = high
    keys = [f"{label}/{row}.jpg" for row, label in enumerate(truth)]
    return Predictions(probabilities, np.array([labels.index(label) for label in truth]), labels, keys)


def compare_flags(correct, production_correct):
    """A comparison with production, version 7, on images of one label that each model gets right or not."""
    candidate, production = (
        predictions_of(["a" if each else "b" for each in flags], ["a"] * len(flags), ["a", "b"])
        for flags in (correct, production_correct)
    )
    return compare(candidate, production, version=7)
