"""Features or records -> trained model."""

import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import model
from dgmd_pipeline.errors import PipelineError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

OPTIMIZERS = ("adam", "adamw", "sgd")
WHITENING_ROWS = 20_000  # a few for each of at most 2,048 dimensions


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
    """Train a head on stored features.

    A side is a pair of features (float32 [n, d], possibly mapped from disk: no more than a batch is read at a time) and
    labels (int64 [n], 0 to `classes` - 1; a class may be missing). `class_weights` are by label index, 1 where there is
    none; they weigh the training's loss alone. `on_epoch` is called at the end of each epoch.
    Raises PipelineError where the loss or the weights cease to be numbers.
    """
    seed = _seed(recipe)
    head = model.build_head(training[0].shape[1], classes, recipe.dropout, whitening(training[0]))
    shuffled = _batches(*training, recipe.batch_size, np.random.default_rng(seed))
    rest = _batches(*validation, recipe.batch_size)
    return _fit(head, shuffled, rest, classes, class_weights, recipe, seed, on_epoch)


def train_whole(
    training: Callable[[int], "tf.data.Dataset"],
    validation: "tf.data.Dataset",
    size: tuple[int, int],
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    """Train the small network together with its head, from scratch, on pictures.

    A side is a dataset of (picture uint8 [height, width, 3], label int64 []) that knows its length. `training` is
    called with the seed for a shuffled one, in another order in each epoch: TensorFlow mixes the seed that is set here
    into a dataset's own, so one that was opened earlier would depend on what the process did before. `size` is (height,
    width).
    The rest is as in `train_head`, but the model that comes back is the one to be served (`model.assemble`).
    """
    import keras
    import tensorflow as tf

    seed = _seed(recipe)
    network = model.build_cnn(*size)
    head = model.build_head(network.output_shape[-1], classes, recipe.dropout)
    together = keras.Sequential([network, head])  # without the resizing: the records hold pictures of this size
    # A last batch of a few pictures would spoil batch normalisation's statistics just before they are used: batches are
    # made equal, and the few pictures that are then left over are others in each epoch.
    pictures = training(seed)
    even = len(pictures) // -(-len(pictures) // recipe.batch_size)
    shuffled = pictures.batch(even, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    rest = validation.batch(recipe.batch_size).prefetch(tf.data.AUTOTUNE)
    trained = _fit(together, shuffled, rest, classes, class_weights, recipe, seed, on_epoch)
    return trained._replace(model=model.assemble(network, head))


def whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel (float32 [d, d]) and bias (float32 [d]) that decorrelate features (float32 [n, d]).

    A backbone's features are strongly correlated, and gradient descent is slow along directions of little variance: in
    the few hundred steps of a training it stayed tens of points behind logistic regression, docs/measurements.md.
    Whitening by principal components (LeCun et al., "Efficient BackProp", 1998, section 4.3) mends it; the mean of
    their variances is added to each so that directions which hold nothing but noise stay small.
    At most WHITENING_ROWS vectors are looked at, evenly spread. Raises PipelineError for features that are not numbers.
    """
    chosen = features[:: -(-len(features) // WHITENING_ROWS)]
    total, products = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
    for start in range(0, len(chosen), 1024):
        block = chosen[start : start + 1024].astype(np.float64)
        total += block.sum(axis=0)
        products += block.T @ block
    if not np.isfinite(products).all():
        raise PipelineError(
            "The stored features of the training pictures are not all numbers. Their backbone's weights are damaged or "
            "do not suit it: see BACKBONE and BACKBONE_WEIGHTS."
        )
    mean = total / len(chosen)
    variances, directions = np.linalg.eigh(products / len(chosen) - np.outer(mean, mean))
    kernel = directions / np.sqrt(variances.clip(0) + (variances.mean() or 1.0))
    return kernel.astype(np.float32), (-mean @ kernel).astype(np.float32)


def _seed(recipe: Recipe) -> int:
    import keras

    seed = secrets.randbits(31) if recipe.seed is None else recipe.seed
    keras.utils.set_random_seed(seed)
    return seed


def _batches(
    features: np.ndarray, labels: np.ndarray, batch_size: int, shuffle: np.random.Generator | None = None
) -> "tf.data.Dataset":
    """Batches of equal size (give or take one), in another order each time where `shuffle` is given."""
    import tensorflow as tf

    count = -(-len(labels) // batch_size)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.arange(len(labels)) if shuffle is None else shuffle.permutation(len(labels))
        for chosen in np.array_split(order, count):
            chosen.sort()  # read in the order of the file
            yield features[chosen], labels[chosen]

    spec = (tf.TensorSpec([None, features.shape[1]], tf.float32), tf.TensorSpec([None], tf.int64))
    batched = tf.data.Dataset.from_generator(batches, output_signature=spec)
    return batched.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2)


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
    best: list[np.ndarray] = []
    kept = 0

    def begin(epoch: int, logs: dict | None = None) -> None:  # noqa: ARG001
        network.optimizer.learning_rate = learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)

    def end(epoch: int, logs: dict[str, float]) -> None:
        nonlocal best, kept
        rate = learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)
        row = Epoch(epoch, logs["accuracy"], logs["loss"], logs["val_accuracy"], logs["val_loss"], rate)
        weights = network.get_weights()
        # The weights too: ReLU makes 0 of what is not a number, and the loss looks like one.
        if not all(np.isfinite(values).all() for values in (row.loss, row.val_loss, *weights)):
            raise PipelineError(
                f"Training came to weights or a loss that are not numbers in epoch {epoch + 1} (loss {row.loss:g}, "
                f"validation {row.val_loss:g}); try a LEARNING_RATE lower than {recipe.learning_rate:g}."
            )
        history.append(row)
        on_epoch(row)
        if epoch == 0 or _better(row, history[kept]):
            kept, best = epoch, weights
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
    kind = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[recipe.optimizer]
    return kind(recipe.learning_rate, weight_decay=recipe.weight_decay)
