"""Logistic regression: the same results as scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import linear

ONES = np.ones(3, np.float32)


def correlated(count=300, seed=0):
    """Correlated features with a mean, of three overlapping classes."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(0, 1, (3, 6))
    values = (centres[labels] + random.normal(0, 1.5, (count, 6))) * [9, 3, 1, 1, 0.3, 0.1]
    return (values @ np.random.default_rng(8).normal(0, 1, (6, 6)) + 50).astype(np.float32), labels


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
def test_coordinates_are_centred_and_their_variances_are_shrunk(shrinkage):
    features, _ = correlated(5000)
    mean, kernel = linear.build_basis(linear.principal_components(features), shrinkage)
    covariance = np.cov((features.astype(np.float64) - mean) @ kernel, rowvar=False)
    variances = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    expected = variances / ((1 - shrinkage) * variances + shrinkage * variances.mean())
    np.testing.assert_allclose(covariance, np.diag(expected / expected.mean()), atol=0.01)


def test_a_centred_fit_is_that_of_scikit_learn(monkeypatch):
    features, labels = correlated()
    monkeypatch.setattr(linear, "BLOCK_ROWS", 64)  # several blocks
    basis = linear.build_basis(linear.principal_components(features), 1)
    mean, deviation = linear.mean_and_deviation(features)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000).fit((features - mean) / deviation, labels)
    kernel, bias = linear.unproject(linear.fit(features, labels, ONES, basis, 0.1), basis)
    ours = np.exp(linear.log_probabilities(features, kernel, bias))
    np.testing.assert_allclose(ours, theirs.predict_proba((features - mean) / deviation), atol=2e-3)


def test_a_class_weight_equals_that_many_copies():
    features, labels = correlated(90)
    basis = linear.build_basis(linear.principal_components(features), 0.5)
    weighted = linear.fit(features, labels, np.array([3, 1, 1], np.float32), basis, 1)
    rows = np.concatenate([np.arange(90), *[np.flatnonzero(labels == 0)] * 2])
    copied = linear.fit(features[rows], labels[rows], ONES, basis, 1)
    one, other = (linear.log_probabilities(features, *linear.unproject(each, basis)) for each in (weighted, copied))
    np.testing.assert_allclose(np.exp(one), np.exp(other), atol=2e-3)


def test_constant_features_predict_the_shares_of_the_labels():
    features = np.full((10, 4), 3, np.float32)
    labels = np.array([0] * 6 + [1] * 3 + [2])
    basis = linear.build_basis(linear.principal_components(features), 0.5)
    kernel, bias = linear.unproject(linear.fit(features, labels, ONES, basis, 1), basis)
    np.testing.assert_allclose(
        np.exp(linear.log_probabilities(features[:1], kernel, bias))[0], [0.6, 0.3, 0.1], atol=0.01
    )
    assert linear.mean_and_deviation(features)[1] > 0


def test_features_that_are_not_finite_are_refused():
    features, labels = correlated()
    basis = linear.build_basis(linear.principal_components(features), 1)
    features[3, 3] = np.nan
    for function in (
        linear.principal_components,
        linear.mean_and_deviation,
        lambda x: linear.fit(x, labels, ONES, basis, 1),
    ):
        with pytest.raises(PipelineError, match="not all finite numbers.*BACKBONE_WEIGHTS"):
            function(features)


def test_components_use_at_most_component_rows(monkeypatch):
    features, _ = correlated(100)
    monkeypatch.setattr(linear, "COMPONENT_ROWS", 40)
    for some, expected in zip(
        linear.principal_components(features), linear.principal_components(features[::3]), strict=True
    ):
        np.testing.assert_array_equal(some, expected)


def test_loss_and_accuracy_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, log_loss

    features, labels = correlated(50)
    kernel, bias = np.random.default_rng(0).normal(0, 0.01, (6, 3)).astype(np.float32), np.zeros(3, np.float32)
    weights = np.array([1, 2, 4], np.float32)
    probabilities = np.exp(linear.log_probabilities(features, kernel, bias).astype(np.float64))
    loss, accuracy = linear.evaluate(features, labels, kernel, bias, None)
    np.testing.assert_allclose(loss, log_loss(labels, probabilities, labels=range(3)), rtol=1e-4)
    assert accuracy == accuracy_score(labels, probabilities.argmax(axis=1))
    weighted, _ = linear.evaluate(features, labels, kernel, bias, weights)
    weighted_sum = log_loss(labels, probabilities, labels=range(3), sample_weight=weights[labels], normalize=False)
    np.testing.assert_allclose(weighted, weighted_sum / 50, rtol=1e-4)
