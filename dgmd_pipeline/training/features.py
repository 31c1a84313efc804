"""Record -> feature vector: the frozen backbone's output for every picture, stored once, used in every epoch."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

FEATURES = "features.npy"
LABELS = "labels.npy"
BATCH = 16  # pictures in each thread; larger batches are not faster and take more memory


def extract(
    batches: Iterable[tuple[Any, Any]],
    count: int,
    backbone: "keras.Model",
    folder: Path,
    map: Callable[[Callable, Iterable], Iterable] = map,
) -> Iterator[int]:
    """Write `features.npy` (float32 [count, d]) and `labels.npy` (int64 [count]) into `folder`, in the order they come.

    `backbone` may also be the bottom of one, whose output has more dimensions: float32 [count, height, width, d].

    `batches` are pairs of pictures (uint8 [batch, height, width, 3], of the backbone's size) and label indexes (int
    [batch]), as tensors or arrays; `count` pictures in all.
    `map` is like the builtin one; it may call the function for its batches in threads, and yields in order.
    Yields how many pictures each batch had; nothing but a few batches and the labels is held in memory. Raises
    ValueError where there are more or fewer than `count`.
    """
    forward = freeze(backbone)

    def work(batch: tuple[Any, Any]) -> tuple[bytes, np.ndarray]:
        pictures, indexes = batch
        return forward(pictures).astype("<f4", copy=False).tobytes(), np.asarray(indexes, np.int64)

    labels: list[np.ndarray] = []
    done = 0
    with (folder / FEATURES).open("wb") as file:
        # Written in sequence and not through a memory map, whose pages would count as this process's memory.
        shape = (count, *backbone.output_shape[1:])
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for vectors, indexes in map(work, batches):
            file.write(vectors)
            labels.append(indexes)
            done += len(labels[-1])
            yield len(labels[-1])
    if done != count:
        raise ValueError(f"{folder}: expected {count} pictures, the records held {done}")
    np.save(folder / LABELS, np.concatenate(labels) if labels else np.empty(0, np.int64))


def estimate_bytes(count: int, dimensions: int) -> int:
    """Return how many bytes `extract` writes for so many pictures and values for each, but for the files' heads."""
    return count * (4 * dimensions + 8)


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Open what `extract` wrote: features (float32 [n, d], mapped from disk and read as needed), labels (int64 [n])."""
    return np.load(folder / FEATURES, mmap_mode="r"), np.load(folder / LABELS)


@lru_cache(maxsize=1)  # 3 to 4 s; both sides go through the same backbone
def freeze(backbone: "keras.Model") -> Callable[[Any], np.ndarray]:
    """Return a function from pictures (uint8 [batch, height, width, 3]) to their vectors (float32 [batch, d]).

    Where variables are constants, TensorFlow folds batch normalisation into the convolutions: docs/measurements.md.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    pictures = tf.TensorSpec([None, *backbone.input_shape[1:]], tf.uint8)
    call = tf.function(lambda x: backbone(tf.cast(x, tf.float32), training=False), autograph=False)
    frozen = convert_variables_to_constants_v2(call.get_concrete_function(pictures))
    return lambda x: np.asarray(frozen(tf.convert_to_tensor(x))[0])
