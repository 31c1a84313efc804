"""Stored features -> a head of a given kind with given settings."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.training import features, linear, loop, networks, runtime
from dgmd_pipeline.training.checkpoint import TrainingState
from dgmd_pipeline.training.config import Epoch, OnEpoch, TrainedModel, TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


@runtime.one_blas_thread
def fit_linear(
    data: LabeledFeatures,
    validation: LabeledFeatures,
    class_weights: np.ndarray,
    shrinkage: float,
    strength: float,
    seed: int,
) -> TrainedModel:
    """Fit a logistic regression (see `linear`) and measure it on `validation`; its history is one epoch."""
    vectors, labels = data
    basis = linear.build_basis(linear.principal_components(vectors), shrinkage)
    kernel, bias = linear.unproject(linear.fit(vectors, labels, class_weights, basis, strength), basis)
    loss, accuracy = linear.evaluate(vectors, labels, kernel, bias, class_weights)
    val_loss, val_accuracy = linear.evaluate(*validation, kernel, bias, None)
    row = Epoch(0, accuracy, loss, val_accuracy, val_loss, 0.0)
    return TrainedModel(networks.build_linear_head(kernel, bias), [row], seed)


def fit_hidden(
    data: LabeledFeatures,
    held_out: LabeledFeatures,
    class_weights: np.ndarray,
    config: TrainingConfig,
    state: TrainingState,
    on_epoch: OnEpoch,
    checkpoint: Path | None = None,
    network: "keras.Model | None" = None,
) -> TrainedModel:
    """Fit a head with hidden layers until it has had `config.epochs` epochs, starting from `state`: see `loop.fit`.

    `network` is a head that TensorFlow has traced already; `state` then holds its initial values. None builds one.
    """
    if network is None:
        runtime.set_seed(state.seed)
        network = build_hidden(data, len(class_weights), config)

    def shuffled_batches(epoch: int) -> "tf.data.Dataset":
        return features.read_batches(data, config.batch_size, (state.seed, epoch))

    val_batches = features.read_batches(held_out, config.batch_size)
    return loop.fit(network, shuffled_batches, val_batches, class_weights, config, state, on_epoch, checkpoint)


def build_hidden(data: LabeledFeatures, classes: int, config: TrainingConfig) -> "keras.Model":
    """Build a head with hidden layers that standardises vectors with the mean and deviation of `data`."""
    mean, deviation = linear.mean_and_deviation(data.vectors)
    return networks.build_head(data.vectors.shape[1], classes, config.dropout, mean, deviation)
