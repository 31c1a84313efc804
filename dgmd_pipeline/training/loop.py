"""A network and batches -> a trained model, one epoch at a time."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import checkpoint as training_checkpoint
from dgmd_pipeline.training import config
from dgmd_pipeline.training.checkpoint import TrainingState
from dgmd_pipeline.training.config import Epoch, TrainedModel, TrainingConfig
from dgmd_pipeline.workflow import disk

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

log = logging.getLogger(__name__)


def log_epochs(on_epoch: Callable[[Epoch], None], epochs: int) -> Callable[[Epoch], None]:
    """Return a callback that logs each of so many epochs and then calls `on_epoch`."""

    def show(row: Epoch) -> None:
        log.info(
            "  epoch %d/%d: loss %.4f, accuracy %.4f, validation loss %.4f, accuracy %.4f",
            row.epoch + 1, epochs, row.loss, row.accuracy, row.val_loss, row.val_accuracy,
        )  # fmt: skip
        on_epoch(row)

    return show


class Diverged(PipelineError):
    """Weights or a loss are not finite."""


def prepare(network: "keras.Model", recipe: TrainingConfig) -> list["keras.Variable"]:
    """Compile a network if it is not compiled yet; return all variables that training changes.

    TensorFlow traces a compiled network once, which takes longer than to train a small head.
    """
    if not network.compiled:
        # XLA on a CPU is several times slower, and Keras's "auto" would choose it.
        network.compile(
            optimizer=_optimizer(recipe), loss="sparse_categorical_crossentropy", metrics=["accuracy"],
            jit_compile=False,
        )  # fmt: skip
        network.optimizer.build(network.trainable_variables)
    # Among the network's variables is the state of dropout's random numbers, which is no weight.
    return [*network.variables, *network.optimizer.variables]


def fit(
    network: "keras.Model",
    training: Callable[[int], "tf.data.Dataset"],
    validation: "tf.data.Dataset",
    class_weights: np.ndarray,
    recipe: TrainingConfig,
    progress: TrainingState,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
    callback: Any = None,
) -> TrainedModel:
    """Train a network that ends in probabilities for `recipe.epochs` epochs, or from `progress` to there.

    `training` returns the batches (inputs, labels int64) of an epoch, in its order; `validation` is measured after
    each epoch and decides nothing. `class_weights` (float32 [classes]) weigh the training loss. `on_epoch` is called
    after each epoch and may raise to stop; the state is in `checkpoint` by then. `callback` is one of Keras, with a
    list `variables` that becomes part of the state.

    Raises Diverged where weights or a loss are not finite, UnusableCheckpoint where `progress` does not fit.
    """
    import tensorflow as tf

    variables = prepare(network, recipe) + (callback.variables if callback else [])
    seed, history, state = progress
    if checkpoint:  # the next one is written beside the last one
        size = sum(variable.numpy().nbytes for variable in variables)
        disk.check_space(checkpoint.parent, "the training", size if history else 2 * size)
    if state:
        try:
            _assign(variables, state)
        except ValueError as error:
            raise training_checkpoint.unusable_checkpoint(checkpoint or Path(), error) from error
    by_class = tf.constant(class_weights)

    for epoch in range(len(history), recipe.epochs):
        rate = config.learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)
        network.optimizer.learning_rate = rate
        weighted = training(epoch).map(lambda x, y: (x, y, tf.gather(by_class, y)))
        # One epoch at a time, so that its order is its own whatever was before; shuffle: the data come shuffled.
        logs = network.fit(
            weighted, validation_data=validation, shuffle=False, verbose=0, callbacks=callback and [callback]
        ).history
        row = Epoch(epoch, **{name: value for name, [value] in logs.items()}, learning_rate=rate)
        values = variable_values(variables)
        # The weights too: ReLU makes 0 of what is not a number, and the loss looks like one.
        numbers: list[Any] = [row.loss, row.val_loss, *values]
        if not all(np.isfinite(each).all() for each in numbers):
            raise Diverged(
                f"Training came to weights or a loss that are not numbers in epoch {epoch + 1} (loss {row.loss:g}, "
                f"validation {row.val_loss:g}). Try a learning rate lower than {recipe.learning_rate:g}: "
                "LEARNING_RATE, or FINE_TUNE_LEARNING_RATE for fine-tuning."
            )
        history.append(row)
        if checkpoint:
            training_checkpoint.save(TrainingState(seed, history, values), checkpoint)
        on_epoch(row)
    return TrainedModel(network, history, seed)


def variable_values(variables: Sequence["keras.Variable"]) -> list[np.ndarray]:
    """Return copies of the values of variables."""
    return [variable.numpy() for variable in variables]


def _assign(variables: Sequence["keras.Variable"], values: Sequence[np.ndarray]) -> None:
    for variable, each in zip(variables, values, strict=True):
        variable.assign(each)


def _optimizer(recipe: TrainingConfig) -> Any:
    import keras

    if recipe.optimizer == "sgd":
        return keras.optimizers.SGD(recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    kind = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[recipe.optimizer]
    return kind(recipe.learning_rate, weight_decay=recipe.weight_decay)
