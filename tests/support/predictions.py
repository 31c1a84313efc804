"""Predicted labels and comparisons for tests."""

import numpy as np

from dgmd_pipeline.evaluation.comparison import compare
from dgmd_pipeline.evaluation.predictions import PredictedLabels


def predictions_of(predicted, truth, labels):
    """Predicted and true labels, which are given by name."""
    return PredictedLabels(*(np.array([labels.index(name) for name in names]) for names in (predicted, truth)), labels)


def compare_flags(correct, production_correct):
    """A comparison with production, version 7, on images of one label that each model gets right or not."""
    candidate, production = (
        predictions_of(["a" if each else "b" for each in flags], ["a"] * len(flags), ["a", "b"])
        for flags in (correct, production_correct)
    )
    return compare(candidate, production, version=7)
