"""Training a head with hidden layers on stored features: compared with a head that whitens them in every batch.

The other head is that of earlier versions: a frozen dense layer of d x d before the hidden layers, Keras's Adam, and
Keras's `fit` on a dataset. Each has a process of its own, because TensorFlow's dataset of a generator changes how the
whole process allocates memory. Both are traced before the time is taken, and train for the default EPOCHS. Ratios are
of CPU time.

    python -m benchmarks.epochs [--repeats 3] [--images 100000] [--features 1280]
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks import measure
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.training import features, head_fitting, linear, loop, networks, runtime
from dgmd_pipeline.training.checkpoint import TrainingState
from dgmd_pipeline.training.config import TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures

CLASSES = 24
WEIGHTS = np.ones(CLASSES, np.float32)
CONFIG = TrainingConfig(**{**{name: Settings.model_fields[name].default for name in TrainingConfig._fields}, "seed": 1})
Training = Callable[[LabeledFeatures], object]


def main() -> None:
    options = measure.arguments(__doc__, repeats=3, images=100_000, features=1280)
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # as settings.load does for frozen backbones
    with measure.folder() as scratch, process() as one, process() as other:
        path = Path(scratch, "features.npy")
        generate(path, options.images, options.features)
        speeds = {
            "ours": lambda: one.submit(speed, ours, path).result(),
            "theirs": lambda: other.submit(speed, theirs, path).result(),
        }
        found = measure.interleave(options.repeats, **speeds)
    figures = f"{measure.median(found['ours'])} images per CPU s / {measure.median(found['theirs'])}"
    what = "training the head, times faster than with whitening in every batch"
    measure.show(measure.Claim(what, measure.ratios(found["ours"], found["theirs"]), 5, figures=figures))


def process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def generate(path: Path, images: int, dimensions: int) -> None:
    """Write random features."""
    random = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (images, dimensions))
    for first in range(0, images, 10_000):
        vectors[first : first + 10_000] = random.normal(size=vectors[first : first + 10_000].shape)


def read(path: Path) -> tuple[LabeledFeatures, LabeledFeatures]:
    """Return the features, mapped from disk as in a run, with random labels; and 256 of them to hold out."""
    vectors = np.load(path, mmap_mode="r")
    labels = np.random.default_rng(1).integers(0, CLASSES, len(vectors))
    return LabeledFeatures(vectors, labels), LabeledFeatures(vectors[:256], labels[:256])


def speed(build: Callable[[Path], Training], path: Path) -> float:
    """Return how many images and epochs a training processes in a second of CPU time, in a process of its own."""
    train, (data, _) = build(path), read(path)
    start = time.process_time()
    train(data)
    return CONFIG.epochs * len(data.labels) / (time.process_time() - start)


@lru_cache
def ours(path: Path) -> Training:
    """Return the training of the pipeline, traced."""
    runtime.start_tensorflow()
    data, held_out = read(path)
    hidden = head_fitting.HiddenHead(linear.principal_components(data.vectors), WEIGHTS, CONFIG)

    def train(split: LabeledFeatures) -> None:
        hidden.fit(split, held_out, CONFIG, TrainingState(1, [], []), lambda _: None)

    train(held_out)
    return train


@lru_cache
def theirs(path: Path) -> Training:
    """Return the training of a head whose first layer is a frozen whitening, traced."""
    runtime.start_tensorflow()
    import keras

    data, held_out = read(path)
    components = linear.principal_components(data.vectors)
    assert components.directions is not None
    kernel = components.directions / np.sqrt(components.variances + components.variances.mean())
    vector = keras.Input((len(kernel),))
    layer = keras.layers.Dense(kernel.shape[1], trainable=False)
    whitened = layer(vector)
    layer.set_weights([kernel, -components.mean @ kernel])
    model = keras.Model(vector, networks.build_head(kernel.shape[1], CLASSES, CONFIG.dropout)(whitened))
    adam = keras.optimizers.Adam(CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    model.compile(adam, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
    adam.build(model.trainable_variables)

    def train(split: LabeledFeatures) -> None:
        batches = features.read_batches(split, CONFIG.batch_size, (1, 0))
        val_batches = features.read_batches(held_out, CONFIG.batch_size)
        state = TrainingState(1, [], [])
        loop.fit(model, lambda _: batches, val_batches, WEIGHTS, CONFIG, state, lambda _: None)

    train(held_out)
    return train


if __name__ == "__main__":
    main()
