"""Multinomial logistic regression on feature vectors, which may be mapped from disk."""

from functools import partial
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training.vectors import Vectors

# Maximum number of vectors that the components are computed from. If a vector has 2,048 dimensions, this is about 10
# vectors per dimension.
COMPONENT_ROWS = 20_000
BLOCK_ROWS = 8_192  # vectors that are read at a time: 67 MB at 2,048 dimensions
MAX_ITERATIONS = 300
# Number of earlier iterations that L-BFGS approximates the Hessian from. With SciPy's default of 10, an iteration takes
# longer, and a fit needs as many iterations: see docs/measurements/head.md.
CORRECTIONS = 3
# A fit ends when the relative change of the objective is below this. On photographs, a tolerance of 1e-7 doubles the
# number of iterations and changes the held-out loss by at most .0003. For a backbone with random weights, 1e-7
# quadruples the number of iterations and does not lower the loss.
TOLERANCE = 1e-5
# Smallest curvature that `_preconditioner` uses. The curvature is the second derivative of the mean loss with respect
# to a logit.
MIN_CURVATURE = 1e-4


class Components(NamedTuple):
    """The principal components of feature vectors. The coordinates of vectors are (vectors - mean) @ directions."""

    mean: np.ndarray  # float32 [d]
    variances: np.ndarray  # float64 [r], above 0, r <= d
    directions: np.ndarray | None  # float32 [d, r], orthonormal; None if the vectors already are coordinates

    @property
    def deviation(self) -> float:
        """The square root of the mean variance of the d features; 1 if the vectors do not vary."""
        return float(np.sqrt(self.variances.sum() / len(self.mean))) or 1.0


def principal_components(features: Vectors) -> Components:
    """Return the components of features (float32 [n, d]), computed from at most COMPONENT_ROWS evenly spaced rows.

    Raises PipelineError for features that are not finite.
    """
    sample = features[:: -(-len(features) // COMPONENT_ROWS)]
    total, products = np.zeros(features.shape[1]), np.zeros((features.shape[1],) * 2)
    for start in range(0, len(sample), 1024):
        block = sample[start : start + 1024].astype(np.float64)
        total += block.sum(axis=0)
        products += block.T @ block
    _check_finite(products)
    mean = total / len(sample)
    variances, directions = np.linalg.eigh(products / len(sample) - np.outer(mean, mean))
    present = variances > max(1e-9 * variances[-1], 0)
    return Components(mean.astype(np.float32), variances[present], directions[:, present].astype(np.float32))


def project(features: Vectors, components: Components) -> tuple[np.ndarray, Components]:
    """Return the coordinates (float32 [n, r]) of features (float32 [n, d]), and the Components of the coordinates."""
    assert components.directions is not None  # noqa: S101
    coordinates = (np.asarray(features) - components.mean) @ components.directions
    return coordinates, Components(np.zeros(coordinates.shape[1], np.float32), components.variances, None)


def penalties(components: Components, shrinkage: float) -> np.ndarray:
    """Return a penalty (float64 [r]) for the squared coefficients of each component.

    The penalty is the variance of the component, moved towards the mean of all variances (Ledoit and Wolf 2004).
    `shrinkage`, above 0 and at most 1, says how far the variance is moved. With a shrinkage of 1, all coefficients have
    the same penalty, and the regression is equivalent to a regression on centred and uniformly scaled vectors. With a
    lower shrinkage, it is equivalent to a regression on partly whitened vectors. The penalties are scaled so that
    the mean of variance / penalty is 1. A strength then has about the same effect with every shrinkage.
    """
    variances = components.variances
    if not len(variances):
        return variances
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.mean()
    return shrunk * (variances / shrunk).mean()


def fit(
    features: Vectors,
    labels: np.ndarray,
    class_weights: np.ndarray,
    components: Components,
    penalty: np.ndarray,
    start: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """Return the coefficients (float64 [r + 1, classes], the last row is the bias) of a logistic regression.

    The coefficients minimise the weighted cross-entropy of features (float32 [n, d]) and labels (int [n]), plus half
    the sum of penalty * coefficient ** 2. Each row has the weight of its class (float [classes]). `penalty` (float [r])
    is the result of `penalties` divided by a strength (scikit-learn's C). The bias has no penalty. `start` are the
    coefficients for similar penalties; they save iterations. The fit ends when the relative change of the objective is
    below `tolerance`.

    L-BFGS (Liu and Nocedal 1989) reads BLOCK_ROWS vectors at a time, so `features` may be mapped from disk. In
    contrast, scikit-learn's LogisticRegression needs a copy of all vectors in memory. L-BFGS is preconditioned with the
    diagonal of the Hessian at the start. This works well because the components are uncorrelated. For weak penalties,
    preconditioning saves four fifths of the iterations.

    Raises PipelineError for features that are not finite.
    """
    from scipy.optimize import minimize

    if start is None:
        start = np.zeros((len(penalty) + 1, len(class_weights)))
    problem = _Problem(features, labels, class_weights, components, penalty)
    scale = _preconditioner(problem, start)
    options = {"maxcor": CORRECTIONS, "maxiter": MAX_ITERATIONS, "ftol": tolerance, "gtol": 0}
    found = minimize(
        partial(_objective, problem, scale), (start / scale).ravel(), jac=True, method="L-BFGS-B", options=options
    )
    _check_finite(np.array(found.fun))
    return found.x.reshape(start.shape) * scale


class _Problem(NamedTuple):
    """The data and the penalties of a call of `fit`."""

    features: Vectors
    labels: np.ndarray
    class_weights: np.ndarray
    components: Components
    penalty: np.ndarray


def _preconditioner(problem: _Problem, coefficients: np.ndarray) -> np.ndarray:
    """Return a scale for each coefficient (float64 [r + 1, classes]). The fit optimises coefficients / scale.

    The scale is 1 / sqrt(the coefficient's element of the Hessian's diagonal), estimated from at most BLOCK_ROWS rows.
    """
    rows = len(problem.labels)
    step = -(-rows // BLOCK_ROWS)
    weights = problem.class_weights[problem.labels[::step], None]
    kernel, bias = unproject(coefficients, problem.components)
    probabilities = np.exp(log_probabilities(problem.features[::step], kernel, bias))
    curvature = (weights * probabilities * (1 - probabilities)).mean(axis=0, dtype=np.float64).clip(MIN_CURVATURE)
    by_component = np.outer(problem.components.variances, rows * curvature) + problem.penalty[:, None]
    return 1 / np.sqrt(np.vstack([by_component, rows * curvature]))


def _objective(problem: _Problem, scale: np.ndarray, scaled: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the objective of `fit` and its gradient, both divided by the number of rows.

    `scaled` (float64 [(r + 1) * classes]) are the coefficients divided by `scale` (float64 [r + 1, classes]). The
    gradient (float64 [(r + 1) * classes]) is with respect to `scaled`.
    """
    features, labels, class_weights, components, penalty = problem
    rows = len(labels)
    coefficients = scaled.reshape(scale.shape) * scale
    kernel, bias = unproject(coefficients, components)
    loss, by_feature, by_bias = 0.0, np.zeros(kernel.shape), np.zeros(len(bias))
    for first in range(0, rows, BLOCK_ROWS):
        block = np.asarray(features[first : first + BLOCK_ROWS])
        truth = labels[first : first + BLOCK_ROWS]
        weights = class_weights[truth]
        logits = block @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        true_logits = logits[np.arange(len(truth)), truth]
        odds = np.exp(logits, out=logits)
        total = odds.sum(axis=1)
        loss += float(weights @ (np.log(total) - true_logits).astype(np.float64))
        odds *= (weights / total)[:, None].astype(np.float32)
        odds[np.arange(len(truth)), truth] -= weights
        by_feature += block.T @ odds
        by_bias += odds.sum(axis=0)
    by_component = by_feature - np.outer(components.mean, by_bias)
    if components.directions is not None:
        by_component = components.directions.T @ by_component.astype(np.float32)
    penalised = penalty[:, None] * coefficients[:-1]
    gradient = np.vstack([by_component + penalised, by_bias]) * scale
    loss += float((penalised * coefficients[:-1]).sum()) / 2
    return loss / rows, gradient.ravel() / rows


def unproject(coefficients: np.ndarray, components: Components) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel (float32 [d, classes]) and bias (float32 [classes]) that apply to feature vectors directly."""
    kernel = coefficients[:-1].astype(np.float32)
    if components.directions is not None:
        kernel = components.directions @ kernel
    return kernel, (coefficients[-1] - components.mean @ kernel).astype(np.float32)


def log_probabilities(features: Vectors, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities (float32 [n, classes]) of features (float32 [n, d])."""
    from scipy.special import log_softmax

    return log_softmax(np.asarray(features) @ kernel + bias, axis=1)


def evaluate(
    features: Vectors, labels: np.ndarray, kernel: np.ndarray, bias: np.ndarray, class_weights: np.ndarray | None
) -> tuple[float, float]:
    """Return the mean cross-entropy in nats, weighted by `class_weights` (float [classes]), and the accuracy."""
    loss, correct = 0.0, 0
    for first in range(0, len(labels), BLOCK_ROWS):
        truth = labels[first : first + BLOCK_ROWS]
        logs = log_probabilities(np.asarray(features[first : first + BLOCK_ROWS]), kernel, bias)
        true_logs = logs[np.arange(len(truth)), truth]
        weighted = true_logs if class_weights is None else true_logs * class_weights[truth]
        loss -= float(weighted.sum(dtype=np.float64))
        correct += int((logs.argmax(axis=1) == truth).sum())
    return loss / len(labels), correct / len(labels)


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise PipelineError(
            "The stored features of the training images are not all finite numbers. The weights of the backbone are "
            "damaged or do not fit it: see BACKBONE and BACKBONE_WEIGHTS."
        )
