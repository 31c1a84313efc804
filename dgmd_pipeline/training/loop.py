"""Trains a network, one epoch at a time."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import percent
from dgmd_pipeline.training import optimizers
from dgmd_pipeline.training.checkpoint import TrainingState, save_state, unusable_checkpoint
from dgmd_pipeline.training.config import Epoch, OnEpoch, TrainedModel, TrainingConfig, learning_rate_of
from dgmd_pipeline.workflow import disk

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from dgmd_pipeline.training.averaging import AveragingCallback

log = logging.getLogger(__name__)


class Diverged(PipelineError):
    """The weights or a loss are not finite."""


def log_epochs(on_epoch: OnEpoch, epochs: int) -> OnEpoch:
    """Return a callback that logs an epoch and then calls `on_epoch`. The training has `epochs` epochs."""

    def log_epoch(row: Epoch) -> None:
        log.info(
            "  epoch %d/%d: loss %.4f, accuracy %s, validation loss %.4f, validation accuracy %s",
            row.epoch + 1, epochs, row.loss, percent(row.accuracy), row.val_loss, percent(row.val_accuracy),
        )  # fmt: skip
        on_epoch(row)

    return log_epoch


def prepare(network: "keras.Model", config: TrainingConfig) -> list["keras.Variable"]:
    """Compile a network unless it is already compiled, and return all variables that training changes.

    After each compilation, TensorFlow traces the network again, which takes longer than training a small head.
    """
    if not network.compiled:
        # With the default of `jit_compile`, Keras would choose XLA, which is several times slower on a CPU.
        network.compile(
            optimizer=optimizers.build(config), loss="sparse_categorical_crossentropy", metrics=["accuracy"],
            jit_compile=False,
        )  # fmt: skip
        network.optimizer.build(network.trainable_variables)
    # `variables` includes the state of dropout's random numbers; `weights` does not.
    return [*network.variables, *network.optimizer.variables]


def fit(
    network: "keras.Model",
    training: Callable[[int], "tf.data.Dataset"],
    val_batches: "tf.data.Dataset",
    class_weights: np.ndarray,
    config: TrainingConfig,
    state: TrainingState,
    on_epoch: OnEpoch,
    checkpoint: Path | None = None,
    callback: "AveragingCallback | None" = None,
) -> TrainedModel:
    """Train a network that returns probabilities. Each epoch uses Keras's `fit`. See `run`.

    `training` returns the batches (inputs, labels int64) of an epoch, in that epoch's order. After each epoch, the
    network is measured on `val_batches`, which do not affect the training. `class_weights` (float32 [classes]) weigh
    the training loss. `callback.variables` become part of the state that is saved.
    """
    import tensorflow as tf

    weights = tf.constant(class_weights)

    def run_epoch(epoch: int) -> dict[str, float]:
        weighted = training(epoch).map(lambda inputs, labels: (inputs, labels, tf.gather(weights, labels)))
        # Keras gets one epoch at a time, so the order of an epoch does not depend on earlier epochs.
        logs = network.fit(
            weighted, validation_data=val_batches, shuffle=False, verbose=0, callbacks=[callback] if callback else None
        ).history
        return {name: value for name, [value] in logs.items()}

    return run(network, run_epoch, config, state, on_epoch, checkpoint, callback.variables if callback else ())


def run(
    network: "keras.Model",
    run_epoch: Callable[[int], dict[str, float]],
    config: TrainingConfig,
    state: TrainingState,
    on_epoch: OnEpoch,
    checkpoint: Path | None = None,
    more_variables: Sequence["keras.Variable"] = (),
) -> TrainedModel:
    """Train a network from `state` until `config.epochs` epochs are completed, including those in `state`.

    `run_epoch` gets the number of an epoch, counted from 0. It trains one epoch with the optimizer's current learning
    rate, and returns a dict of the epoch's losses and accuracies, with the names of fields of Epoch as keys. After each
    epoch, this function saves the state, including `more_variables`, in `checkpoint`. Then it calls `on_epoch`.

    Raises Diverged if the weights or a loss are not finite, and UnusableCheckpoint if `state` does not fit the network.
    """
    variables = [*prepare(network, config), *more_variables]
    history = state.history
    if checkpoint:  # the previous checkpoint is kept until the next one is complete
        size = sum(variable.numpy().nbytes for variable in variables)
        disk.check_space(checkpoint.parent, "the training", size if history else 2 * size)
    if state.values:
        _restore(variables, state.values, checkpoint)
    for epoch in range(len(history), config.epochs):
        rate = learning_rate_of(epoch, config.learning_rate, config.decay_rate)
        network.optimizer.learning_rate = rate
        row = Epoch(epoch, **run_epoch(epoch), learning_rate=rate)
        values = variable_values(variables)
        _check_finite(row, values, config)
        history.append(row)
        if checkpoint:
            save_state(TrainingState(state.seed, history, values), checkpoint)
        on_epoch(row)
    return TrainedModel(network, history, state.seed)


def _check_finite(row: Epoch, values: Sequence[np.ndarray], config: TrainingConfig) -> None:
    # The losses may be finite although weights are not, because ReLU turns NaN into 0.
    if not np.isfinite([row.loss, row.val_loss]).all() or not all(np.isfinite(each).all() for each in values):
        raise Diverged(
            f"The weights or a loss are not finite numbers after epoch {row.epoch + 1} (loss {row.loss:g}, "
            f"validation {row.val_loss:g}). Try a learning rate lower than {config.learning_rate:g}: "
            "LEARNING_RATE, or FINE_TUNE_LEARNING_RATE for fine-tuning."
        )


def variable_values(variables: Sequence["keras.Variable"]) -> list[np.ndarray]:
    """Return copies of the values of variables."""
    return [variable.numpy() for variable in variables]


def _restore(variables: Sequence["keras.Variable"], values: Sequence[np.ndarray], checkpoint: Path | None) -> None:
    try:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    except ValueError as error:
        raise unusable_checkpoint(checkpoint or Path(), error) from error
