"""Fine-tunes a frozen backbone together with its trained head.

The result is kept only if it is better than the same head on the frozen backbone. Fine-tuning trains the backbone and
the head at a low learning rate, after the head alone has been trained. Source: Kumar et al., "Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution", ICLR 2022.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from dgmd_pipeline.formatting import counted, percent
from dgmd_pipeline.training import early_stopping, loop, runtime
from dgmd_pipeline.training.backbone_cut import cut_backbone
from dgmd_pipeline.training.checkpoint import TrainingState, load_or_start
from dgmd_pipeline.training.config import Epoch, OnEpoch, TrainingConfig
from dgmd_pipeline.training.features import ParallelMap
from dgmd_pipeline.training.fine_tuning_data import Batches, LabeledImages, Rows, hold_out, open_batches

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

KINDS = ("none", "top", "all")
BATCH_SIZE = 32  # maximum number of images in a batch; gradients take at least 60 MB of memory for each image
DECAY_RATE = 1.0  # replaces the decay rate of the configuration
MIN_HELD_OUT = 10  # minimum number of held-out images; with fewer images, an epoch can have a low log loss by chance
CHECKPOINT = "fine_tuning"  # prefix of the names of the checkpoint files


class Trial(NamedTuple):
    """Metrics of the head alone (on the frozen backbone) and of the fine-tuned model, on held-out training images."""

    held_out: int  # number of held-out images; neither model was trained on them
    log_loss_head: float  # nats
    log_loss: float  # nats; of the fine-tuned model after `epochs` epochs
    accuracy_head: float  # 0 to 1
    accuracy: float  # 0 to 1; of the fine-tuned model after `epochs` epochs
    epochs: int  # number of epochs after which the log loss is lowest; the final fit has the same number

    @property
    def better(self) -> bool:
        """Whether the fine-tuned model has a lower log loss than the head alone.

        The log loss depends on the probability of every image. The accuracy depends only on images near the boundary
        between two classes. So the log loss needs fewer images to distinguish two models. It also rejects a model with
        a higher accuracy but worse probabilities. For the same reasons, the log loss determines the number of epochs.
        After the best epoch, the log loss rises while the accuracy stays the same (docs/measurements/fine-tuning.md).
        """
        return self.log_loss < self.log_loss_head


class FineTunedModel(NamedTuple):
    """A fine-tuned backbone and head. Both are None if the trial was not `better` or was not possible."""

    backbone: "keras.Model | None"
    head: "keras.Model | None"
    history: list[Epoch]  # epochs of the final fit, see `fine_tune`; empty if there was none
    trial: Trial | None  # None if fewer than MIN_HELD_OUT images could be held out


class FineTuningJson(TypedDict, total=False):
    """The outcome of fine-tuning in training.json: `kept`, and the fields of the trial if there was one."""

    kept: bool
    held_out: int
    log_loss_head: float
    log_loss: float
    accuracy_head: float
    accuracy: float
    epochs: int


def fine_tune(
    kind: str,
    backbone: "keras.Model",
    trained_head: "keras.Model",
    fit_head: Callable[[Rows], "keras.Model"],
    training: LabeledImages,
    validation: LabeledImages,
    groups: Sequence[str],
    class_weights: np.ndarray,
    config: TrainingConfig,
    on_epoch: OnEpoch,
    resume_dir: Path,
    map_batches: ParallelMap = map,
) -> FineTunedModel:
    """Train the last blocks of a backbone (`kind` "top") or all of it ("all") together with a trained head.

    A trial comes first. It takes at most TRIAL_ROWS training images, and holds out a fifth of them. `fit_head` fits a
    new head to the other four fifths. Then the trial fine-tunes the backbone with this head on the four fifths for
    `config.epochs` epochs. After each epoch, the model is measured on the held-out images. `groups` are the
    near-duplicate groups of the training images; a group is held out as a whole.

    If the trial is `better`, the final fit trains on the whole training split, starting from `trained_head`, with the
    trial's best number of epochs. After each of these epochs, the model is measured on `validation`, which does not
    affect the training. `backbone` and `trained_head` are not changed.

    `class_weights` are float32 [classes]. `config` has a seed, which makes the result repeatable on a CPU. `on_epoch`
    is called after each epoch of the trial and of the final fit. `resume_dir` is an existing folder for activations and
    checkpoints. With the same folder, data and configuration, a stopped fine-tuning resumes after its last completed
    epoch. `map_batches` is passed to `features.extract`.

    Raises PipelineError if the disk has no room for the activations, or if weights are not finite. Raises
    UnusableCheckpoint if a file in `resume_dir` is damaged.
    """
    config = config._replace(batch_size=min(config.batch_size, BATCH_SIZE), decay_rate=DECAY_RATE)
    read, val_batches = open_batches(kind, backbone, training, validation, config.batch_size, resume_dir, map_batches)
    fitter = _Fitter(kind, backbone, read, class_weights, config, on_epoch, resume_dir)
    fitted_rows, held_out_rows = hold_out(training.labels, groups, int(config.seed or 0))
    if len(held_out_rows) < MIN_HELD_OUT:
        return FineTunedModel(None, None, [], None)
    trial = fitter.run_trial(fit_head(fitted_rows), fitted_rows, held_out_rows)
    if not trial.better:
        return FineTunedModel(None, None, [], trial)
    final = fitter.start("final", trained_head, trial.epochs)
    history = fitter.fit(final, np.arange(len(training.labels)), val_batches)
    return FineTunedModel(final.backbone, final.head, history, trial)


class _Fit(NamedTuple):
    """The networks, the configuration and the saved state of one fit: the trial or the final fit."""

    backbone: "keras.Model"  # a trainable copy: see `clone_trainable`
    head: "keras.Model"  # a trainable copy
    trained: "keras.Model"  # the part of `backbone` that is trained, followed by `head`; shares their weights
    config: TrainingConfig
    state: TrainingState
    checkpoint: Path


class _Fitter(NamedTuple):
    """The arguments of `fine_tune` that the trial and the final fit share."""

    kind: str
    backbone: "keras.Model"
    read: Batches  # returns batches of the training split
    class_weights: np.ndarray
    config: TrainingConfig
    on_epoch: OnEpoch
    resume_dir: Path

    def run_trial(self, head: "keras.Model", fitted_rows: Rows, held_out_rows: Rows) -> Trial:
        """Fine-tune the backbone with `head` on `fitted_rows`, to which `head` was fitted.

        The model is measured on `held_out_rows` before the first epoch and after each epoch.
        """
        held_out = self.read(held_out_rows, None)
        fit = self.start("trial", head, self.config.epochs)
        log_loss, accuracy = _measure(fit.trained, held_out)
        history = self.fit(fit, fitted_rows, held_out)
        best = early_stopping.best_epoch(history)
        return Trial(len(held_out_rows), log_loss, best.val_loss, accuracy, best.val_accuracy, best.epoch + 1)

    def start(self, name: str, head: "keras.Model", epochs: int) -> _Fit:
        """Copy the backbone and `head`. If a fit with this name was stopped, load its state."""
        import keras

        config, checkpoint = self.config._replace(epochs=epochs), self.resume_dir / f"{CHECKPOINT}_{name}.npz"
        state = load_or_start(config, checkpoint)
        runtime.set_seed(state.seed)  # determines the random numbers of the dropout layers in the copies
        backbone, head = clone_trainable(self.backbone), clone_trainable(head)
        part = cut_backbone(backbone)[1] if self.kind == "top" else backbone
        trained = keras.Model(part.input, head(part.output))
        return _Fit(backbone, head, trained, config, state, checkpoint)

    def fit(self, fit: _Fit, rows: Rows, val_batches: "tf.data.Dataset") -> list[Epoch]:
        """Train on `rows` of the training split until `fit.config.epochs` epochs are completed.

        Return these epochs. They include epochs that an interrupted run completed.
        """
        log_epochs = loop.log_epochs(self.on_epoch, fit.config.epochs)

        def shuffled_batches(epoch: int) -> "tf.data.Dataset":
            return self.read(rows, (fit.state.seed, epoch))

        return loop.fit(
            fit.trained, shuffled_batches, val_batches, self.class_weights, fit.config, fit.state, log_epochs,
            fit.checkpoint,
        ).history  # fmt: skip


def clone_trainable(network: "keras.Model") -> "keras.Model":
    """Return a copy of a network in which every layer except batch normalisation is trainable.

    During training, a frozen batch normalisation layer uses its stored statistics, which were computed on a million
    images. The statistics of a few small batches would be worse.
    """
    import keras

    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    for layer in copy.layers:  # `copy.trainable = True` would not change layers that were built as frozen
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    return copy


def _measure(network: "keras.Model", batches: "tf.data.Dataset") -> tuple[float, float]:
    """Return the log loss in nats and the accuracy."""
    loss = correct = count = 0.0
    for inputs, labels in batches:
        truth = labels.numpy()
        probabilities = network.predict_on_batch(inputs)
        loss -= float(np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-7)).sum())
        correct += int((probabilities.argmax(axis=1) == truth).sum())
        count += len(truth)
    return loss / count, correct / count


def to_json(tuned: FineTunedModel) -> FineTuningJson:
    """Return the outcome of fine-tuning as JSON values."""
    kept, trial = tuned.backbone is not None, tuned.trial
    if trial is None:
        return {"kept": kept}
    return {
        "kept": kept,
        "held_out": trial.held_out,
        "log_loss_head": trial.log_loss_head,
        "log_loss": trial.log_loss,
        "accuracy_head": trial.accuracy_head,
        "accuracy": trial.accuracy,
        "epochs": trial.epochs,
    }


def describe(outcome: FineTuningJson) -> str:
    """Return the outcome of fine-tuning as a sentence."""
    if "held_out" not in outcome:
        return "The backbone was not fine-tuned, because too few training images could be held out."
    return (
        f"Fine-tuning was {'kept' if outcome['kept'] else 'not kept'}. On {outcome['held_out']:,} held-out training "
        f"images, it changed the log loss from {outcome['log_loss_head']:.4f} to {outcome['log_loss']:.4f} and the "
        f"accuracy from {percent(outcome['accuracy_head'])} to {percent(outcome['accuracy'])}. Both new values were "
        f"measured after {counted(outcome['epochs'], 'epoch')}, when the log loss was lowest."
    )
