"""Stored features of both splits -> validation images that have a near-duplicate among the training images.

Thumbnails (`images`) find re-encoded and resized copies. Features also find flips, crops, tints and small rotations.
What is found is reported only: a rule on features cannot tell two look-alike objects from two images of one object.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.evaluation import metrics

TABLE = "leaks.csv"
NEIGHBOURS = 5  # training images near each validation image; with more copies of one image, none of them is found
SHARE = 0.25  # of the distance to the last neighbour; chosen by measurement: docs/measurements/leaks.md
ROUNDING = 1e-6  # of a distance in float32; features that are all the same differ by no more
BLOCK = 2048  # images compared at a time, with as many others: 16 MB
MOST_PAIRS = 2_000_000_000  # compared at most; 100,000 images, 20,000 of them for validation, make 1,600,000,000


class Leak(NamedTuple):
    """A validation image and the training image that is nearest to it."""

    key: str  # of the validation image, below raw/
    training_key: str
    similarity: float  # cosine of the angle between the features, -1 to 1
    label: str  # of the validation image
    training_label: str
    position: int  # among the validation images, from 0
    training_position: int


class Found(NamedTuple):
    """The leaks, and how many validation images were looked at."""

    leaks: list[Leak]  # the most similar pair first
    compared: int


def find(
    training: np.ndarray,
    validation: np.ndarray,
    keys: Sequence[Sequence[str]],
    labels: Sequence[Sequence[str]],
) -> Found:
    """Find the validation images whose nearest training image is much nearer than the others.

    `training` and `validation` are features (float32 [n, d] and [m, d]) and may be mapped from disk; `keys` and
    `labels` hold those of the training images and those of the validation images.

    A pair is reported where its cosine distance is below SHARE of the distance to the fifth nearest training image (the
    ratio test of Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", 2004, section 7.1), and below SHARE
    of the lower quartile of these distances over all validation images. No fixed threshold serves: among photographs of
    clothing a similarity of .9 is rare, among solar cells or features of a random network it is usual.

    The time grows with n times m: 0.1 CPU seconds for 2,400 images, 2 for 20,000, about 50 for 100,000 (1,280
    dimensions). Beyond MOST_PAIRS, an evenly spread sample of the validation images is compared.
    """
    if len(training) < NEIGHBOURS or not len(validation):
        return Found([], 0)
    step = -(-len(training) * len(validation) // MOST_PAIRS)
    compared = np.arange(0, len(validation), step)
    similarities, nearest = _neighbours(training, validation, compared)
    distances = (1 - similarities).clip(min=0)
    limit = SHARE * np.minimum(distances[:, -1], np.quantile(distances[:, -1], 0.25))
    chosen = np.flatnonzero((distances[:, 0] < limit) & (limit > ROUNDING))
    found = []
    for row in chosen[np.argsort(distances[chosen, 0], kind="stable")]:
        one, other = int(compared[row]), int(nearest[row])
        found.append(
            Leak(
                keys[1][one], keys[0][other], float(similarities[row, 0]), labels[1][one], labels[0][other], one, other
            )
        )
    return Found(found, len(compared))


def write(folder: Path, leaks: Sequence[Leak]) -> None:
    """Write `leaks.csv` into `folder`."""
    columns = ["validation key", "training key", "similarity", "validation label", "training label"]
    metrics.write_table(folder / TABLE, columns, (leak[:5] for leak in leaks))


def _neighbours(training: np.ndarray, validation: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the NEIGHBOURS highest similarities of each chosen validation image, and the position of the highest.

    The similarities are float32 [len(chosen), NEIGHBOURS], the highest first, the positions int64 [len(chosen)].
    """
    best = np.full((len(chosen), NEIGHBOURS), -np.inf, np.float32)
    nearest = np.zeros(len(chosen), np.int64)
    for start in range(0, len(chosen), BLOCK):
        part = slice(start, start + BLOCK)
        ours = _unit(validation[chosen[part]])
        for first in range(0, len(training), BLOCK):
            products = ours @ _unit(training[first : first + BLOCK]).T
            highest = products.argmax(axis=1)
            nearer = products[np.arange(len(ours)), highest] > best[part, 0]
            nearest[part][nearer] = first + highest[nearer]
            both = np.concatenate([best[part], products], axis=1)
            best[part] = -np.sort(-np.partition(both, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:], axis=1)
    return best, nearest


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
