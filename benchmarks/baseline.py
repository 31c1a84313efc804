"""The baseline of `whole_run.py`: a plain training script.

Serial downloads, copied folders for balance and split, images converted one by one in eager TensorFlow, `model.fit` of
the whole frozen network in each epoch, requirements inferred by MLflow. It prints a line after each epoch and waits
for a line on standard input: the pipeline runs in these pauses.

    python -m benchmarks.baseline FOLDER
"""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

LABELS: list[str]
HEIGHT, WIDTH, BATCH, EPOCHS = 192, 256, 128, 15
paused = 0.0


def say(**what: object) -> None:
    """Print a message and wait for a line. The waiting time is not counted."""
    global paused
    print(json.dumps(what), flush=True)
    start = time.monotonic()
    sys.stdin.readline()
    paused += time.monotonic() - start


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

    paths = list(source.glob("*/*"))
    random.shuffle(paths)
    with tf.io.TFRecordWriter(str(target)) as writer:
        for path in paths:
            image = tf.io.decode_image(tf.io.read_file(str(path)), channels=3, expand_animations=False)
            small = tf.cast(tf.round(tf.image.resize(image, (HEIGHT, WIDTH))), tf.uint8)
            features = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.encode_jpeg(small).numpy()])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[LABELS.index(path.parent.name)])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


def train(folder: Path, learning_rate: float) -> None:
    import keras
    import mlflow
    import tensorflow as tf

    def parse(record):
        schema = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
        features = tf.io.parse_single_example(record, schema)
        return tf.ensure_shape(tf.io.decode_jpeg(features["image"], channels=3), (HEIGHT, WIDTH, 3)), features["label"]

    def read(name):
        records = tf.data.TFRecordDataset(str(folder / name)).map(parse, num_parallel_calls=tf.data.AUTOTUNE)
        return records.shuffle(1000).batch(BATCH).prefetch(tf.data.AUTOTUNE)

    backbone = keras.applications.EfficientNetV2B1(
        include_top=False, weights=None, input_shape=(HEIGHT, WIDTH, 3), pooling="avg"
    )
    backbone.trainable = False
    layers = [keras.layers.Dense(units, activation="relu") for units in (124, 64)]
    model = keras.Sequential([backbone, *layers, keras.layers.Dense(len(LABELS), activation="softmax")])
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    pause = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, _: say(epoch=epoch))
    decay = keras.callbacks.LearningRateScheduler(lambda epoch: learning_rate / (1 + 0.5 * epoch))
    history = model.fit(
        read("training.tfrecord"),
        validation_data=read("validation.tfrecord"),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[decay, pause],
    )
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("baseline")
    with mlflow.start_run():
        mlflow.log_params({"learning_rate": learning_rate, "epochs": EPOCHS, "batch_size": BATCH})
        for name, values in history.history.items():
            mlflow.log_metric(name, values[-1])
        mlflow.keras.log_model(model, name="model", registered_model_name="baseline")


def main() -> None:
    """Run all parts and print the seconds of each."""
    global LABELS
    folder, start, parts = Path(sys.argv[1]), time.monotonic(), {}
    os.chdir(folder)
    splits = ("training", "validation")
    for name, step in {
        "download": lambda: download(folder / "raw"),
        "balance": lambda: balance(folder / "raw", folder / "balanced"),
        "split": lambda: split(folder / "balanced", *(folder / each for each in splits)),
        "convert": lambda: [convert(folder / each, folder / f"{each}.tfrecord") for each in splits],
        "train": lambda: train(folder, 0.01),
    }.items():
        step()
        LABELS = sorted(path.name for path in (folder / "raw").iterdir())
        parts[name] = time.monotonic() - start - paused
        start = time.monotonic()
    say(parts=parts)


if __name__ == "__main__":
    main()
