"""The batches that fine-tuning trains on: images, or stored activations of a backbone's bottom."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline.training import features, folds
from dgmd_pipeline.training.backbone_cut import cut_backbone
from dgmd_pipeline.training.checkpoint import unusable_checkpoint
from dgmd_pipeline.training.features import LabeledFeatures, ParallelMap
from dgmd_pipeline.training.vectors import VectorFile
from dgmd_pipeline.workflow import disk, files

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

TRIAL_ROWS = 10_000  # maximum number of training images in the trial, see `fine_tuning.fine_tune`
TRIAL_FOLDS = 5  # number of folds in the trial; one fold is held out
ACTIVATIONS = "activations"  # prefix of the names of the folders with activations
VALUES, LABELS = "activations.npy", "labels.npy"  # files in each of these folders
Rows = np.ndarray  # int64, ascending: positions of images in the training split
# A function that returns the batches of some rows. The second argument is a seed and an epoch, which determine the
# order of the rows, or None, which keeps their order.
Batches = Callable[[Rows, tuple[int, int] | None], "tf.data.Dataset"]


class LabeledImages(NamedTuple):
    """The labels and records of a split."""

    labels: np.ndarray  # class indexes, int64 [n], in the order of the records
    read: Callable[..., "tf.data.Dataset"]  # `dataset.read`, already bound to the folder of the records


def open_batches(
    kind: str,
    backbone: "keras.Model",
    training: LabeledImages,
    validation: LabeledImages,
    batch_size: int,
    resume_dir: Path,
    map_batches: ParallelMap,
) -> tuple[Batches, "tf.data.Dataset"]:
    """Return two values: a function that returns the batches of chosen training rows, and the validation batches.

    For `kind` "all", the batches hold images. For "top", they hold the activations at the cut of the backbone (see
    `cut_backbone`), which are computed once and stored in `resume_dir`.

    Raises PipelineError if the disk has no room for activations, and UnusableCheckpoint if stored activations are
    damaged.
    """
    if kind == "all":

        def read_images(rows: Rows, shuffle: tuple[int, int] | None) -> "tf.data.Dataset":
            chosen = np.zeros(len(training.labels), bool)
            chosen[rows] = True
            return training.read(*(shuffle or ()), chosen=chosen).batch(batch_size).prefetch(2)

        return read_images, validation.read().batch(batch_size).prefetch(2)

    bottom = cut_backbone(backbone)[0]
    splits = {"training": training, "validation": validation}
    stored = _load_activations(bottom, splits, resume_dir, map_batches)

    def read_activations(rows: Rows, shuffle: tuple[int, int] | None) -> "tf.data.Dataset":
        return features.read_batches(stored["training"], batch_size, shuffle, rows)

    return read_activations, features.read_batches(stored["validation"], batch_size)


def _load_activations(
    bottom: "keras.Model", splits: dict[str, LabeledImages], resume_dir: Path, map_batches: ParallelMap
) -> dict[str, LabeledFeatures]:
    """Load the activations of each split if a stopped fine-tuning has stored them; otherwise compute and store them."""
    values = int(np.prod(bottom.output_shape[1:]))
    folders = {name: resume_dir / f"{ACTIVATIONS}_{name}" for name in splits}
    needed = 0
    for name, folder in folders.items():
        disk.remove(folder.with_name(f"{folder.name}.part"))
        needed += 0 if folder.exists() else features.estimate_bytes(len(splits[name].labels), values)
    disk.check_space(resume_dir, "fine-tuning", needed)
    for name, folder in folders.items():
        if not folder.exists():
            _extract_activations(bottom, splits[name], folder, map_batches)
    return {name: _load(folder) for name, folder in folders.items()}


def _extract_activations(bottom: "keras.Model", images: LabeledImages, folder: Path, map_batches: ParallelMap) -> None:
    """Write the activations of a split into a temporary folder. Rename it to `folder` when it is complete."""
    draft = folder.with_name(f"{folder.name}.part")
    draft.mkdir()
    batches = images.read().map(lambda image, _: image).batch(features.BATCH).prefetch(2)
    file, done = VectorFile(draft / VALUES, (len(images.labels), *bottom.output_shape[1:])), 0
    for block in features.extract(batches, bottom, map_batches):
        file.write(done, block)
        done += len(block)
    np.save(draft / LABELS, images.labels)
    files.sync(draft)
    draft.rename(folder)


def _load(folder: Path) -> LabeledFeatures:
    path = folder / VALUES
    try:
        values = np.load(path, mmap_mode="r")
        path = folder / LABELS
        return LabeledFeatures(values, np.load(path))
    except (OSError, EOFError, ValueError) as error:
        raise unusable_checkpoint(path, error) from error


def hold_out(labels: np.ndarray, groups: Sequence[str], seed: int) -> tuple[Rows, Rows]:
    """Return the rows that the trial trains on, and the rows that it holds out.

    Each label of the held-out rows also occurs in the rows that the trial trains on. `labels` (int [n]) and `groups`
    (n names) are the class index and the near-duplicate group of each row. A group is held out as a whole.
    """
    rows = np.arange(len(labels))
    if len(rows) > TRIAL_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, TRIAL_ROWS, replace=False))
    held_out = folds.assign(labels[rows], np.array(groups)[rows].tolist(), TRIAL_FOLDS, seed) == 0
    fitted = rows[~held_out]
    return fitted, rows[held_out & np.isin(labels[rows], labels[fitted])]
