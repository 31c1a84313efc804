"""Finds images whose label is probably wrong, from their stored features.

For each image, a linear head predicts the label. The head was trained without the image and its near-duplicates. Images
whose predicted label is not the given one are ranked by the probability of the given label, lowest first
("self-confidence" in Northcutt, Jiang and Chuang, "Confident Learning", JAIR 2021).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.evaluation import metrics
from dgmd_pipeline.evaluation.metrics import Misclassification
from dgmd_pipeline.training import folds, linear, runtime
from dgmd_pipeline.training.vectors import Vectors

TABLE = "label_suspects.csv"
FOLDS = 5
MAX_FITTED = 20_000  # rows that the heads are fitted on; this limits time and memory
# The sample has at least this many rows of each label, or all rows of a label that has fewer. So the sample may have
# more than MAX_FITTED rows.
MIN_FITTED_OF_LABEL = 20
# Number of principal components that the heads use. With 512, precision and recall differ by at most 1 point, but
# `find` takes two thirds longer.
COMPONENTS = 256
BLOCK = 4096  # rows predicted at a time
MAX_LISTED = 10_000  # rows of the table
SHOWN = 48  # images in the report
SUSPECT = "likely wrong label"
# The regularisations that are tried, the strongest first. Each value is C times the number of fitted rows. C is the
# parameter of scikit-learn's LogisticRegression: the inverse of the L2 penalty.
STRENGTHS = (1, 3, 10, 30, 100, 300, 1000)
# Tolerance of the fits. With 1e-5 instead, a fit takes up to a third longer, and precision and recall on six data sets
# differ by at most 0.6 points (docs/measurements/labels.md).
TOLERANCE = 1e-4
MIN_PROBABILITY = 1e-6  # smaller probabilities are raised to this value in the log loss
Head = tuple[np.ndarray, np.ndarray]  # kernel and bias of a logistic regression


class LabelSuspects(NamedTuple):
    """The images whose label is probably wrong."""

    suspects: list[Misclassification]  # kind SUSPECT; lowest probability of the given label first; at most MAX_LISTED
    total: int  # number of suspects, including those beyond MAX_LISTED
    judged: int  # number of images that were judged


@runtime.one_blas_thread
def find(
    parts: Sequence[Vectors],
    given: np.ndarray | Sequence[int],
    groups: Sequence[str],
    keys: Sequence[str],
    labels: Sequence[str],
    seed: int = 0,
) -> LabelSuspects:
    """Find the images whose label is probably wrong.

    `parts` are the features of the n images: float32 [n1, d], [n2, d], ...; they may be memory-mapped. For each
    image, `given` has the class index, `groups` has the near-duplicate group, and `keys` has the path below raw/.
    `labels` are the names of the classes.

    If all images of a label are in one fold, the head that would judge them does not know their label, so they are left
    out. For example, a label with a single near-duplicate group is in one fold. The heads are fitted on a stratified
    sample of about MAX_FITTED rows, and the features are read in blocks. So each image adds only a few numbers to the
    memory.

    Raises ValueError if the numbers of features and labels differ.
    """
    if sum(map(len, parts)) != len(given):
        raise ValueError(f"{sum(map(len, parts)):,} rows of features for {len(given):,} labels")
    given = np.asarray(given)
    fold_of = folds.assign(given, groups, FOLDS, seed)
    sample = _sample(given, seed)
    in_folds = np.zeros((len(labels), FOLDS), bool)
    in_folds[given[sample], fold_of[sample]] = True
    known = in_folds.sum(axis=1) > 1
    sample = sample[known[given[sample]]]
    if known.sum() < 2:
        return LabelSuspects([], 0, 0)
    project, vectors = _principal_components(_gather(parts, sample))
    classes, columns = np.unique(given[sample], return_inverse=True)
    heads = _fit(vectors, columns, fold_of[sample])
    own, likely, best = _judge(parts, project, heads, classes, given, fold_of)
    suspects = np.flatnonzero((likely != given) & known[given])
    ranked = suspects[np.argsort(own[suspects], kind="stable")]
    rows = [
        Misclassification(
            SUSPECT, keys[row], labels[given[row]], labels[likely[row]], float(best[row]), float(own[row]), int(row)
        )
        for row in ranked[:MAX_LISTED]
    ]
    return LabelSuspects(rows, len(suspects), int(known[given].sum()))


def write(found: LabelSuspects, folder: Path) -> None:
    """Write `label_suspects.csv` into `folder`. Its keys can be copied to corrections.csv."""
    columns = [
        "key",
        "given label",
        "likely label",
        "probability of the likely label",
        "probability of the given label",
    ]
    metrics.write_table(folder / TABLE, columns, (suspect[1:-1] for suspect in found.suspects))


def _sample(given: np.ndarray, seed: int) -> np.ndarray:
    """Return the sorted rows to fit on: all rows, or a sample if there are more than MAX_FITTED.

    In a sample, each label has rows in proportion to its number of images, but at least MIN_FITTED_OF_LABEL. A label
    with fewer images than MIN_FITTED_OF_LABEL has all its rows in the sample.
    """
    if len(given) <= MAX_FITTED:
        return np.arange(len(given))
    order = np.random.default_rng(seed).permutation(len(given))
    order = order[np.argsort(given[order], kind="stable")]
    counts = np.bincount(given)
    place = np.arange(len(given)) - (np.cumsum(counts) - counts)[given[order]]  # rank of each row within its label
    wanted = np.maximum(counts * MAX_FITTED / len(given), MIN_FITTED_OF_LABEL)
    return np.sort(order[place < wanted[given[order]]])


def _gather(parts: Sequence[Vectors], rows: np.ndarray) -> np.ndarray:
    """Return some rows of the concatenated parts. `rows` has the positions of these rows, sorted."""
    ends = np.cumsum([len(part) for part in parts])
    pieces = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return np.concatenate(
        [part[piece - (end - len(part))] for part, piece, end in zip(parts, pieces, ends, strict=True)]
    )


def _blocks(parts: Sequence[Vectors]) -> Iterator[tuple[int, np.ndarray]]:
    """For each block, yield the position of its first row among the rows of all parts, and the block's features."""
    done = 0
    for part in parts:
        for start in range(0, len(part), BLOCK):
            yield done + start, np.asarray(part[start : start + BLOCK])
        done += len(part)


def _principal_components(features: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Return the projection on the first COMPONENTS principal components, and the projected features.

    Features are centred and divided by one number, the standard deviation of all values, so the ratios of the
    variances stay the same. A projection on all components would only rotate the vectors, which does not change the
    predictions of a head with L2 regularisation. The dropped components have the least influence on the predictions.
    """
    from scipy import linalg

    mean = features.mean(axis=0)
    scale = features.std() or np.float32(1)
    centred = features - mean
    last = features.shape[1] - 1
    _, axes = linalg.eigh(centred.T @ centred, subset_by_index=(max(last - COMPONENTS + 1, 0), last))
    axes /= scale
    return lambda rows: (rows - mean) @ axes, centred @ axes


def _fit(vectors: np.ndarray, columns: np.ndarray, fold_of: np.ndarray) -> list[Head]:
    """Return a head for each fold, fitted on the other folds. All heads have the same regularisation.

    `columns` (int [n]) is the position of each row's given label among the outputs of the heads. Each position occurs
    in at least two folds.

    The function tries ever weaker regularisation until the log loss no longer falls, and returns the heads with the
    lowest log loss. The log loss is the mean over all rows; the head of a fold predicts the rows of this fold. Each fit
    starts from the weights that the previous regularisation gave for the same fold. Each fold has its own thread,
    because nearly all of the time is spent in BLAS and NumPy, which release the GIL.
    """
    variances = vectors.var(axis=0, dtype=np.float64)
    components = linear.Components(np.zeros(len(variances), np.float32), variances, None)
    weights = np.ones(columns.max() + 1, np.float32)

    def fit(strength: float, fold: int, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        out = fold_of == fold
        penalty = np.full(len(variances), len(columns) / strength)
        fitted = linear.fit(vectors[~out], columns[~out], weights, components, penalty, start, TOLERANCE)
        logs = linear.log_probabilities(vectors[out], *linear.unproject(fitted, components))
        return fitted, logs[np.arange(len(logs)), columns[out]]

    best: Sequence[np.ndarray | None] = [None] * FOLDS
    lowest = math.inf
    for strength in STRENGTHS:
        with ThreadPoolExecutor(FOLDS) as threads:
            fits, logs = zip(*threads.map(partial(fit, strength), range(FOLDS), best), strict=True)
        loss = -float(np.maximum(np.concatenate(logs), math.log(MIN_PROBABILITY)).mean())
        if loss >= lowest:
            break
        best, lowest = fits, loss
    return [linear.unproject(fitted, components) for fitted in best if fitted is not None]


def _judge(
    parts: Sequence[Vectors],
    project: Callable[[np.ndarray], np.ndarray],
    heads: Sequence[Head],
    classes: np.ndarray,
    given: np.ndarray,
    fold_of: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each row the given label's probability, the most probable label and this label's probability.

    Each row is judged by the head of its fold, because this head was not fitted on the row. `classes` are the class
    indexes of the heads' outputs.
    """
    own, likely, best = np.empty(len(given)), np.empty(len(given), np.int64), np.empty(len(given))
    for start, features in _blocks(parts):
        projected, block_folds = project(features), fold_of[start : start + len(features)]
        for fold in np.unique(block_folds):
            at = np.flatnonzero(block_folds == fold)
            probabilities, rows = np.exp(linear.log_probabilities(projected[at], *heads[fold])), start + at
            # If the heads have no output for the given label of a row, `column` is the output of another label. The
            # caller drops such a row.
            column = np.searchsorted(classes, given[rows]).clip(max=len(classes) - 1)
            own[rows] = probabilities[np.arange(len(at)), column]
            likely[rows], best[rows] = classes[probabilities.argmax(axis=1)], probabilities.max(axis=1)
    return own, likely, best
