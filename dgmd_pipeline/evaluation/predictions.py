"""A model's predictions for labelled images, and the file of these predictions."""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.training.vectors import Vectors

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

PREDICTIONS = "predictions.npz"
TOP = 20  # the file has this many of the most probable classes of each image
# The file has all probabilities if they take at most MAX_BYTES. For 200,000 images of 1,000 classes, they would take
# 800 MB, and 729 MB compressed.
MAX_BYTES = 64_000_000
BLOCK = 256  # images that are ranked at a time; their probabilities of 1,000 classes fit into the cache of a core


@dataclass(frozen=True, eq=False)
class PredictedLabels:
    """The labels that a model predicts for n labelled images."""

    predicted: np.ndarray  # int64 [n], class index
    truth: np.ndarray  # int64 [n], class index of the true label
    labels: Sequence[str]  # by class index

    @property
    def correct(self) -> np.ndarray:
        """Return whether the predicted label is the true one, bool [n]."""
        return self.predicted == self.truth


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's probabilities for n labelled images. The array is large, so no code copies it."""

    probabilities: np.ndarray  # float [n, classes], at least 0
    truth: np.ndarray  # int64 [n], class index of the true label
    labels: Sequence[str]  # by class index
    keys: Sequence[str]  # path of each image below raw/

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.truth)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Return the index of the most probable class of each image, int64 [n].

        If several classes are equally probable, the lowest index is returned.
        """
        return self.probabilities.argmax(axis=1)

    @cached_property
    def correct(self) -> np.ndarray:
        """Return whether the predicted label is the true one, bool [n]."""
        return self.predicted == self.truth

    @cached_property
    def confidence(self) -> np.ndarray:
        """Return the probability of the predicted label, float [n]."""
        return _at(self.probabilities, self.predicted)

    @cached_property
    def of_truth(self) -> np.ndarray:
        """Return the probability of the true label, float [n]."""
        return _at(self.probabilities, self.truth)

    def true_ranks(self) -> np.ndarray:
        """Return the rank of the true label by probability, int64 [n], from 0. Ties are in class order."""
        found, classes = np.empty(len(self), np.int64), np.arange(len(self.labels))
        for block in _blocks(len(self)):
            probabilities, own = self.probabilities[block], self.of_truth[block, None]
            before = (probabilities == own) & (classes < self.truth[block, None])
            found[block] = np.count_nonzero((probabilities > own) | before, axis=1)
        return found

    def top(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable classes of each image, int32 [n, count], and their probabilities, float32.

        The most probable class comes first. Equally probable classes are in class order.
        """
        count = min(count, self.probabilities.shape[1])
        shape = (len(self), count)
        classes, probabilities = np.empty(shape, np.int32), np.empty(shape, np.float32)
        from_last = np.arange(self.probabilities.shape[1], dtype=np.int64)[::-1]
        for block in _blocks(len(self)):
            # Each probability and its class become one 64-bit integer. The upper half has the bits of the float32
            # probability: for floats from 0 upwards, the bits sort like the floats. The lower half has the class,
            # counted from the last class. So of two equal probabilities, the one of the first class has the larger
            # integer. `partition` of these integers is twice as fast as `argpartition` of the probabilities.
            bits = np.asarray(self.probabilities[block], np.float32).view(np.int32).astype(np.int64)
            numbers = np.partition(bits << 32 | from_last, len(from_last) - count, axis=1)[:, -count:]
            numbers = -np.sort(-numbers, axis=1)
            classes[block] = len(from_last) - 1 - (numbers & 0xFFFFFFFF)
            probabilities[block] = (numbers >> 32).astype(np.int32).view(np.float32)
        return classes, probabilities


def _blocks(images: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, images, BLOCK))


def _at(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return probabilities[np.arange(len(classes)), classes]


def predict(network: "keras.Model", images: "tf.data.Dataset", batch: int = 64) -> Iterator[np.ndarray]:
    """Yield the probabilities (float32 [m, classes]) of images.

    `images` has pairs of an image (uint8 [height, width, 3]) and a class index.
    """
    for pixels, _ in images.batch(batch).prefetch(2):
        yield network.predict_on_batch(pixels)


def predict_head(network: "keras.Model", features: Vectors, batch: int = 1024) -> Iterator[np.ndarray]:
    """Yield the probabilities (float32 [m, classes]) of stored features (float32 [n, d]).

    The features are the output of the frozen backbone, so only the network's head runs.
    """
    head = network.get_layer("head")
    for start in range(0, len(features), batch):
        yield head.predict_on_batch(np.asarray(features[start : start + batch]))


def gather(blocks: Iterable[np.ndarray], images: int, classes: int) -> np.ndarray:
    """Return blocks (float32 [m, classes]) as one array [images, classes].

    Besides the array, only one block at a time is in memory.

    Raises ValueError if the blocks do not have `images` rows in total.
    """
    found, done = np.empty((images, classes), np.float32), 0
    for block in blocks:
        found[done : done + len(block)] = block
        done += len(block)
    if done != images:
        raise ValueError(f"expected probabilities of {images:,} images, got {done:,}")
    return found


def write(predictions: Predictions, folder: Path) -> None:
    """Write `predictions.npz`, which docs/for-ml-engineers.md describes.

    The file has the TOP most probable classes of each image, and all probabilities if they take at most MAX_BYTES.
    """
    classes, probabilities = predictions.top(TOP)
    arrays = {
        "truth": predictions.truth.astype(np.int64),
        "keys": np.array(predictions.keys, dtype=np.str_),
        "top_classes": classes,
        "top_probabilities": probabilities,
        "true_probabilities": predictions.of_truth.astype(np.float32),
    }
    if 4 * predictions.probabilities.size <= MAX_BYTES:
        arrays["probabilities"] = predictions.probabilities.astype(np.float32)
    # `np.savez_compressed` always uses level 6. Level 6 takes 5 times as long as level 1 and saves 3 % of the bytes.
    with zipfile.ZipFile(folder / PREDICTIONS, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
