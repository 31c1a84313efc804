"""How well a head learns from real features, beside scikit-learn's logistic regression on the same rows.

`support/clothing_features.npz` is made by benchmarks/feature_sample.py, which says what it holds.
"""

import numpy as np
import pytest
from conftest import ROOT
from sklearn.linear_model import LogisticRegression

from dgmd_pipeline.training import config, head

RECIPE = config.TrainingConfig(128, 6, 0.01, 0.5, 3, "adam", 0.1, 0.0, seed=1)


@pytest.fixture(scope="module")
def clothing():
    with np.load(ROOT / "tests" / "support" / "clothing_features.npz") as file:
        return (file["codes"] * file["step"]).astype(np.float32), file["labels"].astype(np.int64)


def test_the_head_is_as_good_as_logistic_regression(clothing):
    features, labels = clothing
    learned, test = (features[:600], labels[:600]), (features[700:], labels[700:])
    validation = (features[600:700], labels[600:700])
    deviation = learned[0].std()
    # C = 0.03 is the best on the test rows: the floor is as high as it can be.
    logistic = LogisticRegression(C=0.03, max_iter=1000).fit(learned[0] / deviation, learned[1])
    floor = logistic.score(test[0] / deviation, test[1])

    groups = [str(row) for row in range(600)]
    trained = head.train_head(learned, validation, groups, 10, {}, RECIPE, "auto", lambda row: None)

    accuracy = (trained.model.predict(test[0], verbose=0).argmax(axis=1) == test[1]).mean()
    assert accuracy >= floor - 0.01
