"""The second baseline of `whole_run.py`: a script that passes each image through the frozen network once.

It downloads in threads, converts with tf.data on all cores, calls `predict` once for each split and `fit` on the stored
features, and logs the whole model to MLflow with its defaults. It prints the seconds of each part.

    python -m benchmarks.baseline_features FOLDER [--again]

`--again` trains on the features of an earlier run.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import baseline
from benchmarks.baseline import BATCH, HEIGHT, SPLITS, WIDTH

DOWNLOADS = 16  # at a time


def download(folder: Path) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=DOWNLOADS))
    bucket, prefix = os.environ["AWS_DATA_BUCKET"], os.environ["AWS_DATA_PATH"]
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [item["Key"] for page in pages for item in page["Contents"]]
    paths = [folder / key.removeprefix(f"{prefix}/") for key in keys]
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(DOWNLOADS) as threads:
        list(threads.map(lambda key, path: client.download_file(bucket, key, str(path)), keys, paths))


def convert(source: Path, target: Path) -> None:
    import tensorflow as tf

    names = sorted(path.name for path in source.iterdir())
    paths = [str(path) for path in source.glob("*/*")]
    labels = [names.index(Path(path).parent.name) for path in paths]

    def encode(path, label):
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        image.set_shape([None, None, 3])
        small = tf.cast(tf.round(tf.image.resize(image, (HEIGHT, WIDTH))), tf.uint8)
        return tf.io.encode_jpeg(small), label

    images = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths))
    with tf.io.TFRecordWriter(str(target)) as writer:
        for image, label in images.map(encode, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE):
            features = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.numpy()])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label.numpy()])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def extract(folder: Path) -> None:
    import numpy as np
    import tensorflow as tf

    network = baseline.frozen_backbone()
    for split in SPLITS:
        path = folder / f"{split}.tfrecord"
        images = baseline.read(path).map(lambda image, _: image).batch(BATCH).prefetch(tf.data.AUTOTUNE)
        np.save(folder / f"{split}.npy", network.predict(images, verbose=0))
        np.save(folder / f"{split}_labels.npy", np.fromiter(labels(path).as_numpy_iterator(), np.int64))


def labels(records: Path):
    """Return the labels without decoding the images."""
    import tensorflow as tf

    schema = {"label": tf.io.FixedLenFeature([], tf.int64)}
    return tf.data.TFRecordDataset(str(records)).map(lambda record: tf.io.parse_single_example(record, schema)["label"])


def train(folder: Path, learning_rate: float) -> None:
    import keras
    import numpy as np

    data = {split: (np.load(folder / f"{split}.npy"), np.load(folder / f"{split}_labels.npy")) for split in SPLITS}
    head = baseline.head(int(data["training"][1].max()) + 1)
    options = {"validation_data": data["validation"], "batch_size": BATCH}
    history = baseline.fit(head, learning_rate, *data["training"], **options)
    model = keras.Sequential([baseline.frozen_backbone(), head])
    baseline.register(folder, model, learning_rate, history)


def main() -> None:
    folder = Path(sys.argv[1])
    steps = {
        "download": lambda: download(folder / "raw"),
        "balance": lambda: baseline.balance(folder / "raw", folder / "balanced"),
        "split": lambda: baseline.split(folder / "balanced", *(folder / each for each in SPLITS)),
        "convert": lambda: [convert(folder / each, folder / f"{each}.tfrecord") for each in SPLITS],
        "extract": lambda: extract(folder),
        "train": lambda: train(folder, 0.01),
    }
    baseline.run({"train": lambda: train(folder, 0.02)} if "--again" in sys.argv else steps)


if __name__ == "__main__":
    main()
