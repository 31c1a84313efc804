"""Feature vectors and labels -> a multinomial logistic regression; the vectors may be mapped from disk."""

from functools import partial
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training.vectors import Vectors

COMPONENT_ROWS = 20_000  # vectors that the components are computed from: about 10 for each of up to 2,048 dimensions
BLOCK_ROWS = 8_192  # vectors that are read at a time: 67 MB at 2,048 dimensions
MAX_ITERATIONS = 300
TOLERANCE = 1e-7  # of the relative change of the objective; 1e-9 changed no accuracy by more than 0.1 points


class Components(NamedTuple):
    """The principal components of feature vectors."""

    mean: np.ndarray  # float32 [d]
    variances: np.ndarray  # float64 [r], above 0, r <= d
    directions: np.ndarray  # float64 [d, r], orthonormal


class Basis(NamedTuple):
    """The coordinates in which the coefficients are penalised: (features - mean) @ kernel."""

    mean: np.ndarray  # float32 [d]
    kernel: np.ndarray  # float32 [d, r]


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
    return Components(mean.astype(np.float32), variances[present], directions[:, present])


def build_basis(components: Components, shrinkage: float) -> Basis:
    """Return a basis in which each direction is divided by the square root of its shrunk variance.

    `shrinkage`, above 0 and at most 1, moves the variances towards their mean (Ledoit and Wolf 2004). With 1 all
    directions are divided by the same number: the vectors are centred and scaled as a whole. Lower values whiten them.
    The coordinates have a mean square of 1, so that a penalty has about the same effect in every basis.
    """
    variances = components.variances
    scale = 1 / np.sqrt((1 - shrinkage) * variances + shrinkage * variances.mean()) if len(variances) else variances
    scale = scale / np.sqrt((variances * scale**2).mean()) if len(variances) else scale
    return Basis(components.mean, (components.directions * scale).astype(np.float32))


def fit(
    features: Vectors,
    labels: np.ndarray,
    class_weights: np.ndarray,
    basis: Basis,
    strength: float,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Return the coefficients (float64 [r + 1, classes], the last row is the bias) of a logistic regression.

    They minimise the cross-entropy of features (float32 [n, d]) and labels (int [n]), each row multiplied by the weight
    of its class (float [classes]), plus the sum of their squares, without the bias, divided by twice `strength`
    (scikit-learn's C). `start` is the solution for a neighbouring strength; it saves iterations. L-BFGS (Liu and
    Nocedal 1989) reads BLOCK_ROWS vectors at a time, so `features` may be mapped from disk. scikit-learn's
    LogisticRegression needs a copy of all of them in memory, in this basis.

    Raises PipelineError for features that are not finite.
    """
    from scipy.optimize import minimize

    if start is None:
        start = np.zeros((basis.kernel.shape[1] + 1, len(class_weights)))
    objective = partial(_objective, features, labels, class_weights, basis, strength)
    options = {"maxiter": MAX_ITERATIONS, "ftol": TOLERANCE, "gtol": 1e-6}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    _check_finite(np.array(found.fun))
    return found.x.reshape(start.shape)


def _objective(
    features: Vectors,
    labels: np.ndarray,
    class_weights: np.ndarray,
    basis: Basis,
    strength: float,
    flat_coefficients: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Return what `fit` minimises, divided by the number of rows, and its gradient (float64 [(r + 1) * classes])."""
    rows = len(labels)
    coefficients = flat_coefficients.reshape(-1, len(class_weights))
    kernel, bias = unproject(coefficients, basis)
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
    gradient = np.empty_like(coefficients)
    centred = (by_feature - np.outer(basis.mean, by_bias)).astype(np.float32)
    gradient[:-1] = basis.kernel.T @ centred + coefficients[:-1] / strength
    gradient[-1] = by_bias
    loss += float((coefficients[:-1] ** 2).sum()) / (2 * strength)
    return loss / rows, gradient.ravel() / rows


def unproject(coefficients: np.ndarray, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel (float32 [d, classes]) and bias (float32 [classes]) that apply to feature vectors directly."""
    kernel = basis.kernel @ coefficients[:-1].astype(np.float32)
    return kernel, (coefficients[-1] - basis.mean @ kernel).astype(np.float32)


def mean_and_deviation(features: Vectors) -> tuple[np.ndarray, float]:
    """Return the mean vector (float64 [d]) of features (float32 [n, d]) and the root of their mean variance, above 0.

    Raises PipelineError for features that are not finite.
    """
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for first in range(0, len(features), BLOCK_ROWS):
        block = features[first : first + BLOCK_ROWS]
        total += block.sum(axis=0, dtype=np.float64)
        squares += np.square(block, dtype=np.float64).sum(axis=0)
    _check_finite(squares)
    mean = total / len(features)
    return mean, float(np.sqrt((squares / len(features) - mean**2).clip(0).mean())) or 1.0


def log_probabilities(features: Vectors, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities (float32 [n, classes]) of features (float32 [n, d])."""
    from scipy.special import log_softmax

    return log_softmax(np.asarray(features) @ kernel + bias, axis=1)


def evaluate(
    features: Vectors, labels: np.ndarray, kernel: np.ndarray, bias: np.ndarray, class_weights: np.ndarray | None
) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy; `class_weights` (float [classes]) weigh the former."""
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
