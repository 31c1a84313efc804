"""Small trainings for tests."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dgmd_pipeline.data import shards
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import dataset, extraction, feature_store, from_scratch, head_fitting, linear
from dgmd_pipeline.training.checkpoint import load_or_start
from dgmd_pipeline.training.config import TrainingConfig, weights_by_class
from dgmd_pipeline.training.features import LabeledFeatures

CONFIG = TrainingConfig(
    batch_size=16, epochs=4, learning_rate=0.01, decay_rate=0.5, patience=3,
    optimizer="adam", dropout=0.2, weight_decay=0.0, augmentation="shift", seed=1,
)  # fmt: skip


class Stopped(Exception):
    """A request to stop, raised in `on_epoch`."""


def ignore(row):
    del row


def clouds(count=120, classes=3, dimensions=8, seed=0, spread=1.0):
    """Features that a head learns in a few epochs: one cloud of points for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(0, 2, (classes, dimensions))
    vectors = centres[labels] + rng.normal(0, spread, (count, dimensions))
    return LabeledFeatures(vectors.astype(np.float32), labels.astype(np.int64))


def stripes(count, size=16):
    """Images with vertical or horizontal stripes, and their labels."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 2, count)
    waves = np.sin(np.arange(size) + rng.uniform(0, 6, (count, 1)))[:, :, None] * np.ones((1, 1, size))
    grey = np.where(labels[:, None, None] == 0, waves, waves.transpose(0, 2, 1)) * 100 + 128
    noisy = grey[..., None] + rng.normal(0, 10, (count, size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels


def write_stripe_records(folder):
    """Write records of 90 training and 40 validation images with stripes below an existing folder, and return it."""
    for split, count in (("training", 90), ("validation", 40)):
        (folder / split).mkdir()
        rows = []
        for index, (pixels, label) in enumerate(zip(*stripes(count), strict=True)):
            path = f"{split} {index}.png"
            Image.fromarray(pixels).save(folder / path)
            name = hashlib.sha256(path.encode()).hexdigest()
            rows.append(Example(path, str(label), int(label), name, name))
        shards.write(rows, folder, folder / split, split, 3, 16, 16, "stretch")
    return folder


def store_features(folder, records, backbone):
    """Write the features of a folder of records into a new folder."""
    folder.mkdir()
    network = extraction.Network("", "none", 16, 16, folder)
    with tempfile.TemporaryDirectory() as place:
        pieces = extraction.divide(records, feature_store.find_reusable(records, (), {}), Path(place), {}, network)
        list(extraction.extract_pieces(pieces, backbone))
        reuse = feature_store.find_reusable(records, [piece.target for piece in pieces], {})
        feature_store.write(folder, records, reuse, {}, backbone.output_shape[-1])


def train(config=CONFIG, splits=None, classes=3, class_weights=None, on_epoch=ignore, checkpoint=None):
    """Train a head with hidden layers on (training, validation) features."""
    training, validation = splits or (clouds(), clouds(60, seed=1))
    state = load_or_start(config, checkpoint)
    components = linear.principal_components(training.vectors)
    weights = weights_by_class(classes, class_weights or {})
    hidden = head_fitting.HiddenHead(components, weights, config._replace(seed=state.seed))
    return hidden.fit(training, validation, config, state, on_epoch, checkpoint)


def train_on_records(folder, config=CONFIG, on_epoch=ignore, checkpoint=None):
    """Train `cnn` on the records that `write_stripe_records` wrote."""

    def shuffled(seed, epoch):
        return dataset.read(folder / "training", seed, epoch)

    validation = dataset.read(folder / "validation")
    return from_scratch.train_from_scratch(shuffled, validation, (16, 16), 2, {}, config, on_epoch, checkpoint)
