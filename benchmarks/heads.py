"""Train a head on stored features with the package's function and the default settings, without a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.settings import Settings
from dgmd_pipeline.training import config, head

if TYPE_CHECKING:
    import keras


def train(
    learned: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    groups: Sequence[str],
    classes: int,
    class_weights: dict[int, float],
    seed: int,
) -> "keras.Model":
    """Train a head on pairs of features (float32 [n, d]) and labels (int64 [n]), `groups` as in `head.train_head`."""
    defaults = {name: Settings.model_fields[name].default for name in config.TrainingConfig._fields}
    recipe = config.TrainingConfig(**{**defaults, "seed": seed})
    kind = Settings.model_fields["head"].default
    return head.train_head(learned, validation, groups, classes, class_weights, recipe, kind, lambda _: None).model
