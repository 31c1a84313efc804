"""Training a head with hidden layers on stored features: compared with a head that whitens them in every batch.

Earlier versions had the other head: a frozen dense layer of d x d before the hidden layers, trained with Keras's `fit`
on a dataset. Both are traced before the measurement, and train for the default EPOCHS. Our time includes the whitening,
which is done once. Ratios are of CPU time.

    python -m benchmarks.epochs [--repeats 3] [--images 100000] [--features 1280]
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import measure
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.training import features, head_fitting, linear, loop, networks, runtime
from dgmd_pipeline.training.checkpoint import TrainingState
from dgmd_pipeline.training.config import TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures

if TYPE_CHECKING:
    import keras

CLASSES = 24


def main() -> None:
    options = measure.arguments(__doc__, repeats=3, images=100_000, features=1280)
    runtime.start_tensorflow()
    defaults = {name: Settings.model_fields[name].default for name in TrainingConfig._fields}
    config = TrainingConfig(**{**defaults, "seed": 1})
    weights = np.ones(CLASSES, np.float32)
    with measure.folder() as scratch:
        data = generated(Path(scratch, "features.npy"), options.images, options.features)
        held_out = LabeledFeatures(data.vectors[:256], data.labels[:256])
        components = linear.principal_components(data.vectors)
        hidden = head_fitting.HiddenHead(components, weights, config)
        whitening = whitening_head(components, config.dropout)

        def ours(split: LabeledFeatures = data) -> float:
            start = time.process_time()
            hidden.fit(split, held_out, config, TrainingState(1, [], []), lambda _: None)
            return config.epochs * options.images / (time.process_time() - start)

        def theirs(split: LabeledFeatures = data) -> float:
            batches = features.read_batches(split, config.batch_size, (1, 0))
            val_batches = features.read_batches(held_out, config.batch_size)
            start = time.process_time()
            state = TrainingState(1, [], [])
            loop.fit(whitening, lambda _: batches, val_batches, weights, config, state, lambda _: None)
            return config.epochs * options.images / (time.process_time() - start)

        ours(held_out), theirs(held_out)
        found = measure.interleave(options.repeats, ours=ours, theirs=theirs)
    figures = f"{measure.median(found['ours'])} images per CPU s / {measure.median(found['theirs'])}"
    what = "training the head, times faster than with whitening in every batch"
    measure.show(measure.Claim(what, measure.ratios(found["ours"], found["theirs"]), 5, figures=figures))


def generated(path: Path, images: int, dimensions: int) -> LabeledFeatures:
    """Return random features, mapped from disk as in a run."""
    random = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (images, dimensions))
    for first in range(0, images, 10_000):
        vectors[first : first + 10_000] = random.normal(size=vectors[first : first + 10_000].shape)
    return LabeledFeatures(vectors, random.integers(0, CLASSES, images))


def whitening_head(components: linear.Components, dropout: float) -> "keras.Model":
    """Build a head whose first layer is a frozen whitening."""
    import keras

    assert components.directions is not None
    kernel = components.directions / np.sqrt(components.variances + components.variances.mean())
    vector = keras.Input((len(kernel),))
    layer = keras.layers.Dense(kernel.shape[1], trainable=False)
    whitened = layer(vector)
    layer.set_weights([kernel, -components.mean @ kernel])
    head = networks.build_head(kernel.shape[1], CLASSES, dropout)
    return keras.Model(vector, head(whitened))


if __name__ == "__main__":
    main()
