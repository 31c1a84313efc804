"""Small trainings for tests."""

import numpy as np
import pytest
from PIL import Image

from dgmd_pipeline.data import shards
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import checkpoint as training_checkpoint
from dgmd_pipeline.training import config, dataset, from_scratch, head

RECIPE = config.TrainingConfig(
    batch_size=16, epochs=4, learning_rate=0.01, decay_rate=0.5, patience=3,
    optimizer="adam", dropout=0.2, weight_decay=0.0, augmentation="shift", seed=1,
)  # fmt: skip


def ignore(row):
    del row


def clouds(count=120, classes=3, dimensions=8, seed=0, spread=1.0):
    """Features that a head learns in a few epochs: one cloud of points for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(0, 2, (classes, dimensions))
    return (centres[labels] + rng.normal(0, spread, (count, dimensions))).astype(np.float32), labels.astype(np.int64)


def stripes(count, size=16):
    """Pictures with upright or lying stripes, and which."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 2, count)
    waves = np.sin(np.arange(size) + rng.uniform(0, 6, (count, 1)))[:, :, None] * np.ones((1, 1, size))
    grey = np.where(labels[:, None, None] == 0, waves, waves.transpose(0, 2, 1)) * 100 + 128
    noisy = grey[..., None] + rng.normal(0, 10, (count, size, size, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels


def train(recipe=RECIPE, sides=None, classes=3, class_weights=None, on_epoch=ignore, checkpoint=None):
    one, other = sides or (clouds(), clouds(60, seed=1))
    progress = training_checkpoint.begin(recipe, checkpoint)
    weights = config.weights_by_class(classes, class_weights or {})
    return head.fit_hidden(one, other, weights, recipe, progress, on_epoch, checkpoint)


def train_on_records(folder, recipe=RECIPE, on_epoch=ignore, checkpoint=None):
    def shuffled(seed, epoch):
        return dataset.read(folder / "training", seed, epoch)

    rest = dataset.read(folder / "validation")
    return from_scratch.train_from_scratch(shuffled, rest, (16, 16), 2, {}, recipe, on_epoch, checkpoint)


@pytest.fixture(scope="module")
def folder_of_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes")
    for side, number in (("training", 90), ("validation", 40)):
        (folder / side).mkdir()
        rows = []
        for index, (pixels, label) in enumerate(zip(*stripes(number), strict=True)):
            path = f"{side} {index}.png"
            Image.fromarray(pixels).save(folder / path)
            rows.append(Example(path, str(label), int(label), path, path))
        shards.write(rows, folder, folder / side, side, 3, 16, 16, "stretch")
    return folder


class Stopped(Exception):
    """What a request to stop raises in `on_epoch`."""
