"""Frozen backbone and trained head -> both trained together, kept only where a hold-out says that it is better.

The head is trained first, then both at a low learning rate: Kumar et al., "Fine-Tuning can Distort Pretrained Features
and Underperform Out-of-Distribution", ICLR 2022.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline.training import checkpoint as training_checkpoint
from dgmd_pipeline.training import features, folds, head, loop, runtime
from dgmd_pipeline.training.config import Epoch, TrainingConfig
from dgmd_pipeline.workflow import disk

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

KINDS = ("none", "top", "all")
BATCH_SIZE = 32  # images in a training step, at most: gradients of a whole network take 60 MB and more for each
DECAY_RATE = 1.0  # learning rate of epoch e, from 0: that of the recipe / (1 + DECAY_RATE * e)
TOP_SHARE = (0.25, 0.75)  # of the backbone's parameters that `top` may train
TRIAL_ROWS = 10_000  # training images that take part in the trial, at most
TRIAL_FOLDS = 5  # one of them is held out
LEAST_HELD_OUT = 10  # images: of fewer, the lowest of several log losses is low by chance
CHECKPOINT = "fine_tuning"  # what the names of its files begin with
Rows = np.ndarray  # int64, ascending: positions of images in the training split
Batches = Callable[[Rows, tuple[int, int] | None], "tf.data.Dataset"]


class Split(NamedTuple):
    """A split of the data."""

    labels: np.ndarray  # int64 [n]
    pictures: Callable[..., "tf.data.Dataset"]  # `records.read` without its first argument


class Trial(NamedTuple):
    """What the head alone and the fine-tuned model come to on training images that neither was trained on."""

    held_out: int  # how many those images are
    log_loss_head: float  # nats
    log_loss: float  # after `epochs`
    accuracy_head: float  # 0 to 1
    accuracy: float
    epochs: int  # after which the log loss was lowest; the final fit has as many

    @property
    def better(self) -> bool:
        """Whether fine-tuning has the lower log loss.

        The log loss depends on the probability of every image and the accuracy only on those near the boundary between
        two classes, so it tells two models apart with fewer images; it also rules out a model that gains accuracy and
        states worse probabilities. For the same reason it chooses the number of epochs: after the best one the accuracy
        stays and the log loss rises, docs/measurements/fine-tuning.md.
        """
        return self.log_loss < self.log_loss_head


class FineTunedModel(NamedTuple):
    """A fine-tuned backbone and head; None where they are not kept."""

    backbone: "keras.Model | None"
    head: "keras.Model | None"
    history: list[Epoch]  # of the final fit
    trial: Trial | None  # None: too few training images to hold any out


def fine_tune(
    kind: str,
    backbone: "keras.Model",
    trained_head: "keras.Model",
    fit_head: Callable[[Rows], "keras.Model"],
    data: Split,
    validation: Split,
    groups: Sequence[str],
    class_weights: np.ndarray,
    recipe: TrainingConfig,
    on_epoch: Callable[[Epoch], None],
    notes: Path,
    map: Callable[[Callable, Iterable], Iterable] = map,
) -> FineTunedModel:
    """Train the last blocks of a backbone (`kind` "top") or all of it ("all") together with a trained head.

    A trial comes first: on four fifths of the training split `data`, from the head that `fit_head` returns for these
    rows, measured on the rest after each of `recipe.epochs`. `groups` names the near-duplicate group of each training
    image; groups are held out as a whole. Where the trial is `better`, the whole training split is fine-tuned from
    `trained_head` for as many epochs as were best in the trial. `validation` is measured after each of these epochs and
    decides nothing. `backbone` and `trained_head` are not changed.

    `class_weights` are float32 [classes]. `recipe` has a seed, which makes this repeatable on a CPU. `on_epoch` is
    called after each epoch, of the trial too, and may raise to stop. `notes` is an existing folder for activations and
    checkpoints; with the same folder, data and recipe a stopped fine-tuning resumes after its last epoch. `map` is like
    the builtin one, see `features.extract`.

    Raises PipelineError where the disk has no room for the activations or weights are not finite, UnusableCheckpoint
    where a file of `notes` is damaged.
    """
    recipe = recipe._replace(batch_size=min(recipe.batch_size, BATCH_SIZE), decay_rate=DECAY_RATE)
    read, rest = _inputs(kind, backbone, (data, validation), recipe.batch_size, notes, map)

    def fit(start: "keras.Model", rows: Rows, measured: "tf.data.Dataset", name: str, epochs: int) -> Any:
        checkpoint = notes / f"{CHECKPOINT}_{name}.npz"
        progress = training_checkpoint.begin(recipe, checkpoint)
        runtime.set_seed(progress.seed)  # the copies draw the seeds of their dropout from it
        parts = _trainable(kind, backbone, start)
        before = _measure(parts.trained, measured) if name == "trial" else None

        def shuffled(epoch: int) -> "tf.data.Dataset":
            return read(rows, (progress.seed, epoch))

        shown, now = loop.log_epochs(on_epoch, epochs), recipe._replace(epochs=epochs)
        fitted = loop.fit(parts.trained, shuffled, measured, class_weights, now, progress, shown, checkpoint)
        return parts, fitted.history, before

    fitted_rows, held_out_rows = _hold_out(data.labels, groups, int(recipe.seed or 0))
    if len(held_out_rows) < LEAST_HELD_OUT:
        return FineTunedModel(None, None, [], None)
    held_out = read(held_out_rows, None)
    _, history, before = fit(fit_head(fitted_rows), fitted_rows, held_out, "trial", recipe.epochs)
    best = min(history, key=lambda row: row.val_loss)
    trial = Trial(len(held_out_rows), before[0], best.val_loss, before[1], best.val_accuracy, best.epoch + 1)
    if not trial.better:
        return FineTunedModel(None, None, [], trial)
    parts, history, _ = fit(trained_head, np.arange(len(data.labels)), rest, "final", trial.epochs)
    return FineTunedModel(parts.backbone, parts.head, history, trial)


class _Parts(NamedTuple):
    backbone: "keras.Model"
    head: "keras.Model"
    trained: "keras.Model"  # what is trained: the head on the backbone or on its top; shares their weights


def _trainable(kind: str, backbone: "keras.Model", start: "keras.Model") -> _Parts:
    import keras

    backbone, start = unfrozen(backbone), unfrozen(start)
    part = divide(backbone)[1] if kind == "top" else backbone
    return _Parts(backbone, start, keras.Model(part.input, start(part.output)))


def unfrozen(network: "keras.Model") -> "keras.Model":
    """Return a copy of a network in which every layer but batch normalisation is trainable.

    A frozen batch normalisation layer uses its stored statistics in training too. Those of pretraining are of a million
    images; those of a few small batches would be worse.
    """
    import keras

    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    for layer in copy.layers:  # setting it for the whole network leaves layers as they are that were built frozen
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    return copy


def divide(network: "keras.Model") -> tuple["keras.Model", "keras.Model"]:
    """Return the bottom and the top of a backbone, two networks that share its layers: top(bottom(x)) == network(x).

    The cut is between two blocks, at a tensor that every path from the input to the output passes through. Of those
    that leave a TOP_SHARE of the parameters to the top, the one with the fewest values is taken, because networks are
    narrow between blocks and wide inside, and these values are stored. Of equal ones the first is taken.
    """
    import keras

    total = above = network.count_params()
    passages = {id(operation) for operation in _passages(network)}
    found = []
    for operation in network.operations:
        above -= sum(int(np.prod(weight.shape)) for weight in getattr(operation, "weights", ()))
        convolution = "Conv" in type(operation).__name__  # its batch normalisation belongs to the same block
        if id(operation) in passages and not convolution and TOP_SHARE[0] <= above / total <= TOP_SHARE[1]:
            found.append(operation.output)
    cut = min(found, key=lambda tensor: np.prod(tensor.shape[1:]))
    return keras.Model(network.input, cut), keras.Model(cut, network.output)


def _passages(network: "keras.Model") -> list[Any]:
    """Return the operations whose output every path from the network's input to its output passes through."""
    import keras

    made_at: dict[int, int] = {}  # tensor -> position of the operation that makes it
    last_use = [0] * len(network.operations)
    for position, operation in enumerate(network.operations):  # each after those that it depends on
        if not isinstance(operation, keras.layers.InputLayer):
            for tensor in keras.tree.flatten(operation.input):
                last_use[made_at[id(tensor)]] = position
        made_at |= {id(tensor): position for tensor in keras.tree.flatten(operation.output)}
    found, reach = [], 0
    for position, operation in enumerate(network.operations):
        if reach <= position < last_use[position]:
            found.append(operation)
        reach = max(reach, last_use[position])
    return found


def _inputs(
    kind: str,
    backbone: "keras.Model",
    splits: tuple[Split, Split],
    batch_size: int,
    notes: Path,
    map: Callable[[Callable, Iterable], Iterable],
) -> tuple[Batches, "tf.data.Dataset"]:
    """Return what the trained part is fed with: batches of the training split, and the validation split."""
    data, validation = splits
    if kind == "all":

        def from_records(rows: Rows, shuffle: tuple[int, int] | None) -> "tf.data.Dataset":
            chosen = np.zeros(len(data.labels), bool)
            chosen[rows] = True
            return data.pictures(*(shuffle or ()), chosen=chosen).batch(batch_size).prefetch(2)

        return from_records, validation.pictures().batch(batch_size).prefetch(2)

    bottom = divide(backbone)[0]
    values = int(np.prod(bottom.output_shape[1:]))
    places = [notes / f"activations_{name}" for name in ("training", "validation")]
    missing = [split for split, place in zip(splits, places, strict=True) if not place.exists()]
    for place in places:
        disk.remove(place.with_name(f"{place.name}.part"))
    disk.check_space(notes, "fine-tuning", sum(features.estimate_bytes(len(each.labels), values) for each in missing))
    stored = [_stored(bottom, split, place, map) for split, place in zip(splits, places, strict=True)]

    def from_activations(rows: Rows, shuffle: tuple[int, int] | None) -> "tf.data.Dataset":
        return head.batches(*stored[0], batch_size, shuffle, rows)

    return from_activations, head.batches(*stored[1], batch_size)


def _stored(
    bottom: "keras.Model", split: Split, folder: Path, map: Callable[[Callable, Iterable], Iterable]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the activations of a split once; a resumed fine-tuning finds them in `folder`."""
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.part")
        draft.mkdir()
        batches = split.pictures().batch(features.BATCH).prefetch(2)
        for _ in features.extract(batches, len(split.labels), bottom, draft, map):
            pass
        draft.rename(folder)
    return features.load(folder)


def _hold_out(labels: np.ndarray, groups: Sequence[str], seed: int) -> tuple[Rows, Rows]:
    """Return the rows of the trial: those to train on, and those held out, whose labels are among the others."""
    rows = np.arange(len(labels))
    if len(rows) > TRIAL_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, TRIAL_ROWS, replace=False))
    held_out = folds.assign(labels[rows], np.array(groups)[rows].tolist(), TRIAL_FOLDS, seed) == 0
    fitted = rows[~held_out]
    return fitted, rows[held_out & np.isin(labels[rows], labels[fitted])]


def _measure(network: "keras.Model", samples: "tf.data.Dataset") -> tuple[float, float]:
    """Return the log loss and the accuracy."""
    loss = right = count = 0.0
    for inputs, labels in samples:
        truth = labels.numpy()
        probabilities = network.predict_on_batch(inputs)
        loss -= float(np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-7)).sum())
        right += int((probabilities.argmax(axis=1) == truth).sum())
        count += len(truth)
    return loss / count, right / count


def about(tuned: FineTunedModel) -> dict[str, Any]:
    """Return what is to be recorded of a fine-tuning, as JSON values."""
    return {"kept": tuned.backbone is not None, **(tuned.trial._asdict() if tuned.trial else {})}


def sentence(recorded: Mapping[str, Any]) -> str:
    """Return what `about` says, as a sentence."""
    if "held_out" not in recorded:
        return "The backbone was not fine-tuned: there were too few training images to hold enough out."
    return (
        f"Fine-tuning was {'kept' if recorded['kept'] else 'not kept'}: on {recorded['held_out']:,} held-out training "
        f"images it changed the log loss from {recorded['log_loss_head']:.4f} to {recorded['log_loss']:.4f} and the "
        f"accuracy from {recorded['accuracy_head']:.4f} to {recorded['accuracy']:.4f} after {recorded['epochs']} "
        "epochs, the number with the lowest log loss on these images."
    )
