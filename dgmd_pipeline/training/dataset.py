"""Opens TFRecord shards as `tf.data` datasets."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.manifest import ShardIndex, read_records, read_shard_index

if TYPE_CHECKING:
    import tensorflow as tf

# Number of shards that are read in parallel for a shuffled order. It is a constant, so that the order is the same on
# every machine.
SHARDS_AT_ONCE = 16
IMAGES_AT_ONCE = 32  # encoded images that TensorFlow takes from Python in one call
# Size of the encoded images in the shuffle buffer. A small buffer suffices, because the stored order already mixes
# labels.
SHUFFLE_BYTES = 128 * 2**20


def read(folder: Path, seed: int | None = None, epoch: int = 0, chosen: np.ndarray | None = None) -> "tf.data.Dataset":
    """Open a folder of shards as a dataset of (image uint8 [height, width, 3], label int64 []), each image once.

    Without `seed`, the images are in the order of the files, like the result of `keys`. With `seed`, the shards and
    their records are shuffled. The shuffled order depends only on `seed`, `epoch` and the global seed of TensorFlow, so
    it is the same in every process. Images are decoded in parallel; the caller makes batches. `chosen` (bool [images],
    in the order of the files) selects the images to read; None selects all.
    Raises PipelineError if there is no readable index. A damaged record raises TensorFlow's DataLossError.
    """
    import tensorflow as tf

    index = read_shard_index(folder)
    shape = (index.height, index.width, 3)
    schema = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}

    def decode(record: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        features = tf.io.parse_single_example(record, schema)
        image = tf.io.decode_webp(features["image"], channels=3)[0]  # the result has one frame
        return tf.ensure_shape(image, shape), features["label"]

    random = None if seed is None else np.random.default_rng((seed, epoch))
    records = _open_records(folder, index, random, chosen).map(
        decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    options = tf.data.Options()
    # TensorFlow's autotune thread sleeps for 10 ms, then 20 ms, then 40 ms, and so on. A pass over the data ends only
    # when this thread wakes, so a pass could take up to 10 s longer. Without autotuning, the number of threads is the
    # number of cores.
    options.autotune.enabled = False
    count = index.images if chosen is None else int(chosen.sum())
    return records.apply(tf.data.experimental.assert_cardinality(count)).with_options(options)


def read_images(folder: Path, positions: np.ndarray) -> "tf.data.Dataset":
    """Return the images at `positions` (int64, ascending) among all records of a folder: uint8 [height, width, 3].

    Other images are not read. Raises PipelineError if there is no readable index.
    """
    import tensorflow as tf

    index, records = read_shard_index(folder), read_records(folder)
    shape = (index.height, index.width, 3)
    ends = np.cumsum([shard.records for shard in index.shards])

    def read_encoded() -> Iterator[list[bytes]]:
        shard_of = np.searchsorted(ends, positions, side="right")
        for number in np.unique(shard_of).tolist():
            of_shard = records[positions[shard_of == number]]
            starts = (of_shard["start"] + of_shard["image"]).tolist()
            places = [*zip(starts, of_shard["image_length"].tolist(), strict=True)]
            with (folder / index.shards[number].file).open("rb") as file:
                for first in range(0, len(places), IMAGES_AT_ONCE):
                    found = []
                    for start, length in places[first : first + IMAGES_AT_ONCE]:
                        file.seek(start)
                        found.append(file.read(length))
                    yield found

    def decode(encoded: "tf.Tensor") -> "tf.Tensor":
        return tf.ensure_shape(tf.io.decode_webp(encoded, channels=3)[0], shape)

    encoded = tf.data.Dataset.from_generator(read_encoded, output_signature=tf.TensorSpec([None], tf.string))
    images = encoded.unbatch().map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    options = tf.data.Options()
    options.autotune.enabled = False  # as in `read`
    return images.apply(tf.data.experimental.assert_cardinality(len(positions))).with_options(options)


def keys(folder: Path) -> list[str]:
    """Return the path below raw/ of each image, in the order in which `read` without a seed returns the images."""
    import tensorflow as tf

    schema = {"key": tf.io.FixedLenFeature([], tf.string)}
    records = _open_records(folder, read_shard_index(folder), None).batch(1024)
    batches = records.map(lambda batch: tf.io.parse_example(batch, schema)["key"]).as_numpy_iterator()
    return [key.decode("utf-8", "surrogateescape") for batch in batches for key in batch]


def _open_records(
    folder: Path, index: ShardIndex, random: np.random.Generator | None, chosen: np.ndarray | None = None
) -> "tf.data.Dataset":
    import tensorflow as tf

    def open_shard(path: "tf.Tensor", first: "tf.Tensor") -> "tf.data.Dataset":
        """Open a file. `first` is the position of its first record among all records of the folder."""
        records = tf.data.TFRecordDataset(path)
        if chosen is None:
            return records
        numbered = records.enumerate(first).filter(lambda position, _: tf.gather(chosen, position))
        return numbered.map(lambda _, record: record)

    firsts = np.cumsum([0, *(shard.records for shard in index.shards)])
    order = np.arange(len(index.shards))
    if random is not None:
        random.shuffle(order)
    paths = [str(folder / index.shards[number].file) for number in order]
    files = tf.data.Dataset.from_tensor_slices((tf.constant(paths, tf.string), firsts[order]))
    if random is None:
        return files.flat_map(open_shard)
    buffer = SHUFFLE_BYTES * index.images // max(index.bytes, 1)
    records = files.interleave(open_shard, SHARDS_AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    # With `reshuffle_each_iteration`, each iteration over the dataset would have another order.
    return records.shuffle(
        max(min(buffer, index.images), 1), seed=int(random.integers(2**63)), reshuffle_each_iteration=False
    )
