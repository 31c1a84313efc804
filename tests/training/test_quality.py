"""The quality of a head on real features, compared with scikit-learn's logistic regression on the same rows.

benchmarks/feature_sample.py makes `support/clothing_features.npz` and documents its content.
"""

import numpy as np
import pytest
from conftest import ROOT
from sklearn.linear_model import LogisticRegression

from dgmd_pipeline.training import head
from dgmd_pipeline.training.config import TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures

CONFIG = TrainingConfig(128, 6, 0.01, 0.5, 3, "adam", 0.1, 0.0, seed=1)


@pytest.fixture(scope="module")
def clothing():
    with np.load(ROOT / "tests" / "support" / "clothing_features.npz") as file:
        return (file["codes"] * file["step"]).astype(np.float32), file["labels"].astype(np.int64)


def test_the_head_is_as_good_as_logistic_regression(clothing):
    features, labels = clothing
    training, validation, test = (
        LabeledFeatures(features[rows], labels[rows]) for rows in (slice(600), slice(600, 700), slice(700, None))
    )
    deviation = training.vectors.std()
    # C = 0.03 is the best on the test rows, which makes the baseline as strong as possible.
    logistic = LogisticRegression(C=0.03, max_iter=1000).fit(training.vectors / deviation, training.labels)
    baseline = logistic.score(test.vectors / deviation, test.labels)

    groups = [str(row) for row in range(600)]
    trained = head.train_head(training, validation, groups, 10, {}, CONFIG, "auto", lambda row: None)

    accuracy = (trained.model.predict(test.vectors, verbose=0).argmax(axis=1) == test.labels).mean()
    assert accuracy >= baseline - 0.01
