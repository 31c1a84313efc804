"""Stored features and given labels -> the images whose label is probably wrong.

Each image is judged by a linear head that was trained without it and without its near-duplicates. The images that get
another label are ranked by the probability of the label they have, the lowest first ("self-confidence" in Northcutt,
Jiang and Chuang, "Confident Learning", JAIR 2021).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline.evaluation import metrics
from dgmd_pipeline.evaluation.metrics import Misclassification
from dgmd_pipeline.training import folds

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

TABLE = "label_suspects.csv"
FOLDS = 5
FITTED = 20_000  # rows that the heads are fitted on: bounds time and memory
FITTED_OF_LABEL = 20  # rows of each label, where it has them, even if that makes a few more than FITTED
COMPONENTS = 256  # 512 change precision and recall by at most 1 point and take two thirds longer
BLOCK = 4096  # rows judged at a time
LISTED = 10_000  # rows of the table
SHOWN = 48  # pictures in the report
SUSPECT = "likely wrong label"
STRENGTHS = (1, 3, 10, 30, 100, 300, 1000)  # C of the logistic regression times the number of rows
TOLERANCE = 1e-3  # of the gradient
MOST_STEPS = 200
LEAST = 1e-6  # probability, for the log loss


class Found(NamedTuple):
    """The suspects, and of how many images they are."""

    suspects: list[Misclassification]  # of the kind SUSPECT, the least probable label first, at most LISTED
    total: int  # suspects, those beyond LISTED included
    judged: int  # images


def find(
    parts: Sequence[np.ndarray],
    given: np.ndarray | Sequence[int],
    groups: Sequence[str],
    keys: Sequence[str],
    labels: Sequence[str],
    seed: int = 0,
) -> Found:
    """Judge n images by their features: arrays (float32 [n1, d], [n2, d], ...), which may be mapped from disk.

    `given` (n) holds their class indexes, `groups` and `keys` (n each) their near-duplicate groups and their paths
    below raw/, `labels` the name of each class index. A label whose images are all in one fold, as those of a single
    near-duplicate group are, cannot be judged: its images are left out.

    Memory does not grow with n, but for a few numbers an image: the heads are fitted on a sample of about FITTED rows
    that has every label in proportion, and the features are read in blocks. The strength of the regularisation is the
    one with the lowest log loss on the folds left out, measured against the labels as given.
    """
    from threadpoolctl import threadpool_limits

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
        return Found([], 0, 0)
    # BLAS threads that wait for each other cost 44 instead of 0.7 CPU seconds on a busy machine with two cores.
    with threadpool_limits(1):
        project, vectors = _principal_components(_gather(parts, sample))
        heads = _fit(vectors, given[sample], fold_of[sample])
        own, likely, best = _judge(parts, project, heads, given, fold_of)
    suspects = np.flatnonzero((likely != given) & known[given])
    ranked = suspects[np.argsort(own[suspects], kind="stable")]
    rows = [
        Misclassification(
            SUSPECT, keys[row], labels[given[row]], labels[likely[row]], float(best[row]), float(own[row]), int(row)
        )
        for row in ranked[:LISTED]
    ]
    return Found(rows, len(suspects), int(known[given].sum()))


def write(found: Found, folder: Path) -> None:
    """Write `label_suspects.csv` into `folder`; its keys are those of corrections.csv."""
    columns = [
        "key",
        "given label",
        "likely label",
        "probability of the likely label",
        "probability of the given label",
    ]
    metrics.write_table(folder / TABLE, columns, (suspect[1:-1] for suspect in found.suspects))


def _sample(given: np.ndarray, seed: int) -> np.ndarray:
    """Return the sorted rows to fit on: all, or each label's share of FITTED and at least FITTED_OF_LABEL of it."""
    if len(given) <= FITTED:
        return np.arange(len(given))
    order = np.random.default_rng(seed).permutation(len(given))
    order = order[np.argsort(given[order], kind="stable")]
    counts = np.bincount(given)
    place = np.arange(len(given)) - (np.cumsum(counts) - counts)[given[order]]  # within the label
    wanted = np.maximum(counts * FITTED / len(given), FITTED_OF_LABEL)
    return np.sort(order[place < wanted[given[order]]])


def _gather(parts: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return some rows (sorted) of the parts as if those were one array."""
    ends = np.cumsum([len(part) for part in parts])
    pieces = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return np.concatenate(
        [part[piece - (end - len(part))] for part, piece, end in zip(parts, pieces, ends, strict=True)]
    )


def _blocks(parts: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of features and the number of each one's first row among all parts."""
    done = 0
    for part in parts:
        for start in range(0, len(part), BLOCK):
            yield done + start, np.asarray(part[start : start + BLOCK])
        done += len(part)


def _principal_components(features: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Return the projection on the first COMPONENTS principal components, and the projected features.

    Features are centred and divided by one number, the standard deviation of all values: directions keep their weights.
    The rotation changes nothing for a head with L2 regularisation. What is cut off is what that suppresses most.
    """
    from scipy import linalg

    mean = features.mean(axis=0)
    scale = features.std() or np.float32(1)
    centred = features - mean
    last = features.shape[1] - 1
    _, axes = linalg.eigh(centred.T @ centred, subset_by_index=(max(last - COMPONENTS + 1, 0), last))
    axes /= scale
    return lambda rows: (rows - mean) @ axes, centred @ axes


def _fit(vectors: np.ndarray, given: np.ndarray, fold_of: np.ndarray) -> list["LogisticRegression"]:
    """Return a head for each fold, fitted on the others, with the strength of regularisation that predicts best.

    Strengths go from strong to weak, each fit beginning where the last one ended, until the log loss rises.
    """
    from sklearn.linear_model import LogisticRegression

    column = np.unique(given, return_inverse=True)[1]
    heads = [LogisticRegression(tol=TOLERANCE, max_iter=MOST_STEPS, warm_start=True) for _ in range(FOLDS)]
    kept, lowest = heads, np.inf
    own = np.empty(len(given))
    for strength in STRENGTHS:
        for fold, head in enumerate(heads):
            out = fold_of == fold
            head.set_params(C=strength / len(given)).fit(vectors[~out], given[~out])
            if out.any():
                own[out] = head.predict_proba(vectors[out])[np.arange(out.sum()), column[out]]
        loss = -np.log(np.maximum(own, LEAST)).mean()
        if loss >= lowest:
            break
        kept, lowest = copy.deepcopy(heads), loss
    return kept


def _judge(
    parts: Sequence[np.ndarray],
    project: Callable[[np.ndarray], np.ndarray],
    heads: Sequence["LogisticRegression"],
    given: np.ndarray,
    fold_of: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each row, by its fold's head, the given label's probability, the likely label and its probability."""
    classes = heads[0].classes_
    own, likely, best = np.empty(len(given)), np.empty(len(given), np.int64), np.empty(len(given))
    for start, features in _blocks(parts):
        projected, folds_here = project(features), fold_of[start : start + len(features)]
        for fold in np.unique(folds_here):
            at = np.flatnonzero(folds_here == fold)
            probabilities, rows = heads[fold].predict_proba(projected[at]), start + at
            # Of a label without a column the result means nothing; the caller leaves it out.
            column = np.searchsorted(classes, given[rows]).clip(max=len(classes) - 1)
            own[rows] = probabilities[np.arange(len(at)), column]
            likely[rows], best[rows] = classes[probabilities.argmax(axis=1)], probabilities.max(axis=1)
    return own, likely, best
