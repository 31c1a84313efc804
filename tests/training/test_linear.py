"""Logistic regression: the same results as scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import linear

ONES = np.ones(3, np.float32)


@pytest.fixture(autouse=True)
def converged(monkeypatch):
    monkeypatch.setattr(linear, "TOLERANCE", 1e-8)


def correlated(count=300, seed=0):
    """Correlated features with a mean, of three overlapping classes."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(0, 1, (3, 6))
    values = (centres[labels] + random.normal(0, 1.5, (count, 6))) * [9, 3, 1, 1, 0.3, 0.1]
    return (values @ np.random.default_rng(8).normal(0, 1, (6, 6)) + 50).astype(np.float32), labels


def fitted(features, labels, shrinkage=1.0, strength=0.1):
    """Return the kernel and the bias of a logistic regression."""
    components = linear.principal_components(features)
    penalty = linear.penalties(components, shrinkage) / strength
    return linear.unproject(linear.fit(features, labels, ONES, components, penalty), components)


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
def test_penalties_are_the_shrunk_variances_of_uncorrelated_coordinates(shrinkage):
    features, _ = correlated(5000)
    components = linear.principal_components(features)
    coordinates, _ = linear.project(features, components)
    whitened = coordinates.astype(np.float64) / np.sqrt(linear.penalties(components, shrinkage))
    variances = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    expected = variances / ((1 - shrinkage) * variances + shrinkage * variances.mean())
    np.testing.assert_allclose(np.cov(whitened, rowvar=False), np.diag(expected / expected.mean()), atol=0.01)
    assert components.deviation == pytest.approx(features.std(axis=0).mean(), rel=0.2)


@pytest.mark.parametrize("strength", [0.1, 30])
def test_a_centred_fit_is_that_of_scikit_learn(monkeypatch, strength):
    features, labels = correlated()
    monkeypatch.setattr(linear, "BLOCK_ROWS", 64)  # several blocks
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 30)  # too few for a weak penalty without the preconditioner
    components = linear.principal_components(features)
    scaled = (features - components.mean) / components.deviation
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(scaled, labels)
    kernel, bias = fitted(features, labels, strength=strength)
    ours = np.exp(linear.log_probabilities(features, kernel, bias))
    np.testing.assert_allclose(ours, theirs.predict_proba(scaled), atol=2e-3)


def test_a_fit_in_coordinates_from_a_neighbour_is_that_of_the_features():
    features, labels = correlated()
    components = linear.principal_components(features)
    coordinates, own = linear.project(features, components)
    unit = linear.penalties(components, 0.5)
    start = linear.fit(coordinates, labels, ONES, own, unit / 0.3)
    found = linear.fit(coordinates, labels, ONES, own, unit, start)
    one = linear.log_probabilities(features, *fitted(features, labels, shrinkage=0.5, strength=1))
    other = linear.log_probabilities(coordinates, *linear.unproject(found, own))
    np.testing.assert_allclose(np.exp(one), np.exp(other), atol=2e-3)


def test_a_class_weight_equals_that_many_copies():
    features, labels = correlated(90)
    components = linear.principal_components(features)
    penalty = linear.penalties(components, 0.5)
    weighted = linear.fit(features, labels, np.array([3, 1, 1], np.float32), components, penalty)
    rows = np.concatenate([np.arange(90), *[np.flatnonzero(labels == 0)] * 2])
    copied = linear.fit(features[rows], labels[rows], ONES, components, penalty)
    one, other = (
        linear.log_probabilities(features, *linear.unproject(each, components)) for each in (weighted, copied)
    )
    np.testing.assert_allclose(np.exp(one), np.exp(other), atol=2e-3)


def test_constant_features_predict_the_shares_of_the_labels():
    features = np.full((10, 4), 3, np.float32)
    labels = np.array([0] * 6 + [1] * 3 + [2])
    kernel, bias = fitted(features, labels, shrinkage=0.5, strength=1)
    np.testing.assert_allclose(
        np.exp(linear.log_probabilities(features[:1], kernel, bias))[0], [0.6, 0.3, 0.1], atol=0.01
    )
    assert linear.principal_components(features).deviation > 0


def test_features_that_are_not_finite_are_refused():
    features, labels = correlated()
    components = linear.principal_components(features)
    features[3, 3] = np.nan
    for function in (
        linear.principal_components,
        lambda x: linear.fit(x, labels, ONES, components, linear.penalties(components, 1)),
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
