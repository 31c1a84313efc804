"""The first baseline of `whole_run.py`: a training script of the usual kind.

It downloads serially, copies folders to balance and split, converts images one by one in eager TensorFlow, calls
`model.fit` on the whole frozen network in each epoch, and lets MLflow infer the requirements. It prints the seconds of
each part.

    python -m benchmarks.baseline FOLDER
"""

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

HEIGHT, WIDTH, BATCH, EPOCHS = 192, 256, 128, 15
SPLITS = ("training", "validation")


def download(folder: Path) -> None:
    import boto3

    client = boto3.client("s3")
    bucket, prefix = os.environ["AWS_DATA_BUCKET"], os.environ["AWS_DATA_PATH"]
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for item in page["Contents"]:
            path = folder / item["Key"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, item["Key"], str(path))


def balance(source: Path, target: Path) -> None:
    files = {folder.name: sorted(folder.iterdir()) for folder in source.iterdir()}
    most = int(1.15 * sum(map(len, files.values())) / len(files))
    for label, paths in files.items():
        (target / label).mkdir(parents=True)
        for path in random.sample(paths, min(most, len(paths))):
            shutil.copy(path, target / label / path.name)


def split(source: Path, training: Path, validation: Path) -> None:
    for folder in source.iterdir():
        paths = sorted(folder.iterdir())
        random.shuffle(paths)
        for number, path in enumerate(paths):
            target = (validation if number < 0.2 * len(paths) else training) / folder.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.name)


def convert(source: Path, target: Path) -> None:
    import tensorflow as tf

    names = sorted(path.name for path in source.iterdir())
    paths = list(source.glob("*/*"))
    random.shuffle(paths)
    with tf.io.TFRecordWriter(str(target)) as writer:
        for path in paths:
            image = tf.io.decode_image(tf.io.read_file(str(path)), channels=3, expand_animations=False)
            small = tf.cast(tf.round(tf.image.resize(image, (HEIGHT, WIDTH))), tf.uint8)
            features = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.encode_jpeg(small).numpy()])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[names.index(path.parent.name)])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def read(records: Path) -> "tf.data.Dataset":
    """Return batches of images (uint8 [n, HEIGHT, WIDTH, 3]) and labels (int64 [n]), in the order of the records."""
    import tensorflow as tf

    def parse(record):
        schema = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
        features = tf.io.parse_single_example(record, schema)
        return tf.ensure_shape(tf.io.decode_jpeg(features["image"], channels=3), (HEIGHT, WIDTH, 3)), features["label"]

    return tf.data.TFRecordDataset(str(records)).map(parse, num_parallel_calls=tf.data.AUTOTUNE)


def frozen_backbone() -> "keras.Model":
    import keras

    backbone = keras.applications.EfficientNetV2B1(
        include_top=False, weights=None, input_shape=(HEIGHT, WIDTH, 3), pooling="avg"
    )
    backbone.trainable = False
    return backbone


def head(labels: int) -> "keras.Model":
    import keras

    layers = [keras.layers.Dense(units, activation="relu") for units in (124, 64)]
    return keras.Sequential([*layers, keras.layers.Dense(labels, activation="softmax")])


def fit(model: "keras.Model", learning_rate: float, *data: Any, **options: Any) -> dict[str, list[float]]:
    """Train for all epochs; return the metrics of each."""
    import keras

    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    decay = keras.callbacks.LearningRateScheduler(lambda epoch: learning_rate / (1 + 0.5 * epoch))
    return model.fit(*data, epochs=EPOCHS, verbose=0, callbacks=[decay], **options).history


def register(folder: Path, model: "keras.Model", learning_rate: float, history: dict[str, list[float]]) -> None:
    """Store parameters, metrics, and the model in MLflow, with MLflow's defaults."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("baseline")
    with mlflow.start_run():
        mlflow.log_params({"learning_rate": learning_rate, "epochs": EPOCHS, "batch_size": BATCH})
        for name, values in history.items():
            mlflow.log_metric(name, values[-1])
        mlflow.keras.log_model(model, name="model", registered_model_name="baseline")


def train(folder: Path, learning_rate: float) -> None:
    import keras
    import tensorflow as tf

    def batches(split: str) -> tf.data.Dataset:
        return read(folder / f"{split}.tfrecord").shuffle(1000).batch(BATCH).prefetch(tf.data.AUTOTUNE)

    labels = sum(1 for _ in (folder / "training").iterdir())
    model = keras.Sequential([frozen_backbone(), head(labels)])
    history = fit(model, learning_rate, batches("training"), validation_data=batches("validation"))
    register(folder, model, learning_rate, history)


def run(steps: dict[str, Callable[[], object]]) -> None:
    """Run all parts and print the seconds of each."""
    parts = {}
    for name, step in steps.items():
        start = time.monotonic()
        step()
        parts[name] = time.monotonic() - start
    print(json.dumps(parts))


def main() -> None:
    folder = Path(sys.argv[1])
    run(
        {
            "download": lambda: download(folder / "raw"),
            "balance": lambda: balance(folder / "raw", folder / "balanced"),
            "split": lambda: split(folder / "balanced", *(folder / each for each in SPLITS)),
            "convert": lambda: [convert(folder / each, folder / f"{each}.tfrecord") for each in SPLITS],
            "train": lambda: train(folder, 0.01),
        }
    )


if __name__ == "__main__":
    main()
