"""How to train, and what a training returns."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline.training.augmentation import Augmentation

if TYPE_CHECKING:
    import keras

OPTIMIZERS = ("adam", "adamw", "sgd")


class TrainingConfig(NamedTuple):
    """How to train. The learning rate of epoch e (from 0) is learning_rate / (1 + decay_rate * e)."""

    batch_size: int  # `cnn`: at most, an epoch has at least STEPS steps where LEAST_BATCH allows it
    epochs: int  # the head on stored features: at most
    learning_rate: float
    decay_rate: float
    patience: int  # epochs without a lower held-out loss before cross-validation stops
    optimizer: str  # one of OPTIMIZERS
    dropout: float  # 0 to below 1, after each hidden layer of the head
    weight_decay: float
    augmentation: Augmentation = "none"  # of the images that `cnn` is trained on
    seed: int | None = None  # None: another one each time


class Epoch(NamedTuple):
    """What an epoch came to. Losses are cross-entropies in nats, that of training weighted by class."""

    epoch: int  # from 0
    accuracy: float
    loss: float
    val_accuracy: float
    val_loss: float
    learning_rate: float


class TrainedModel(NamedTuple):
    """A trained model with the weights of its last epoch; those of `cnn` are a mean over the epochs."""

    model: "keras.Model"  # a head for features, or a backbone with its head for records
    history: list[Epoch]  # every epoch that was run
    seed: int  # what makes this training repeatable on a CPU
    selection: dict[str, Any] | None = None  # how the head was chosen, for JSON: `head.about`


def learning_rate_of(epoch: int, learning_rate: float, decay_rate: float) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return learning_rate / (1 + decay_rate * epoch)


def weights_by_class(classes: int, class_weights: dict[int, float]) -> np.ndarray:
    """Return the weight of each class index (float32 [classes]), 1 where `class_weights` has none."""
    weights = np.ones(classes, np.float32)
    for index, weight in class_weights.items():
        weights[index] = weight
    return weights
