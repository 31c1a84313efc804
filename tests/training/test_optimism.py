"""The validation split decides nothing, so metrics of it are not optimistic."""

import numpy as np
import pytest

from dgmd_pipeline.training import head
from dgmd_pipeline.training.config import TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures

CONFIG = TrainingConfig(
    batch_size=128, epochs=5, learning_rate=0.05, decay_rate=0.0, patience=5, optimizer="adam", dropout=0.0,
    weight_decay=0.0, seed=3,
)  # fmt: skip
IMAGES = 50  # of a validation split
SPLITS = 400


def guesses(count, seed):
    """Features that are independent of the label: every choice between models is a choice by chance."""
    random = np.random.default_rng(seed)
    return LabeledFeatures(random.normal(size=(count, 6)).astype(np.float32), random.integers(0, 2, count))


@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_the_accuracy_of_50_validation_images_is_unbiased(kind):
    data, (features, labels) = guesses(96, 0), guesses(IMAGES * SPLITS, 1)
    splits = [
        LabeledFeatures(features[start : start + IMAGES], labels[start : start + IMAGES])
        for start in range(0, 2 * IMAGES, IMAGES)
    ]
    groups = [str(number) for number in range(96)]
    trained = [head.train_head(data, split, groups, 2, {}, CONFIG, kind, lambda row: None) for split in splits]
    for one, other in zip(*(each.model.get_weights() for each in trained), strict=True):
        np.testing.assert_array_equal(one, other)  # the model does not depend on the validation split
    population = guesses(100_000, 2)
    both = np.concatenate([features, population.vectors])
    predicted = trained[0].model.predict(both, batch_size=8192, verbose=0).argmax(axis=1)
    correct = (predicted[: len(labels)] == labels).reshape(SPLITS, IMAGES).mean(axis=1)
    assert [each.history[-1].val_accuracy for each in trained] == pytest.approx(correct[:2], abs=1e-6)
    actual = (predicted[len(labels) :] == population.labels).mean()
    assert abs(correct.mean() - actual) < 2 * (correct.std() / SPLITS**0.5 + 0.0016)
