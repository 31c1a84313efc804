"""Images -> stored feature vectors of a frozen backbone -> batches to train on."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline import manifest

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

FEATURES = "features.npy"
LABELS = "labels.npy"
BATCH = 16  # images in each thread; larger batches are not faster and take more memory
ParallelMap = Callable[[Callable, Iterable], Iterable]  # like the builtin `map`: yields results in order


class LabeledFeatures(NamedTuple):
    """The features and labels of a split, in the order of its records."""

    vectors: np.ndarray  # float32 [n, d], or [n, height, width, d] at a cut; mapped from disk where `load` opened it
    labels: np.ndarray  # class indexes, int64 [n]


def extract(
    batches: "Iterable[tuple[np.ndarray | tf.Tensor, np.ndarray | tf.Tensor]]",
    count: int,
    backbone: "keras.Model",
    folder: Path,
    map_batches: ParallelMap = map,
) -> Iterator[int]:
    """Write `features.npy` (float32 [count, d]) and `labels.npy` (int64 [count]) into `folder`, in the order of input.

    `batches` are pairs of images (uint8 [batch, height, width, 3], of the backbone's size) and class indexes (int
    [batch]), as tensors or arrays, `count` images in all. For the bottom part of a backbone the features are float32
    [count, height, width, d]. `map_batches` may compute batches in threads.

    Yields the number of images in each batch. Only a few batches and the labels are in memory. Raises ValueError where
    the number of images is not `count`.
    """
    forward = freeze(backbone)

    def compute(batch: "tuple[np.ndarray | tf.Tensor, np.ndarray | tf.Tensor]") -> tuple[bytes, np.ndarray]:
        images, indexes = batch
        return forward(images).astype("<f4", copy=False).tobytes(), np.asarray(indexes, np.int64)

    labels: list[np.ndarray] = []
    done = 0
    with (folder / FEATURES).open("wb") as file:
        # Written in sequence and not through a memory map, whose pages would count as memory of this process.
        shape = (count, *backbone.output_shape[1:])
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for vectors, indexes in map_batches(compute, batches):
            file.write(vectors)
            labels.append(indexes)
            done += len(indexes)
            yield len(indexes)
    if done != count:
        raise ValueError(f"{folder}: expected {count} images, the records held {done}")
    np.save(folder / LABELS, np.concatenate(labels) if labels else np.empty(0, np.int64))


def estimate_bytes(count: int, dimensions: int) -> int:
    """Return how many bytes `extract` writes for `count` images of `dimensions` values each, file headers excluded."""
    return count * (4 * dimensions + 8)


def load(folder: Path) -> LabeledFeatures:
    """Open what `extract` wrote. Features are mapped from disk and read when they are used.

    Raises PipelineError where a file is missing or damaged.
    """
    path = folder / FEATURES
    try:
        vectors = np.load(path, mmap_mode="r")
        path = folder / LABELS
        return LabeledFeatures(vectors, np.load(path))
    except (OSError, EOFError, ValueError) as error:
        raise manifest.changed_file_error(path, error) from error


@lru_cache(maxsize=1)  # tracing takes 3 to 4 s, and both splits use the same backbone
def freeze(backbone: "keras.Model") -> "Callable[[np.ndarray | tf.Tensor], np.ndarray]":
    """Return a function from images (uint8 [batch, height, width, 3]) to their vectors (float32 [batch, d]).

    Its variables are constants, so TensorFlow folds batch normalisation into the convolutions: docs/measurements.md.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    images = tf.TensorSpec([None, *backbone.input_shape[1:]], tf.uint8)
    call = tf.function(lambda x: backbone(tf.cast(x, tf.float32), training=False), autograph=False)
    frozen = convert_variables_to_constants_v2(call.get_concrete_function(images))
    return lambda x: np.asarray(frozen(tf.convert_to_tensor(x))[0])


def read_batches(
    data: LabeledFeatures,
    batch_size: int,
    shuffle: tuple[int, int] | None = None,
    rows: np.ndarray | None = None,
) -> "tf.data.Dataset":
    """Return batches (features, labels) whose sizes differ by at most one.

    `shuffle` is a seed and an epoch; the order depends on these alone. None keeps the order of the rows. `rows` (int64)
    are the positions to take; None takes all.
    """
    import tensorflow as tf

    vectors, labels = data
    selected = np.arange(len(labels)) if rows is None else rows
    count = -(-len(selected) // batch_size)

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = selected.copy()
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(order)
        for batch in np.array_split(order, count):
            batch.sort()  # read in the order of the file
            yield vectors[batch], labels[batch]

    spec = (tf.TensorSpec([None, *vectors.shape[1:]], tf.float32), tf.TensorSpec([None], tf.int64))
    batched = tf.data.Dataset.from_generator(generate, output_signature=spec)
    return batched.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2)
