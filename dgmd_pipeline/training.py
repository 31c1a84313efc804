"""Features or records -> trained model."""

import math
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import model
from dgmd_pipeline.errors import PipelineError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")


class Recipe(NamedTuple):
    """How to train. The learning rate of epoch e (from 0) is learning_rate / (1 + decay_rate * e)."""

    batch_size: int
    epochs: int  # at most
    learning_rate: float
    decay_rate: float
    patience: int  # epochs without a better validation accuracy before it stops
    optimizer: str  # one of OPTIMIZERS
    dropout: float  # 0 to below 1, after each hidden layer of the head
    weight_decay: float
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
    """A trained model with the weights of its best epoch."""

    model: "keras.Model"  # a head for features, or a backbone with its head for records
    history: list[Epoch]  # every epoch that was run
    kept: int  # the epoch whose weights these are
    seed: int  # what makes this training repeatable on a CPU


def learning_rate_of(epoch: int, learning_rate: float, decay_rate: float) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return learning_rate / (1 + decay_rate * epoch)


def train_head(
    training: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    """Train a head on stored features: pairs of features (float32 [n, d], may be mapped from disk) and labels (int64 [n])."""
    seed = _seed(recipe)
    head = model.build_head(training[0].shape[1], classes, recipe.dropout)
    shuffled = _batches(*training, recipe.batch_size, np.random.default_rng(seed))
    return _fit(head, shuffled, _batches(*validation, 1024), classes, class_weights, recipe, seed, on_epoch)


def train_whole(
    training: "tf.data.Dataset",
    validation: "tf.data.Dataset",
    size: tuple[int, int],
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    """Train the small network and its head from scratch on records: datasets of (picture uint8 [height, width, 3], label index).

    `training` comes shuffled, in another order each time it is read. `size` is (height, width). The model that comes back takes pictures of any size (`model.assemble`).
    """
    import keras
    import tensorflow as tf

    seed = _seed(recipe)
    network = model.build_cnn(*size)
    head = model.build_head(network.output_shape[-1], classes, recipe.dropout)
    together = keras.Sequential([network, head])  # the records hold pictures of this size: nothing to resize in training
    shuffled, rest = (side.batch(recipe.batch_size).prefetch(tf.data.AUTOTUNE) for side in (training, validation))
    trained = _fit(together, shuffled, rest, classes, class_weights, recipe, seed, on_epoch)
    return trained._replace(model=model.assemble(network, head))


def _seed(recipe: Recipe) -> int:
    import keras

    seed = secrets.randbits(31) if recipe.seed is None else recipe.seed
    keras.utils.set_random_seed(seed)
    return seed


def _batches(
    features: np.ndarray, labels: np.ndarray, batch_size: int, shuffle: np.random.Generator | None = None
) -> "tf.data.Dataset":
    """Batches read from disk as they are needed, in another order each time where `shuffle` is given."""
    import tensorflow as tf

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.arange(len(labels)) if shuffle is None else shuffle.permutation(len(labels))
        for start in range(0, len(order), batch_size):
            chosen = np.sort(order[start : start + batch_size])  # in the order of the file
            yield features[chosen], labels[chosen]

    spec = (tf.TensorSpec([None, features.shape[1]], tf.float32), tf.TensorSpec([None], tf.int64))
    batched = tf.data.Dataset.from_generator(batches, output_signature=spec)
    return batched.apply(tf.data.experimental.assert_cardinality(-(-len(labels) // batch_size))).prefetch(2)


def _fit(
    network: "keras.Model",
    training: "tf.data.Dataset",
    validation: "tf.data.Dataset",
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    import keras
    import tensorflow as tf

    by_class = np.ones(classes, np.float32)
    for index, weight in class_weights.items():
        by_class[index] = weight
    by_class_tensor = tf.constant(by_class)
    weighted = training.map(lambda x, y: (x, y, tf.gather(by_class_tensor, y)))

    # XLA on a CPU is several times slower, and Keras's "auto" would choose it.
    network.compile(
        optimizer=_optimizer(recipe), loss="sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    history: list[Epoch] = []
    best: list[Any] = []
    kept = 0

    def begin(epoch: int, logs: dict | None = None) -> None:  # noqa: ARG001
        network.optimizer.learning_rate = learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)

    def end(epoch: int, logs: dict[str, float]) -> None:
        nonlocal best, kept
        rate = learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)
        row = Epoch(epoch, logs["accuracy"], logs["loss"], logs["val_accuracy"], logs["val_loss"], rate)
        if not math.isfinite(row.loss) or not math.isfinite(row.val_loss):
            raise PipelineError(
                f"Training came to a loss of {row.loss} (validation {row.val_loss}) in epoch {epoch + 1}, where a number "
                f"was expected; try a LEARNING_RATE lower than {recipe.learning_rate:g}."
            )
        history.append(row)
        on_epoch(row)
        if len(history) == 1 or _better(row, history[kept]):
            kept, best = epoch, network.get_weights()
        elif epoch - kept >= recipe.patience:
            network.stop_training = True

    network.fit(
        weighted,
        validation_data=validation,
        epochs=recipe.epochs,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=end)],
        shuffle=False,  # the data come shuffled
        verbose=0,
    )
    network.set_weights(best)
    return Trained(network, history, kept, seed)


def _better(row: Epoch, best: Epoch) -> bool:
    """Higher validation accuracy, and at the same accuracy, which is frequent on small validation sides, lower loss."""
    return (row.val_accuracy, -row.val_loss) > (best.val_accuracy, -best.val_loss)


def _optimizer(recipe: Recipe) -> Any:
    import keras

    if recipe.optimizer == "sgd":
        return keras.optimizers.SGD(recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    kinds = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW, "rmsprop": keras.optimizers.RMSprop}
    return kinds[recipe.optimizer](recipe.learning_rate, weight_decay=recipe.weight_decay)
