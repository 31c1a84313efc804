"""Stored features -> a trained head. Its kind, regularisation and epochs are cross-validated inside the training split.

The validation split is measured and decides nothing.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from dgmd_pipeline.training import checkpoint as training_checkpoint
from dgmd_pipeline.training import config, folds, linear, loop, networks, runtime
from dgmd_pipeline.training.config import Epoch, TrainedModel, TrainingConfig

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

log = logging.getLogger(__name__)
HEADS = ("auto", "linear", "hidden")
FOLDS = 3
SELECTION_ROWS = 8_000  # training images that take part in the choice, at most
HELD_OUT_ROWS = 2_000  # folds are tried until so many images were held out
SHRINKAGES = (1.0, 0.9, 0.5)  # centred, partly whitened, whitened as far as helped: docs/measurements/head.md
MOST_PRODUCTS = 1_000_000_000  # images x dimensions x labels; beyond, only centred features are tried
STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 4))  # 0.001 to 31.6, ascending
FALLBACK_STRENGTH = 0.03  # where there are too few images to hold any out
Split = tuple[np.ndarray, np.ndarray]  # features (float32 [n, d], may be mapped from disk), labels (int64 [n])


class Option(NamedTuple):
    """A head that was cross-validated. Both figures are of images that it was not fitted on."""

    kind: str  # "linear" or "hidden"
    log_loss: float  # nats; not a number where too few images were held out
    accuracy: float  # 0 to 1
    shrinkage: float = 1  # linear: see `linear.basis`
    strength: float = 0  # linear: inverse of the regularisation, scikit-learn's C
    epochs: int = 0  # hidden


class Selection(NamedTuple):
    """What cross-validation chose, and between what. Where HEAD fixes the kind, it chose its settings."""

    chosen: Option
    options: list[Option]  # the best of each kind
    held_out: int  # training images that the figures are of; 0: too few to hold any out
    seed: int


class _Fold(NamedTuple):
    fitted: Split
    held_out: Split


def train_head(
    data: Split,
    validation: Split,
    groups: Sequence[str],
    classes: int,
    class_weights: dict[int, float],
    recipe: TrainingConfig,
    kind: str,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
) -> TrainedModel:
    """Choose a head by cross-validation on the training split `data`, then fit it to the whole of it.

    Labels are from 0 to `classes` - 1; a class may be missing. `groups` names the near-duplicate group of each training
    image; groups are held out as a whole. `kind` is one of HEADS. `class_weights` are by label index, 1 where there is
    none; they weigh the training loss. `on_epoch` is called after each epoch of the final fit and may raise to stop; a
    linear head has one epoch. `validation` is measured after each epoch.

    The selection and, for a hidden head, the state after each epoch are written beside and into `checkpoint` (.npz).
    Where they exist, training resumes and on a CPU comes to the same weights as if it had never stopped. They have to
    be of the same data and settings; the caller deletes them.

    Raises PipelineError where features, loss or weights are not finite, UnusableCheckpoint where a file is damaged.
    """
    weights = config.weights_by_class(classes, class_weights)
    selected = checkpoint.with_name("selection.json") if checkpoint else None
    resumed = _read(selected) if selected and selected.exists() else None
    progress = training_checkpoint.begin(recipe._replace(seed=resumed.seed) if resumed else recipe, checkpoint)
    selection = resumed or select(data, groups, weights, recipe._replace(seed=progress.seed), kind)
    if selected and not resumed:
        _write(selected, selection)
    _announce(selection)
    if selection.chosen.kind == "linear":
        trained = _fit_linear(data, validation, weights, selection)
        on_epoch(trained.history[0])
    else:
        recipe = recipe._replace(epochs=selection.chosen.epochs)
        shown = loop.log_epochs(on_epoch, recipe.epochs)
        trained = fit_hidden(data, validation, weights, recipe, progress, shown, checkpoint)
    return trained._replace(selection=about(selection))


# BLAS threads wait for each other in a busy loop: with two of them on a busy machine of two cores, fits that take a
# second did not end within minutes.
_one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@_one_thread
def select(data: Split, groups: Sequence[str], weights: np.ndarray, recipe: TrainingConfig, kind: str) -> Selection:
    """Cross-validate heads of `kind` on at most SELECTION_ROWS training images; the lowest log loss is chosen.

    The log loss rather than the accuracy: it tells close heads apart with fewer images, and a served probability should
    mean what it says. A logistic regression is always tried, as the floor that any other head is compared with.
    `weights` are by class (float32 [classes]), `recipe` has a seed.
    """
    seed = int(recipe.seed or 0)
    features, labels, groups = _sample(*data, groups, seed)
    components = linear.principal_components(features)
    tried = list(_folds(features, labels, groups, seed))
    held_out = sum(len(fold.held_out[1]) for fold in tried)
    if not held_out:
        fallback = Option("linear", math.nan, math.nan, strength=FALLBACK_STRENGTH)
        if kind == "hidden":
            fallback = Option("hidden", math.nan, math.nan, epochs=recipe.epochs)
        return Selection(fallback, [], 0, seed)
    options = [_best_linear(tried, components, weights)]
    if kind != "linear":
        try:
            options.append(_best_hidden(tried, (features, labels), weights, recipe))
        except loop.Diverged as error:
            if kind == "hidden":
                raise
            log.warning("  The head with hidden layers cannot be used. %s", error)
    allowed = [option for option in options if kind in ("auto", option.kind)]
    return Selection(min(allowed, key=lambda option: option.log_loss), options, held_out, seed)


def _sample(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return at most SELECTION_ROWS rows, read into memory."""
    count = len(labels)
    rows = np.arange(count)
    if count > SELECTION_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(count, SELECTION_ROWS, replace=False))
    return np.asarray(features[rows]), labels[rows], [groups[row] for row in rows.tolist()]


def _folds(features: np.ndarray, labels: np.ndarray, groups: Sequence[str], seed: int) -> Iterator[_Fold]:
    """Yield folds until HELD_OUT_ROWS were held out. A label that a fold is not fitted on is not asked for there."""
    fold_of = folds.assign(labels, groups, FOLDS, seed)
    held_out = 0
    for number in range(FOLDS):
        fitted = fold_of != number
        asked = ~fitted & np.isin(labels, labels[fitted])
        if asked.any() and held_out < HELD_OUT_ROWS:
            held_out += int(asked.sum())
            yield _Fold((features[fitted], labels[fitted]), (features[asked], labels[asked]))


def _best_linear(tried: Sequence[_Fold], components: linear.Components, weights: np.ndarray) -> Option:
    """Return the best logistic regression over shrinkages and strengths."""
    features, _ = tried[0].fitted
    shrinkages = SHRINKAGES if features.size * len(weights) <= MOST_PRODUCTS else SHRINKAGES[:1]
    options = [
        option
        for shrinkage in shrinkages
        for option in _path(tried, linear.basis(components, shrinkage), shrinkage, weights)
    ]
    return min(options, key=lambda option: option.log_loss)


def _path(tried: Sequence[_Fold], coordinates: linear.Basis, shrinkage: float, weights: np.ndarray) -> Iterator[Option]:
    """Yield a logistic regression for each strength, until the loss has risen twice in a row.

    Each fit starts from the one before. The strongest are the slowest: nine tenths of the time went into fits that
    could not win.
    """
    starts: list[Any] = [None] * len(tried)
    losses = [math.inf, math.inf]
    for strength in STRENGTHS:
        starts = [
            linear.fit(*fold.fitted, weights, coordinates, strength, start)
            for fold, start in zip(tried, starts, strict=True)
        ]
        option = Option("linear", *_figures(tried, starts, coordinates), shrinkage, strength)
        yield option
        losses.append(option.log_loss)
        if losses[-1] > losses[-2] > losses[-3]:
            return


def _figures(tried: Sequence[_Fold], fits: Sequence[np.ndarray], coordinates: linear.Basis) -> tuple[float, float]:
    """Return the log loss and accuracy of all held-out images."""
    own, right = [], []
    for fold, coefficients in zip(tried, fits, strict=True):
        features, labels = fold.held_out
        logs = linear.log_probabilities(features, *linear.folded(coefficients, coordinates))
        own.append(logs[np.arange(len(labels)), labels])
        right.append(logs.argmax(axis=1) == labels)
    return -float(np.concatenate(own).mean()), float(np.concatenate(right).mean())


def _best_hidden(tried: Sequence[_Fold], data: Split, weights: np.ndarray, recipe: TrainingConfig) -> Option:
    """Return a head with hidden layers and the number of epochs after which its log loss was lowest.

    `data` is the training split of all folds. A fold ends when its loss has not become lower for `patience` epochs.
    """
    network = _hidden(data, weights, recipe)
    start = training_checkpoint.TrainingState(
        int(recipe.seed or 0), [], loop.variable_values(loop.prepare(network, recipe))
    )
    histories = []
    for fold in tried:
        history: list[Epoch] = []

        def watch(row: Epoch, history: list[Epoch] = history) -> None:
            history.append(row)
            if row.epoch - min(history, key=lambda each: each.val_loss).epoch >= recipe.patience:
                raise _NoBetter

        with contextlib.suppress(_NoBetter):
            fit_hidden(*fold, weights, recipe, start._replace(history=[]), watch, network=network)
        histories.append(history)
    epochs = min(map(len, histories))
    figures = np.array([[(row.val_loss, row.val_accuracy) for row in history[:epochs]] for history in histories])
    losses, accuracies = np.average(figures, axis=0, weights=[len(fold.held_out[1]) for fold in tried]).T
    best = int(losses.argmin())
    return Option("hidden", float(losses[best]), float(accuracies[best]), epochs=best + 1)


class _NoBetter(Exception):
    """Ends the training of a fold."""


def fit_hidden(
    data: Split,
    held_out: Split,
    weights: np.ndarray,
    recipe: TrainingConfig,
    progress: training_checkpoint.TrainingState,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
    network: "keras.Model | None" = None,
) -> TrainedModel:
    """Fit a head with hidden layers for `recipe.epochs` epochs, or from `progress` to there: see `training.fit`.

    `network` is a head that is traced already; `progress` then holds its first state. Without it, one is built.
    """
    if network is None:
        runtime.set_seed(progress.seed)
        network = _hidden(data, weights, recipe)

    def shuffled(epoch: int) -> "tf.data.Dataset":
        return batches(*data, recipe.batch_size, (progress.seed, epoch))

    watched = batches(*held_out, recipe.batch_size)
    return loop.fit(network, shuffled, watched, weights, recipe, progress, on_epoch, checkpoint)


def _hidden(data: Split, weights: np.ndarray, recipe: TrainingConfig) -> "keras.Model":
    features, _ = data
    return networks.build_head(features.shape[1], len(weights), recipe.dropout, *linear.centre(features))


@_one_thread
def _fit_linear(data: Split, validation: Split, weights: np.ndarray, selection: Selection) -> TrainedModel:
    features, labels = data
    chosen = selection.chosen
    coordinates = linear.basis(linear.principal_components(features), chosen.shrinkage)
    kernel, bias = linear.folded(linear.fit(features, labels, weights, coordinates, chosen.strength), coordinates)
    (loss, accuracy), (val_loss, val_accuracy) = (
        linear.evaluate(*each, kernel, bias, by_class) for each, by_class in ((data, weights), (validation, None))
    )
    row = Epoch(0, accuracy, loss, val_accuracy, val_loss, 0.0)
    return TrainedModel(networks.build_linear_head(kernel, bias), [row], selection.seed)


def refit(data: Split, chosen: Mapping[str, Any], weights: np.ndarray, recipe: TrainingConfig) -> "keras.Model":
    """Fit a head to other rows with what was chosen (see `about`); the other arguments are those of `select`."""
    option = Option(**{"log_loss": math.nan, "accuracy": math.nan, **chosen})
    if option.kind == "linear":
        return _fit_linear(data, data, weights, Selection(option, [], 0, int(recipe.seed or 0))).model
    recipe = recipe._replace(epochs=option.epochs)
    return fit_hidden(data, data, weights, recipe, training_checkpoint.begin(recipe, None), lambda _: None).model


def batches(
    features: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    shuffle: tuple[int, int] | None = None,
    rows: np.ndarray | None = None,
) -> "tf.data.Dataset":
    """Return batches of equal size, give or take one, in the order of a seed and an epoch where these are given.

    `features` are float32 [n, ...]; `rows` (int64) are those to take, all where it is None.
    """
    import tensorflow as tf

    chosen_rows = np.arange(len(labels)) if rows is None else rows
    count = -(-len(chosen_rows) // batch_size)

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = chosen_rows.copy()
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(order)
        for chosen in np.array_split(order, count):
            chosen.sort()  # read in the order of the file
            yield features[chosen], labels[chosen]

    spec = (tf.TensorSpec([None, *features.shape[1:]], tf.float32), tf.TensorSpec([None], tf.int64))
    batched = tf.data.Dataset.from_generator(generate, output_signature=spec)
    return batched.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2)


def about(selection: Selection) -> dict[str, Any]:
    """Return a selection as plain values for JSON."""

    def of(option: Option) -> dict[str, Any]:
        names = ("epochs",) if option.kind == "hidden" else ("shrinkage", "strength")
        return {name: value for name, value in option._asdict().items() if name in names} | {
            "kind": option.kind,
            **({} if math.isnan(option.log_loss) else {"log_loss": option.log_loss, "accuracy": option.accuracy}),
        }

    return {
        "chosen": of(selection.chosen),
        "options": [of(option) for option in selection.options],
        "held_out": selection.held_out,
    }


def words(option: Option) -> str:
    """Return an option in words, without its figures."""
    if option.kind == "hidden":
        return f"hidden layers, {option.epochs} epoch{'s' * (option.epochs != 1)}"
    return f"logistic regression, C {option.strength:.2g}, shrinkage {option.shrinkage:g}"


def _announce(selection: Selection) -> None:
    for option in selection.options:
        log.info(
            "  %s: log loss %.4f, accuracy %.4f on %s held-out training images%s",
            words(option), option.log_loss, option.accuracy, f"{selection.held_out:,}",
            ", chosen" if option == selection.chosen else "",
        )  # fmt: skip
    if not selection.options:
        log.warning("  too few training images to cross-validate; using the default: %s", words(selection.chosen))


def _write(path: Path, selection: Selection) -> None:
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(selection), "utf-8")
    draft.replace(path)


def _read(path: Path) -> Selection:
    try:
        chosen, options, held_out, seed = json.loads(path.read_text("utf-8"))
        return Selection(Option(*chosen), [Option(*option) for option in options], held_out, seed)
    except (OSError, ValueError, TypeError) as error:
        raise training_checkpoint.unusable_checkpoint(path, error) from error
