"""Features or records -> trained model."""

import contextlib
import secrets
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import folders, model
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


class _Progress(NamedTuple):
    """How far a training has come, and all that it needs to go on: what a checkpoint holds."""

    seed: int
    history: list[Epoch]
    kept: int  # the best epoch so far
    best: list[np.ndarray]  # its weights
    state: list[np.ndarray]  # what the network, its dropout's random numbers and the optimizer have come to


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
    checkpoint: Path | None = None,
) -> Trained:
    """Train a head on stored features.

    A side is a pair of features (float32 [n, d], possibly mapped from disk: no more than a batch is read at a time) and
    labels (int64 [n], 0 to `classes` - 1; a class may be missing). `class_weights` are by label index, 1 where there is
    none; they weigh the training's loss alone. `on_epoch` is called at the end of each epoch.

    At the end of each epoch, before `on_epoch`, all that is needed to go on is written to the file `checkpoint` (.npz),
    whole or not at all: seed, history, the best epoch's weights, and the state of network, dropout and optimizer. If
    that file is there, training goes on after its last epoch, with its seed, and on a CPU comes to the same weights as
    if it had never stopped. It has to be of the same data and recipe; whoever called deletes it.

    Raises PipelineError where the loss or the weights cease to be numbers, or `checkpoint` is damaged or another's.
    """
    progress = _begin(recipe, checkpoint)
    whitened = _whitening_of(training[0], progress, checkpoint)
    head = model.build_head(training[0].shape[1], classes, recipe.dropout, whitened)
    rest = _batches(*validation, recipe.batch_size)

    def shuffled(epoch: int) -> "tf.data.Dataset":
        return _batches(*training, recipe.batch_size, (progress.seed, epoch))

    return _fit(head, shuffled, rest, classes, class_weights, recipe, progress, on_epoch, checkpoint)


def train_whole(
    training: Callable[[int, int], "tf.data.Dataset"],
    validation: "tf.data.Dataset",
    size: tuple[int, int],
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
) -> Trained:
    """Train the small network together with its head, from scratch, on pictures.

    A side is a dataset of (picture uint8 [height, width, 3], label int64 []) that knows its length. `training` is
    called with the seed and the epoch for one in an order that depends on these alone: TensorFlow mixes the seed that
    is set here into a dataset's own, so one that was opened earlier would depend on what the process did before. `size`
    is (height, width).
    The rest is as in `train_head`, but the model that comes back is the one to be served (`model.assemble`).
    """
    import keras
    import tensorflow as tf

    progress = _begin(recipe, checkpoint)
    network = model.build_cnn(*size)
    head = model.build_head(network.output_shape[-1], classes, recipe.dropout)
    together = keras.Sequential([network, head])  # without the resizing: the records hold pictures of this size
    rest = validation.batch(recipe.batch_size).prefetch(tf.data.AUTOTUNE)

    def shuffled(epoch: int) -> "tf.data.Dataset":
        # A last batch of a few pictures would spoil batch normalisation's statistics just before they are used: batches
        # are made equal, and the few pictures that are then left over are others in each epoch.
        pictures = training(progress.seed, epoch)
        even = len(pictures) // -(-len(pictures) // recipe.batch_size)
        return pictures.batch(even, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

    trained = _fit(together, shuffled, rest, classes, class_weights, recipe, progress, on_epoch, checkpoint)
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


def _whitening_of(features: np.ndarray, progress: _Progress, checkpoint: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the whitening or, to go on, read it again.

    It is not the same on another number of cores or another CPU: the signs of its directions are arbitrary, and with
    fewer pictures than dimensions most of them. A head that was resumed with one of its own lost up to 4 points.
    """
    if checkpoint is None:
        return whitening(features)
    path = checkpoint.with_name("whitening.npz")
    if not progress.history:
        kernel, bias = whitening(features)
        _write(path, {"kernel": kernel, "bias": bias})
        return kernel, bias
    with _readable(path) as file:
        kernel, bias = file["kernel"], file["bias"]
        if len(kernel) != features.shape[1]:
            raise ValueError(f"{len(kernel)} dimensions instead of {features.shape[1]}")
        return kernel, bias


def _begin(recipe: Recipe, checkpoint: Path | None) -> _Progress:
    """Read how far it has come, if it has begun; set the seed."""
    import keras

    if checkpoint and checkpoint.exists():
        progress = _load(checkpoint)
    else:
        progress = _Progress(secrets.randbits(31) if recipe.seed is None else recipe.seed, [], 0, [], [])
    keras.utils.set_random_seed(progress.seed)
    return progress


def _load(checkpoint: Path) -> _Progress:
    with _readable(checkpoint) as file:
        best, state = ([file[name] for name in file.files if name.startswith(kind)] for kind in ("best", "state"))
        history = [Epoch(int(epoch), *rest) for epoch, *rest in file["history"].tolist()]
        return _Progress(int(file["seed"]), history, int(file["kept"]), best, state)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise _unusable(path, error) from error


def _save(progress: _Progress, checkpoint: Path) -> None:
    arrays = {name: np.array(getattr(progress, name)) for name in ("seed", "history", "kept")}
    for kind in ("best", "state"):
        arrays |= {f"{kind}{number}": values for number, values in enumerate(getattr(progress, kind))}
    _write(checkpoint, arrays)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class UnusableCheckpoint(PipelineError):
    """What should say how far a training has come is damaged or another training's: delete it to begin anew."""


def _unusable(checkpoint: Path, error: Exception) -> UnusableCheckpoint:
    return UnusableCheckpoint(
        f"{checkpoint} should say how far a training has come, and is damaged or another's ({type(error).__name__})."
    )


def _batches(
    features: np.ndarray, labels: np.ndarray, batch_size: int, shuffle: tuple[int, int] | None = None
) -> "tf.data.Dataset":
    """Batches of equal size (give or take one), in the order of a seed and an epoch where these are given."""
    import tensorflow as tf

    count = -(-len(labels) // batch_size)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.arange(len(labels))
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(order)
        for chosen in np.array_split(order, count):
            chosen.sort()  # read in the order of the file
            yield features[chosen], labels[chosen]

    spec = (tf.TensorSpec([None, features.shape[1]], tf.float32), tf.TensorSpec([None], tf.int64))
    batched = tf.data.Dataset.from_generator(batches, output_signature=spec)
    return batched.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2)


def _fit(
    network: "keras.Model",
    training: Callable[[int], "tf.data.Dataset"],
    validation: "tf.data.Dataset",
    classes: int,
    class_weights: dict[int, float],
    recipe: Recipe,
    progress: _Progress,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None,
) -> Trained:
    import tensorflow as tf

    by_class = np.ones(classes, np.float32)
    for index, weight in class_weights.items():
        by_class[index] = weight
    by_class_tensor = tf.constant(by_class)

    # XLA on a CPU is several times slower, and Keras's "auto" would choose it.
    network.compile(
        optimizer=_optimizer(recipe), loss="sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    network.optimizer.build(network.trainable_variables)
    # All that changes: not the whitening, which would be 13 of a head's 16 MB, but dropout's random state, no weight.
    fixed = {id(variable) for layer in network.layers if not layer.trainable for variable in layer.variables}
    weights = [variable for variable in network.weights if id(variable) not in fixed]
    variables = [variable for variable in network.variables if id(variable) not in fixed]
    variables += network.optimizer.variables
    if checkpoint:  # the next one is written beside the last one
        one = sum(variable.numpy().nbytes for variable in [*weights, *variables])
        folders.check_space(checkpoint.parent, "the training", one if progress.history else 2 * one)
    seed, history, kept, best, state = progress
    if checkpoint and history:
        try:
            _assign(weights, best)  # do they fit? it is too late to ask at the end
            _assign(variables, state)
        except ValueError as error:
            raise _unusable(checkpoint, error) from error

    for epoch in range(len(history), recipe.epochs):
        if epoch - kept > recipe.patience:
            break
        rate = learning_rate_of(epoch, recipe.learning_rate, recipe.decay_rate)
        network.optimizer.learning_rate = rate
        weighted = training(epoch).map(lambda x, y: (x, y, tf.gather(by_class_tensor, y)))
        # One epoch at a time, so that its order is its own whatever was before; shuffle: the data come shuffled.
        logs = network.fit(weighted, validation_data=validation, shuffle=False, verbose=0).history
        row = Epoch(epoch, **{name: value for name, [value] in logs.items()}, learning_rate=rate)
        values = _values(weights)
        # The weights too: ReLU makes 0 of what is not a number, and the loss looks like one.
        numbers: list[Any] = [row.loss, row.val_loss, *values]
        if not all(np.isfinite(each).all() for each in numbers):
            raise PipelineError(
                f"Training came to weights or a loss that are not numbers in epoch {epoch + 1} (loss {row.loss:g}, "
                f"validation {row.val_loss:g}); try a LEARNING_RATE lower than {recipe.learning_rate:g}."
            )
        history.append(row)
        if epoch == 0 or _better(row, history[kept]):
            kept, best = epoch, values
        if checkpoint:
            _save(_Progress(seed, history, kept, best, _values(variables)), checkpoint)
        on_epoch(row)

    _assign(weights, best)
    return Trained(network, history, kept, seed)


def _values(variables: Sequence["keras.Variable"]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]


def _assign(variables: Sequence["keras.Variable"], values: Sequence[np.ndarray]) -> None:
    for variable, each in zip(variables, values, strict=True):
        variable.assign(each)


def _better(row: Epoch, best: Epoch) -> bool:
    """Higher validation accuracy, and at the same accuracy, which is frequent on small validation sides, lower loss."""
    return (row.val_accuracy, -row.val_loss) > (best.val_accuracy, -best.val_loss)


def _optimizer(recipe: Recipe) -> Any:
    import keras

    if recipe.optimizer == "sgd":
        return keras.optimizers.SGD(recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    kind = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[recipe.optimizer]
    return kind(recipe.learning_rate, weight_decay=recipe.weight_decay)
