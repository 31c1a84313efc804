"""Stored features or records -> a trained model, and its files.

A frozen backbone gets a head, and is fine-tuned where that is asked for and better; `cnn` is trained from scratch.
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import Fit
from dgmd_pipeline.training import config, dataset, features, fine_tuning, from_scratch, head, networks
from dgmd_pipeline.training.checkpoint import UnusableCheckpoint
from dgmd_pipeline.training.config import Epoch, TrainedModel, TrainingConfig
from dgmd_pipeline.workflow import disk

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)
OnEpoch = Callable[[Epoch], None]  # is called after each epoch and may raise to stop
MODEL, HISTORY, ABOUT = "model.keras", "history.csv", "training.json"


class TrainingData(NamedTuple):
    """What a model is trained on."""

    training: Path  # folder of stored features, or of records for `cnn`
    validation: Path
    groups: Sequence[str]  # the near-duplicate group of each training image, in the order of the records
    classes: int
    class_weights: Mapping[int, float]  # class index -> weight; 1 where it has none
    records: Sequence[Path]  # folders of training and validation records, for fine-tuning


class TrainingOptions(NamedTuple):
    """How a model is trained."""

    config: TrainingConfig
    head: str  # one of `head.HEADS`
    size: tuple[int, int]  # height and width of the model's images in pixels
    fit: Fit
    fine_tune: str  # one of `fine_tuning.KINDS`
    fine_tune_epochs: int
    fine_tune_learning_rate: float

    @classmethod
    def from_settings(cls, settings: Any) -> "TrainingOptions":
        """Return the options that settings with these names ask for."""
        return cls(
            TrainingConfig(**{name: getattr(settings, name) for name in TrainingConfig._fields}),
            settings.head,
            (settings.image_height, settings.image_width),
            settings.image_fit,
            settings.fine_tune,
            settings.fine_tune_epochs,
            settings.fine_tune_learning_rate,
        )


class FinishedTraining(NamedTuple):
    """A servable model, and what is recorded of its training."""

    model: "keras.Model"  # uint8 [n, height, width, 3] -> float32 [n, classes]
    history: Sequence[Epoch]
    seed: int
    selection: Mapping[str, Any] | None  # how the head was chosen, `head.about`; None for `cnn`
    fine_tuning: Mapping[str, Any] | None  # `fine_tuning.about`; None where it was not asked for

    @property
    def fine_tuned(self) -> bool:
        """Whether the backbone was changed, so that stored features are not its own."""
        return bool(self.fine_tuning and self.fine_tuning["kept"])

    @property
    def estimated_bytes(self) -> int:
        """About how many bytes the files take."""
        return networks.estimate_bytes(self.model)


def train(
    data: TrainingData,
    options: TrainingOptions,
    backbone: "keras.Model | None",
    resume_dir: Path,
    on_epoch: OnEpoch,
    map: Callable[[Callable, Iterable], Iterable] = map,
) -> FinishedTraining:
    """Train a head on the stored features of `backbone`, or `cnn` from scratch where that is None.

    `resume_dir` is an existing folder for checkpoints: a stopped training resumes there after its last epoch. A
    checkpoint that cannot be used is removed with a warning, and the training starts again. `map` is like the builtin
    one; it may call a function for its batches in threads, and yields in order.

    Raises Diverged where weights or a loss are not finite, PipelineError where the disk has no room.
    """
    if backbone is None:
        trained = _resume(partial(_train_cnn, data, options, on_epoch), resume_dir)
        return FinishedTraining(trained.model, trained.history, trained.seed, None, None)
    stored = [features.load(folder) for folder in (data.training, data.validation)]
    weights = dict(data.class_weights)
    fit_head = partial(
        head.train_head,
        stored[0],
        stored[1],
        data.groups,
        data.classes,
        weights,
        options.config,
        options.head,
        on_epoch,
    )
    trained = _resume(fit_head, resume_dir)
    parts, history, about = (backbone, trained.model), list(trained.history), None
    if options.fine_tune != "none":
        tuned = _fine_tune(data, options, backbone, trained, stored, resume_dir, on_epoch, map)
        about = fine_tuning.about(tuned)
        log.info("  %s", fine_tuning.sentence(about))
        if tuned.backbone and tuned.head:
            parts = tuned.backbone, tuned.head
            history += [row._replace(epoch=len(history) + row.epoch) for row in tuned.history]
    model = networks.assemble(*parts, options.fit)
    return FinishedTraining(model, history, trained.seed, trained.selection, about)


def _train_cnn(data: TrainingData, options: TrainingOptions, on_epoch: OnEpoch, checkpoint: Path) -> TrainedModel:
    return from_scratch.train_from_scratch(
        partial(dataset.read, data.training),
        dataset.read(data.validation),
        options.size,
        data.classes,
        dict(data.class_weights),
        options.config,
        on_epoch,
        checkpoint,
        options.fit,
    )


def _resume(train: Callable[[Path], TrainedModel], resume_dir: Path) -> TrainedModel:
    checkpoint = resume_dir / "training.npz"
    if checkpoint.exists():
        log.info("  Resuming training from the checkpoint")
    try:
        return train(checkpoint)
    except UnusableCheckpoint as error:
        log.warning("%s Training starts again.", error)
        for pattern in ("training.npz", "selection.json", f"{fine_tuning.CHECKPOINT}*", "activations_*"):
            for path in resume_dir.glob(pattern):
                disk.remove(path)
        return train(checkpoint)


def _fine_tune(
    data: TrainingData,
    options: TrainingOptions,
    backbone: "keras.Model",
    trained: TrainedModel,
    stored: Sequence[tuple[np.ndarray, np.ndarray]],
    resume_dir: Path,
    on_epoch: OnEpoch,
    map: Callable[[Callable, Iterable], Iterable],
) -> fine_tuning.FineTunedModel:
    """Fine-tune the backbone with its trained head; from the start where the checkpoint cannot be used."""
    weights = config.weights_by_class(data.classes, dict(data.class_weights))
    seeded = options.config._replace(seed=trained.seed)
    splits = [
        fine_tuning.Split(indexes, partial(dataset.read, folder))
        for (_, indexes), folder in zip(stored, data.records, strict=True)
    ]

    def fit_head(rows: np.ndarray) -> "keras.Model":
        vectors, indexes = stored[0]
        assert trained.selection  # noqa: S101 - a head on stored features always has one
        return head.refit((vectors[rows], indexes[rows]), trained.selection["chosen"], weights, seeded)

    slow = seeded._replace(epochs=options.fine_tune_epochs, learning_rate=options.fine_tune_learning_rate)
    tune = partial(
        fine_tuning.fine_tune, options.fine_tune, backbone, trained.model, fit_head, splits[0], splits[1], data.groups,
        weights, slow, on_epoch, resume_dir, map,
    )  # fmt: skip
    try:
        return tune()
    except UnusableCheckpoint as error:
        log.warning("%s Fine-tuning starts again.", error)
        for path in resume_dir.glob(f"{fine_tuning.CHECKPOINT}*"):
            path.unlink()
        return tune()


def write(trained: FinishedTraining, folder: Path) -> dict[str, Any]:
    """Write `model.keras`, `history.csv` and `training.json` into `folder`; return id and counts for the record."""
    trained.model.save(folder / MODEL)
    manifest.write(folder / HISTORY, Epoch, trained.history)
    last = trained.history[-1]
    about: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "kept": last.epoch,
        "seed": trained.seed,
        "metrics": last._asdict(),
        "fine_tuned": trained.fine_tuned,
    }
    if trained.fine_tuning:
        about["fine_tuning"] = trained.fine_tuning
    if trained.selection:
        about["head"] = trained.selection
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return {
        "id": about["id"],
        "epochs": len(trained.history),
        "head": trained.selection["chosen"]["kind"] if trained.selection else None,
        "fine_tuned": trained.fine_tuned,
        "accuracy": last.accuracy,
        "val_accuracy": last.val_accuracy,
        "parameters": trained.model.count_params(),
    }


def read(folder: Path) -> tuple[dict[str, Any], list[Epoch]]:
    """Return the content of `training.json` and `history.csv`."""
    return manifest.read_json(folder / ABOUT), list(manifest.read(folder / HISTORY, Epoch))


def summary(counts: Mapping[str, Any]) -> str:
    """Return what `write` counted, for the log."""
    how = "logistic regression" if counts["head"] == "linear" else f"{counts['epochs']} epochs"
    how += ", fine-tuned" if counts["fine_tuned"] else ""
    return (
        f"{how}: accuracy {counts['accuracy']:.4f}, validation {counts['val_accuracy']:.4f}; "
        f"{counts['parameters']:,} parameters"
    )
