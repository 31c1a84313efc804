"""Chooses the kind and the settings of a head by cross-validation on the training split."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Required, TypedDict

import numpy as np

from dgmd_pipeline.formatting import counted, percent
from dgmd_pipeline.training import early_stopping, folds, linear, loop
from dgmd_pipeline.training.checkpoint import TrainingState, unusable_checkpoint, write_atomically
from dgmd_pipeline.training.config import Epoch, TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures
from dgmd_pipeline.training.head_fitting import HiddenHead

log = logging.getLogger(__name__)
HEADS = ("auto", "linear", "hidden")
FILE = "selection.json"  # name of the file, in the folder of checkpoints, that holds the selection
FOLDS = 3
SELECTION_ROWS = 8_000  # maximum number of training images that cross-validation uses
HELD_OUT_ROWS = 2_000  # when this number of images has been held out, no further fold is evaluated
SHRINKAGES = (1.0, 0.9, 0.5)  # from no whitening to strong whitening, see docs/measurements/head.md
MAX_PRODUCTS = 1_000_000_000  # if images x dimensions x labels is greater, only the first shrinkage is evaluated
STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 4))  # 0.001 to 31.6, ascending
# Tolerance of the fits. With 1e-5 instead of 3e-5, a fit takes a third longer. On six of seven data sets,
# cross-validation chooses the same settings with either tolerance. On all seven, the log loss of the chosen settings
# differs by at most .003.
TOLERANCE = 3e-5
FIRST_STRENGTH = 3  # position of the strength that is evaluated first
FALLBACK_STRENGTH = 0.03  # used if there are too few images to hold any out


class Option(NamedTuple):
    """A cross-validated head. Both metrics are measured on held-out images."""

    kind: str  # "linear" or "hidden"
    log_loss: float  # nats; NaN if there were too few images to hold any out
    accuracy: float  # 0 to 1; NaN if `log_loss` is NaN
    shrinkage: float = 1  # only for "linear": see `linear.penalties`
    strength: float = 0  # only for "linear": scikit-learn's C; a larger value regularises less
    epochs: int = 0  # only for "hidden": number of epochs


class Selection(NamedTuple):
    """The head that cross-validation chose, and the alternatives. The setting HEAD may fix the kind of head."""

    chosen: Option
    options: list[Option]  # the best head of each kind that was evaluated
    held_out: int  # number of held-out training images; 0 if there were too few images to hold any out
    seed: int


class OptionJson(TypedDict, total=False):
    """An Option in training.json."""

    kind: Required[str]
    shrinkage: float  # only for "linear"
    strength: float  # only for "linear"
    epochs: int  # only for "hidden"
    log_loss: float  # missing if no images were held out
    accuracy: float  # missing if no images were held out


class SelectionJson(TypedDict):
    """A Selection in training.json."""

    chosen: OptionJson
    options: list[OptionJson]
    held_out: int


class _Fold(NamedTuple):
    fitted: LabeledFeatures
    held_out: LabeledFeatures


class _Fits(NamedTuple):
    """A logistic regression for each fold, all with the same settings."""

    option: Option
    strength: int  # position of the option's strength in STRENGTHS
    coefficients: Sequence[np.ndarray | None]  # coefficients of each fold; None before the first fit


def select(
    data: LabeledFeatures,
    groups: Sequence[str],
    class_weights: np.ndarray,
    config: TrainingConfig,
    kind: str,
    components: linear.Components,
    hidden: Callable[[], HiddenHead],
) -> Selection:
    """Cross-validate heads of `kind` on at most SELECTION_ROWS training images, and choose by the log loss.

    The log loss needs fewer images than the accuracy to distinguish similar heads. It also rewards good probabilities,
    which the served model returns. A logistic regression is always evaluated, as the baseline.
    `class_weights` are float32 [classes]. `components` are the principal components of the training images' features.
    Logistic regressions are cross-validated first, without Keras. If `kind` is not "linear", the head that `hidden`
    returns is cross-validated afterwards. This changes the weights of the head.
    """
    seed = int(config.seed or 0)
    sample, groups = _sample(data, groups, seed)
    masks = list(_cv_masks(sample.labels, groups, seed))
    held_out = sum(int(mask.sum()) for _, mask in masks)
    if not held_out:
        fallback = Option("linear", math.nan, math.nan, strength=FALLBACK_STRENGTH)
        if kind == "hidden":
            fallback = Option("hidden", math.nan, math.nan, epochs=config.epochs)
        return Selection(fallback, [], 0, seed)
    coordinates, components = linear.project(sample.vectors, components)
    options = [_best_linear(_divide(coordinates, sample.labels, masks), components, class_weights)]
    if kind != "linear":
        try:
            options.append(_best_hidden(_divide(np.asarray(sample.vectors), sample.labels, masks), hidden(), config))
        except loop.Diverged as error:
            if kind == "hidden":
                raise
            log.warning("  The head with hidden layers cannot be used. %s", error)
    allowed = [option for option in options if kind in ("auto", option.kind)]
    return Selection(min(allowed, key=lambda option: option.log_loss), options, held_out, seed)


def _sample(data: LabeledFeatures, groups: Sequence[str], seed: int) -> tuple[LabeledFeatures, list[str]]:
    """Read at most SELECTION_ROWS rows and their groups into memory."""
    count = len(data.labels)
    rows = np.arange(count)
    if count > SELECTION_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(count, SELECTION_ROWS, replace=False))
    sample = LabeledFeatures(np.asarray(data.vectors[rows]), data.labels[rows])
    return sample, [groups[row] for row in rows.tolist()]


def _cv_masks(labels: np.ndarray, groups: Sequence[str], seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield masks (bool [n]) of the fitted and the held-out rows of each fold, until HELD_OUT_ROWS rows were held out.

    An image is held out only if its label also occurs among the fitted rows.
    """
    fold_of = folds.assign(labels, groups, FOLDS, seed)
    count = 0
    for number in range(FOLDS):
        fitted = fold_of != number
        held_out = ~fitted & np.isin(labels, labels[fitted])
        if held_out.any() and count < HELD_OUT_ROWS:
            count += int(held_out.sum())
            yield fitted, held_out


def _divide(vectors: np.ndarray, labels: np.ndarray, masks: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[_Fold]:
    return [_Fold(*(LabeledFeatures(vectors[mask], labels[mask]) for mask in pair)) for pair in masks]


def _best_linear(cv_folds: Sequence[_Fold], components: linear.Components, class_weights: np.ndarray) -> Option:
    """Return the logistic regression with the best shrinkage and strength.

    The vectors in `cv_folds` are coordinates along the principal components. For each shrinkage, the search for a
    strength starts at the best strength of the previous shrinkage. After a shrinkage that is not better than the
    previous one, no further shrinkage is evaluated.
    """
    products = math.prod(cv_folds[0].fitted.vectors.shape) * len(class_weights)
    best = _Fits(Option("linear", math.inf, 0), FIRST_STRENGTH, [None] * len(cv_folds))
    for shrinkage in SHRINKAGES if products <= MAX_PRODUCTS else SHRINKAGES[:1]:
        evaluate = partial(_evaluate_linear, cv_folds, components, class_weights, shrinkage)
        found = _descend(evaluate, best)
        if found.option.log_loss >= best.option.log_loss:
            break
        best = found
    return best.option


def _descend(evaluate: "Callable[[int, _Fits], _Fits]", start: "_Fits") -> "_Fits":
    """Search for the strength with the lowest loss, step by step from the strength of `start`. Return the best fits.

    Each fit starts from the coefficients of the best fit so far. The search assumes that the loss has only one local
    minimum.
    """
    best = evaluate(start.strength, start)
    for step in (1, -1):
        before = best
        while 0 <= best.strength + step < len(STRENGTHS):
            tried = evaluate(best.strength + step, best)
            if tried.option.log_loss >= best.option.log_loss:
                break
            best = tried
        if best is not before:
            break
    return best


def _evaluate_linear(
    cv_folds: Sequence[_Fold],
    components: linear.Components,
    class_weights: np.ndarray,
    shrinkage: float,
    strength: int,
    start: "_Fits",
) -> "_Fits":
    """Fit a logistic regression to each fold, and measure it on the fold's held-out images.

    Each fold has its own thread. The threads run in parallel, because BLAS and NumPy take nearly all of the time and
    release the GIL.
    """
    penalty = linear.penalties(components, shrinkage) / STRENGTHS[strength]

    def evaluate(fold: _Fold, coefficients: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        fitted = linear.fit(*fold.fitted, class_weights, components, penalty, coefficients, TOLERANCE)
        vectors, labels = fold.held_out
        logs = linear.log_probabilities(vectors, *linear.unproject(fitted, components))
        return fitted, logs[np.arange(len(labels)), labels], logs.argmax(axis=1) == labels

    with ThreadPoolExecutor(len(cv_folds)) as threads:
        fits, true_logs, correct = zip(*threads.map(evaluate, cv_folds, start.coefficients), strict=True)
    loss, accuracy = -float(np.concatenate(true_logs).mean()), float(np.concatenate(correct).mean())
    return _Fits(Option("linear", loss, accuracy, shrinkage, STRENGTHS[strength]), strength, fits)


def _best_hidden(cv_folds: Sequence[_Fold], hidden: HiddenHead, config: TrainingConfig) -> Option:
    """Return the option of kind "hidden", with the number of epochs for which the log loss over all folds is lowest.

    The training of a fold stops when its held-out loss has not decreased for `config.patience` epochs.
    """
    histories = []
    for number, fold in enumerate(cv_folds, start=1):
        history: list[Epoch] = []
        with contextlib.suppress(early_stopping.StopEarly):
            stop_early = early_stopping.after(config.patience, history)
            hidden.fit(*fold, config, TrainingState(int(config.seed or 0), [], []), stop_early)
        log.info("  hidden layers, fold %d of %d: %s", number, len(cv_folds), _why_ended(history, config))
        histories.append(history)
    epochs = min(map(len, histories))
    metrics = np.array([[(row.val_loss, row.val_accuracy) for row in history[:epochs]] for history in histories])
    images = [len(fold.held_out.labels) for fold in cv_folds]
    losses, accuracies = np.average(metrics, axis=0, weights=images).T
    best = int(losses.argmin())
    return Option("hidden", float(losses[best]), float(accuracies[best]), epochs=best + 1)


def _why_ended(history: Sequence[Epoch], config: TrainingConfig) -> str:
    best = early_stopping.best_epoch(history).epoch
    stopped = history[-1].epoch - best >= config.patience
    reason = f"no lower held-out loss for {counted(config.patience, 'epoch')}" if stopped else "the limit EPOCHS"
    return f"ended after {counted(len(history), 'epoch')} ({reason}); epoch {best + 1} has the lowest loss"


def to_json(selection: Selection) -> SelectionJson:
    """Return a selection as JSON values."""
    chosen, options = _option_to_json(selection.chosen), [_option_to_json(option) for option in selection.options]
    return {"chosen": chosen, "options": options, "held_out": selection.held_out}


def _option_to_json(option: Option) -> OptionJson:
    values: OptionJson = (
        {"epochs": option.epochs, "kind": option.kind}
        if option.kind == "hidden"
        else {"shrinkage": option.shrinkage, "strength": option.strength, "kind": option.kind}
    )
    if not math.isnan(option.log_loss):
        values |= {"kind": option.kind, "log_loss": option.log_loss, "accuracy": option.accuracy}
    return values


def describe(option: Option) -> str:
    """Return the kind and the settings of an option, without its metrics, as text."""
    if option.kind == "hidden":
        return f"hidden layers, {counted(option.epochs, 'epoch')}"
    return f"logistic regression, C {option.strength:.2g}, shrinkage {option.shrinkage:g}"


def log_selection(selection: Selection) -> None:
    """Log each option and which one is chosen."""
    for option in selection.options:
        log.info(
            "  %s: log loss %.4f, accuracy %s on %s held-out training images%s",
            describe(option), option.log_loss, percent(option.accuracy), f"{selection.held_out:,}",
            ", chosen" if option == selection.chosen else "",
        )  # fmt: skip
    if not selection.options:
        log.warning("  too few training images to cross-validate; using the default: %s", describe(selection.chosen))


def save(selection: Selection, path: Path) -> None:
    """Write a selection for a resumed training."""
    write_atomically(path, lambda file: file.write(json.dumps(selection).encode()))


def load(path: Path) -> Selection:
    """Read what `save` wrote. Raises UnusableCheckpoint if the file is damaged."""
    try:
        chosen, options, held_out, seed = json.loads(path.read_text("utf-8"))
        return Selection(Option(*chosen), [Option(*option) for option in options], held_out, seed)
    except (OSError, ValueError, TypeError) as error:
        raise unusable_checkpoint(path, error) from error
