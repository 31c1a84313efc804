"""Computes the feature vectors of a frozen backbone, and divides vectors into batches for a training."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline.training.vectors import Vectors

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

BATCH = 16  # images whose vectors a thread computes at a time; larger batches are not faster and take more memory
FEW = 64  # maximum number of images for which extraction is faster without a traced graph
ParallelMap = Callable[[Callable, Iterable], Iterable]  # like the builtin `map`: yields results in order


class LabeledFeatures(NamedTuple):
    """The features and labels of a split, in the order of its records."""

    vectors: Vectors  # float32 [n, d], or [n, height, width, d] if they are activations of the bottom of a backbone
    labels: np.ndarray  # class indexes, int64 [n]


def extract(
    batches: "Iterable[np.ndarray | tf.Tensor]",
    backbone: "keras.Model",
    map_batches: ParallelMap = map,
    few: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the feature vectors (float32 [batch, d]) of each batch of images, in order.

    `batches` are uint8 [batch, height, width, 3], of the backbone's input size. For the bottom part of a backbone, the
    features are float32 [batch, height, width, d]. `map_batches` may compute batches in threads. Only a few batches are
    in memory. If `few` is true, no graph is traced. This is faster for at most FEW images: 12 images take 1.1 s instead
    of 2.9 s.
    """
    yield from map_batches(partial(_call, backbone) if few else freeze(backbone), batches)


def _call(backbone: "keras.Model", images: "np.ndarray | tf.Tensor") -> np.ndarray:
    import tensorflow as tf

    return np.asarray(backbone(tf.cast(images, tf.float32), training=False))


def estimate_bytes(count: int, dimensions: int) -> int:
    """Return the size in bytes of `count` stored vectors, each with `dimensions` values and a label."""
    return count * (4 * dimensions + 8)


@lru_cache(maxsize=1)  # tracing takes 3 to 4 s, and both splits use the same backbone
def freeze(backbone: "keras.Model") -> "Callable[[np.ndarray | tf.Tensor], np.ndarray]":
    """Return a function from images (uint8 [batch, height, width, 3]) to their vectors (float32 [batch, d]).

    The variables become constants, so TensorFlow folds batch normalisation into the convolutions. This is faster: see
    docs/measurements/speed.md.
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
    """Return batches (features, labels) of at most `batch_size` rows. The sizes of the batches differ by at most one.

    `shuffle` is a seed and an epoch. The order depends only on these two numbers. If `shuffle` is None, the rows keep
    their order. `rows` (int64) are the positions to take; None takes all positions.
    """
    import tensorflow as tf

    vectors, labels = data
    batches = divide_rows(np.arange(len(labels)) if rows is None else rows, batch_size, shuffle)

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in batches:
            yield vectors[batch], labels[batch]

    spec = (tf.TensorSpec([None, *vectors.shape[1:]], tf.float32), tf.TensorSpec([None], tf.int64))
    batched = tf.data.Dataset.from_generator(generate, output_signature=spec)
    return batched.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(2)


def divide_rows(rows: np.ndarray, batch_size: int, shuffle: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Divide rows (int64 [n]) into batches, and return the rows of each batch.

    `batch_size`, `shuffle` and the sizes of the batches are as in `read_batches`.
    """
    order = rows.copy()
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(order)
    # The rows of a batch are sorted, so that they are read in the order of the file.
    return [np.sort(batch) for batch in np.array_split(order, -(-len(order) // batch_size))]
