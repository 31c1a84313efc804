"""The validation split decides nothing, so what is measured on it is not optimistic."""

import numpy as np
import pytest

from dgmd_pipeline.training import config, head

RECIPE = config.TrainingConfig(
    batch_size=128, epochs=5, learning_rate=0.05, decay_rate=0.0, patience=5, optimizer="adam", dropout=0.0,
    weight_decay=0.0, seed=3,
)  # fmt: skip
IMAGES = 50  # of a validation split
SPLITS = 400


def guesses(count, seed):
    """Features that tell nothing about the label: every choice between models is a choice by chance."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 6)).astype(np.float32), random.integers(0, 2, count)


@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_what_50_validation_images_report_is_within_chance_of_the_truth(kind):
    data, (features, labels) = guesses(96, 0), guesses(IMAGES * SPLITS, 1)
    splits = [
        (features[start : start + IMAGES], labels[start : start + IMAGES]) for start in range(0, 2 * IMAGES, IMAGES)
    ]
    groups = [str(number) for number in range(96)]
    trained = [head.train_head(data, split, groups, 2, {}, RECIPE, kind, lambda row: None) for split in splits]
    for one, other in zip(*(each.model.get_weights() for each in trained), strict=True):
        np.testing.assert_array_equal(one, other)  # whatever split is reported on, the model is the same
    truth = guesses(100_000, 2)
    both = np.concatenate([features, truth[0]])
    answers = trained[0].model.predict(both, batch_size=8192, verbose=0).argmax(axis=1)
    right = (answers[: len(labels)] == labels).reshape(SPLITS, IMAGES).mean(axis=1)
    assert [each.history[-1].val_accuracy for each in trained] == pytest.approx(right[:2], abs=1e-6)
    actual = (answers[len(labels) :] == truth[1]).mean()
    assert abs(right.mean() - actual) < 2 * (right.std() / SPLITS**0.5 + 0.0016)
