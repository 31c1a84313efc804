"""The configuration, the epochs and the result of a training."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline.training.augmentation import Augmentation

if TYPE_CHECKING:
    import keras

    from dgmd_pipeline.training.head_selection import Selection

OPTIMIZERS = ("adam", "adamw", "sgd")


class TrainingConfig(NamedTuple):
    """How to train. The learning rate of epoch e (from 0) is learning_rate / (1 + decay_rate * e).

    `cnn` is a small network that is trained from random weights.
    """

    batch_size: int  # maximum number of images in a batch; for few images, `cnn` uses smaller batches (`from_scratch`)
    epochs: int  # number of epochs for `cnn`; maximum number for a head with hidden layers
    learning_rate: float
    decay_rate: float
    patience: int  # cross-validation stops training a head when this number of epochs has not lowered the held-out loss
    optimizer: str  # one of OPTIMIZERS
    dropout: float  # dropout rate after each hidden layer of the head; from 0 to below 1
    weight_decay: float
    augmentation: Augmentation = "none"  # random changes of the training images; only for `cnn`
    seed: int | None = None  # None: each training gets a random seed


class Epoch(NamedTuple):
    """The metrics of an epoch. Losses are cross-entropies in nats; class weights apply to the training loss only."""

    epoch: int  # from 0
    accuracy: float
    loss: float
    val_accuracy: float
    val_loss: float
    learning_rate: float


OnEpoch = Callable[[Epoch], None]  # called after each epoch; an exception that it raises stops the training


class TrainedModel(NamedTuple):
    """A trained model with the weights of its last epoch; for `cnn`, with the moving mean of the weights."""

    model: "keras.Model"  # a head for stored features; for `cnn`, the servable model
    history: list[Epoch]  # every epoch, including epochs before an interruption
    seed: int  # makes this training repeatable on a CPU
    selection: "Selection | None" = None  # how cross-validation chose the head; None for `cnn`


def learning_rate_of(epoch: int, learning_rate: float, decay_rate: float) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return learning_rate / (1 + decay_rate * epoch)


def weights_by_class(classes: int, class_weights: Mapping[int, float]) -> np.ndarray:
    """Return the weight of each class index (float32 [classes]). A class without a given weight has the weight 1."""
    weights = np.ones(classes, np.float32)
    for index, weight in class_weights.items():
        weights[index] = weight
    return weights
