"""A network and batches -> a trained model: the loop over epochs, its checkpoint, and `cnn` trained from records."""

import contextlib
import logging
import secrets
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import averaging, folders, model
from dgmd_pipeline.augmentation import Augmentation, augmented
from dgmd_pipeline.errors import PipelineError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from dgmd_pipeline.encoding import Fit

log = logging.getLogger(__name__)
STEPS = 50  # of an epoch of `cnn`, at least: with 12 it stayed 5 points behind on 1,500 photographs of 32 x 32 pixels
LEAST_BATCH = 16  # images; batch normalisation needs some
OPTIMIZERS = ("adam", "adamw", "sgd")


class Recipe(NamedTuple):
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


class Trained(NamedTuple):
    """A trained model with the weights of its last epoch; those of `cnn` are a mean over the epochs."""

    model: "keras.Model"  # a head for features, or a backbone with its head for records
    history: list[Epoch]  # every epoch that was run
    seed: int  # what makes this training repeatable on a CPU
    selection: dict[str, Any] | None = None  # how the head was chosen, for JSON: `head.about`


class Progress(NamedTuple):
    """How far a training has come: what a checkpoint holds."""

    seed: int
    history: list[Epoch]
    state: list[np.ndarray]  # the variables of the network, of dropout's random numbers and of the optimizer


def learning_rate_of(epoch: int, learning_rate: float, decay_rate: float) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return learning_rate / (1 + decay_rate * epoch)


def train_whole(
    training: Callable[[int, int], "tf.data.Dataset"],
    validation: "tf.data.Dataset",
    size: tuple[int, int],
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
    image_fit: "Fit" = "stretch",
) -> Trained:
    """Train the small network together with its head, from scratch, on pictures.

    A side is a dataset of (picture uint8 [height, width, 3], label int64 []) that knows its length. `training` is
    called with the seed and the epoch for one in an order that depends on these alone: TensorFlow mixes the seed that
    is set here into a dataset's own, so one that was opened earlier would depend on what the process did before. `size`
    is (height, width), `image_fit` how the model that comes back fits other sizes to it.
    The rest is as in `head.train_head`, but the model that comes back is the one to be served (`model.assemble`).
    """
    import keras
    import tensorflow as tf

    progress = begin(recipe, checkpoint)
    network = model.build_cnn(*size)
    head = model.build_head(network.output_shape[-1], classes, recipe.dropout)
    together = keras.Sequential([network, head])  # without the resizing: the records hold pictures of this size
    rest = validation.batch(recipe.batch_size).prefetch(tf.data.AUTOTUNE)

    def shuffled(epoch: int) -> "tf.data.Dataset":
        # A last batch of a few pictures would spoil batch normalisation's statistics just before they are used: batches
        # are made equal, and the few pictures that are then left over are others in each epoch.
        pictures = training(progress.seed, epoch)
        size = min(recipe.batch_size, max(len(pictures) // STEPS, LEAST_BATCH))
        even = len(pictures) // -(-len(pictures) // size)
        batches = pictures.batch(even, drop_remainder=True)
        return augmented(batches, recipe.augmentation, (progress.seed, epoch)).prefetch(tf.data.AUTOTUNE)

    weights = weights_by_class(classes, class_weights)
    show = shown(on_epoch, recipe.epochs)
    mean = averaging.mean_of_epochs(together)
    trained = fit(together, shuffled, rest, weights, recipe, progress, show, checkpoint, mean)
    mean.use_mean()
    return trained._replace(model=model.assemble(network, head, image_fit))


def begin(recipe: Recipe, checkpoint: Path | None) -> Progress:
    """Return how far the training of `checkpoint` has come, or its beginning; set the seed of Keras."""
    if checkpoint and checkpoint.exists():
        progress = _load(checkpoint)
    else:
        progress = Progress(secrets.randbits(31) if recipe.seed is None else recipe.seed, [], [])
    set_seed(progress.seed)
    return progress


def set_seed(seed: int) -> None:
    """Set the seed that a network's first weights come from."""
    import keras

    keras.utils.set_random_seed(seed)


def shown(on_epoch: Callable[[Epoch], None], epochs: int) -> Callable[[Epoch], None]:
    """Return a callback that logs each of so many epochs and then calls `on_epoch`."""

    def show(row: Epoch) -> None:
        log.info(
            "  epoch %d/%d: loss %.4f, accuracy %.4f, validation loss %.4f, accuracy %.4f",
            row.epoch + 1, epochs, row.loss, row.accuracy, row.val_loss, row.val_accuracy,
        )  # fmt: skip
        on_epoch(row)

    return show


def weights_by_class(classes: int, class_weights: dict[int, float]) -> np.ndarray:
    """Return the weight of each class index (float32 [classes]), 1 where `class_weights` has none."""
    weights = np.ones(classes, np.float32)
    for index, weight in class_weights.items():
        weights[index] = weight
    return weights


def _load(checkpoint: Path) -> Progress:
    with _readable(checkpoint) as file:
        state = [file[name] for name in file.files if name.startswith("state")]
        history = [Epoch(int(epoch), *rest) for epoch, *rest in file["history"].tolist()]
        return Progress(int(file["seed"]), history, state)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise unusable(path, error) from error


def _save(progress: Progress, checkpoint: Path) -> None:
    arrays = {"seed": np.array(progress.seed), "history": np.array(progress.history)}
    _write(checkpoint, arrays | {f"state{number}": values for number, values in enumerate(progress.state)})


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Diverged(PipelineError):
    """Weights or a loss are not finite."""


class UnusableCheckpoint(PipelineError):
    """A checkpoint is damaged or of another training: delete it to start again."""


def unusable(checkpoint: Path, error: Exception) -> UnusableCheckpoint:
    """Return what to say of a file that should hold the state of this training and does not."""
    return UnusableCheckpoint(
        f"{checkpoint} should hold the state of this training. It is damaged, or of another training "
        f"({type(error).__name__})."
    )


def prepare(network: "keras.Model", recipe: Recipe) -> list["keras.Variable"]:
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
    recipe: Recipe,
    progress: Progress,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
    callback: Any = None,
) -> Trained:
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
        folders.check_space(checkpoint.parent, "the training", size if history else 2 * size)
    if state:
        try:
            _assign(variables, state)
        except ValueError as error:
            raise unusable(checkpoint or Path(), error) from error
    by_class = tf.constant(class_weights)

    for epoch in range(len(history), recipe.epochs):
        rate = learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)
        network.optimizer.learning_rate = rate
        weighted = training(epoch).map(lambda x, y: (x, y, tf.gather(by_class, y)))
        # One epoch at a time, so that its order is its own whatever was before; shuffle: the data come shuffled.
        logs = network.fit(
            weighted, validation_data=validation, shuffle=False, verbose=0, callbacks=callback and [callback]
        ).history
        row = Epoch(epoch, **{name: value for name, [value] in logs.items()}, learning_rate=rate)
        values = values_of(variables)
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
            _save(Progress(seed, history, values), checkpoint)
        on_epoch(row)
    return Trained(network, history, seed)


def values_of(variables: Sequence["keras.Variable"]) -> list[np.ndarray]:
    """Return copies of the values of variables."""
    return [variable.numpy() for variable in variables]


def _assign(variables: Sequence["keras.Variable"], values: Sequence[np.ndarray]) -> None:
    for variable, each in zip(variables, values, strict=True):
        variable.assign(each)


def _optimizer(recipe: Recipe) -> Any:
    import keras

    if recipe.optimizer == "sgd":
        return keras.optimizers.SGD(recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    kind = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[recipe.optimizer]
    return kind(recipe.learning_rate, weight_decay=recipe.weight_decay)
