"""Trains a servable model on stored features or records, and reads and writes the files of a training.

For a frozen backbone, a head is trained. Then, if FINE_TUNE is not `none`, the backbone and the head are fine-tuned
together. `cnn` is trained from scratch.
"""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NotRequired, Protocol, TypedDict, TypeVar

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.formatting import counted, percent
from dgmd_pipeline.manifest import Fit
from dgmd_pipeline.training import (
    dataset,
    feature_store,
    fine_tuning,
    from_scratch,
    head,
    head_selection,
    networks,
    runtime,
)
from dgmd_pipeline.training.checkpoint import UnusableCheckpoint, completed_epochs
from dgmd_pipeline.training.config import Epoch, OnEpoch, TrainedModel, TrainingConfig, weights_by_class
from dgmd_pipeline.training.features import LabeledFeatures, ParallelMap
from dgmd_pipeline.training.fine_tuning import FineTunedModel, FineTuningJson
from dgmd_pipeline.training.fine_tuning_data import ACTIVATIONS, LabeledImages
from dgmd_pipeline.workflow import disk

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)
MODEL, HISTORY, TRAINING = "model.keras", "history.csv", "training.json"
CHECKPOINT = "training.npz"
FINE_TUNING_FILES = (f"{fine_tuning.CHECKPOINT}*", f"{ACTIVATIONS}_*")  # patterns in the folder of checkpoints
T = TypeVar("T")


class TrainingData(NamedTuple):
    """The data of a training."""

    training: Path  # folder of stored features, or of records for `cnn`
    validation: Path
    groups: Sequence[str]  # near-duplicate group of each training image, in the order of the records
    classes: int
    class_weights: Mapping[int, float]  # class index -> weight; a missing weight is 1
    records: Sequence[Path]  # folders of the training and the validation records, for fine-tuning


class TrainingSettings(Protocol):
    """An object with the settings of a training: these attributes, and one for each field of TrainingConfig."""

    head: str
    image_height: int
    image_width: int
    image_fit: Fit
    fine_tune: str
    fine_tune_epochs: int
    fine_tune_learning_rate: float


class TrainingOptions(NamedTuple):
    """The settings of a training."""

    config: TrainingConfig
    head: str  # one of `head_selection.HEADS`
    size: tuple[int, int]  # height and width of the model's images in pixels
    fit: Fit
    fine_tune: str  # one of `fine_tuning.KINDS`
    fine_tune_epochs: int
    fine_tune_learning_rate: float

    @classmethod
    def from_settings(cls, settings: TrainingSettings) -> "TrainingOptions":
        """Return the options that the settings specify."""
        return cls(
            TrainingConfig(**{name: getattr(settings, name) for name in TrainingConfig._fields}),
            settings.head,
            (settings.image_height, settings.image_width),
            settings.image_fit,
            settings.fine_tune,
            settings.fine_tune_epochs,
            settings.fine_tune_learning_rate,
        )


class TrainingJson(TypedDict):
    """The content of training.json."""

    id: str  # unique identifier of this training, hexadecimal
    kept: int  # number (counted from 0) of the epoch whose weights the model has
    seed: int
    metrics: dict[str, float]  # metrics of the epoch `kept`
    fine_tuned: bool
    fine_tuning: NotRequired[FineTuningJson]
    head: NotRequired[head_selection.SelectionJson]


class FinishedTraining(NamedTuple):
    """A servable model and the data about its training that `write` saves."""

    id: str  # unique, hexadecimal
    model: "keras.Model"  # uint8 [n, height, width, 3] -> float32 [n, classes]
    history: Sequence[Epoch]
    seed: int
    selection: head_selection.Selection | None  # how cross-validation chose the head; None for `cnn`
    fine_tuning: FineTuningJson | None  # None if FINE_TUNE is none

    @property
    def fine_tuned(self) -> bool:
        """Whether fine-tuning has changed the backbone. Stored features do not apply to a changed backbone."""
        return bool(self.fine_tuning and self.fine_tuning["kept"])

    @property
    def estimated_bytes(self) -> int:
        """The approximate size of the files that `write` creates, in bytes."""
        return networks.estimate_bytes(self.model)

    @property
    def counts(self) -> dict[str, object]:
        """JSON values for the record of the step."""
        last = self.history[-1]
        return {
            "epochs": len(self.history),
            "head": self.selection.chosen.kind if self.selection else None,
            "fine_tuned": self.fine_tuned,
            "accuracy": last.accuracy,
            "val_accuracy": last.val_accuracy,
            "parameters": self.model.count_params(),
        }

    @property
    def summary(self) -> str:
        """The kind of training and its last metrics, for the log."""
        linear = self.selection is not None and self.selection.chosen.kind == "linear"
        kind = "logistic regression" if linear else counted(len(self.history), "epoch")
        last = self.history[-1]
        return (
            f"{kind}{', fine-tuned' if self.fine_tuned else ''}: accuracy {percent(last.accuracy)}, "
            f"validation {percent(last.val_accuracy)}; {self.model.count_params():,} parameters"
        )


def train(
    data: TrainingData,
    options: TrainingOptions,
    backbone: "Callable[[], keras.Model] | None",
    resume_dir: Path,
    on_epoch: OnEpoch,
    map_batches: ParallelMap = map,
) -> FinishedTraining:
    """Train a head on the stored features of a frozen network, or `cnn` from scratch if `backbone` is None.

    `backbone` returns the network. It may take a while, for example because it waits for a thread that imports
    TensorFlow and builds the network. So it is called only after the cross-validation of logistic regressions, which
    needs no TensorFlow.

    `resume_dir` is an existing folder for checkpoints. A stopped training resumes after its last completed epoch. If a
    checkpoint cannot be used, a warning is logged and the training starts again. `map_batches` is passed to
    `features.extract`.

    Raises Diverged if weights or a loss are not finite. Raises PipelineError if the disk is full or stored features are
    damaged.
    """
    if backbone is None:
        runtime.start_tensorflow()
        trained = _resume(partial(_train_cnn, data, options, on_epoch), resume_dir)
        return FinishedTraining(uuid.uuid4().hex, trained.model, trained.history, trained.seed, None, None)
    stored = [feature_store.load(folder) for folder in (data.training, data.validation)]
    trained = _resume(partial(_train_head, data, options, stored, backbone, on_epoch), resume_dir)
    parts, history, outcome = (backbone(), trained.model), list(trained.history), None
    if options.fine_tune != "none":
        tuned = _fine_tune(data, options, backbone(), trained, stored, resume_dir, on_epoch, map_batches)
        outcome = fine_tuning.to_json(tuned)
        log.info("  %s", fine_tuning.describe(outcome))
        if tuned.backbone and tuned.head:
            parts = tuned.backbone, tuned.head
            history += [row._replace(epoch=len(history) + row.epoch) for row in tuned.history]
    model = networks.assemble(*parts, options.fit)
    return FinishedTraining(uuid.uuid4().hex, model, history, trained.seed, trained.selection, outcome)


def _train_cnn(data: TrainingData, options: TrainingOptions, on_epoch: OnEpoch, checkpoint: Path) -> TrainedModel:
    return from_scratch.train_from_scratch(
        partial(dataset.read, data.training),
        dataset.read(data.validation),
        options.size,
        data.classes,
        data.class_weights,
        options.config,
        on_epoch,
        checkpoint,
        options.fit,
    )


def _train_head(
    data: TrainingData,
    options: TrainingOptions,
    stored: Sequence[LabeledFeatures],
    backbone: "Callable[[], keras.Model]",
    on_epoch: OnEpoch,
    checkpoint: Path,
) -> TrainedModel:
    return head.train_head(
        stored[0],
        stored[1],
        data.groups,
        data.classes,
        data.class_weights,
        options.config,
        options.head,
        on_epoch,
        checkpoint,
        prepare=backbone,
    )


def _fine_tune(
    data: TrainingData,
    options: TrainingOptions,
    backbone: "keras.Model",
    trained: TrainedModel,
    stored: Sequence[LabeledFeatures],
    resume_dir: Path,
    on_epoch: OnEpoch,
    map_batches: ParallelMap,
) -> FineTunedModel:
    """Fine-tune the backbone with its trained head."""
    weights = weights_by_class(data.classes, data.class_weights)
    config = options.config._replace(seed=trained.seed)
    training, validation = (
        LabeledImages(split.labels, partial(dataset.read, folder))
        for split, folder in zip(stored, data.records, strict=True)
    )

    def fit_head(rows: np.ndarray) -> "keras.Model":
        vectors, labels = stored[0]
        assert trained.selection  # noqa: S101 - `train_head` always sets it
        return head.refit(LabeledFeatures(vectors[rows], labels[rows]), trained.selection.chosen, weights, config)

    tune = partial(
        fine_tuning.fine_tune, options.fine_tune, backbone, trained.model, fit_head, training, validation, data.groups,
        weights, config._replace(epochs=options.fine_tune_epochs, learning_rate=options.fine_tune_learning_rate),
        on_epoch, resume_dir, map_batches,
    )  # fmt: skip
    return _restart_if_unusable(tune, resume_dir, "Fine-tuning", FINE_TUNING_FILES)


def _resume(train: Callable[[Path], TrainedModel], resume_dir: Path) -> TrainedModel:
    """Resume from the checkpoint in `resume_dir`, or start again if there is no usable checkpoint."""
    checkpoint = resume_dir / CHECKPOINT
    if checkpoint.exists():
        log.info("  Resuming training from the checkpoint")
    files = (CHECKPOINT, head_selection.FILE, *FINE_TUNING_FILES)
    return _restart_if_unusable(partial(train, checkpoint), resume_dir, "Training", files)


def describe_checkpoints(resume_dir: Path) -> str:
    """Return how a training continues from the checkpoints in `resume_dir`, as text; "" if it starts from scratch."""
    if any(resume_dir.glob(f"{fine_tuning.CHECKPOINT}*")):
        return "continues a stopped fine-tuning"
    epochs = completed_epochs(resume_dir / CHECKPOINT)
    if not epochs and not (resume_dir / head_selection.FILE).exists():
        return ""
    return f"continues a stopped training{f' after epoch {epochs}' if epochs else ''}"


def _restart_if_unusable(train: Callable[[], T], resume_dir: Path, what: str, files: Sequence[str]) -> T:
    """Call `train`. If a checkpoint cannot be used, remove the files that match `files`, and call `train` again."""
    try:
        return train()
    except UnusableCheckpoint as error:
        log.warning("%s %s starts again.", error, what)
        for pattern in files:
            for path in resume_dir.glob(pattern):
                disk.remove(path)
        return train()


def write(trained: FinishedTraining, folder: Path) -> None:
    """Write `model.keras`, `history.csv` and `training.json` into `folder`."""
    trained.model.save(folder / MODEL)
    manifest.write(folder / HISTORY, Epoch, trained.history)
    last = trained.history[-1]
    content: TrainingJson = {
        "id": trained.id,
        "kept": last.epoch,
        "seed": trained.seed,
        "metrics": last._asdict(),
        "fine_tuned": trained.fine_tuned,
    }
    if trained.fine_tuning:
        content["fine_tuning"] = trained.fine_tuning
    if trained.selection:
        content["head"] = head_selection.to_json(trained.selection)
    manifest.write_json(folder / TRAINING, content)


def read(folder: Path) -> tuple[TrainingJson, list[Epoch]]:
    """Return the content of `training.json` and `history.csv`. Raises PipelineError if a file is missing or changed."""
    return manifest.read_json(folder / TRAINING), list(manifest.read(folder / HISTORY, Epoch))
