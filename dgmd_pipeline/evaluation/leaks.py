"""Finds validation images with a near-duplicate among the training images, from stored features.

The comparison of thumbnails in `data.near_duplicates` finds re-encoded and resized copies. The comparison of features
here also finds flips, crops, tints and small rotations. It only reports the pairs that it finds. It removes no image,
because features do not show whether two images are of one object or of two similar objects.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline.evaluation import metrics
from dgmd_pipeline.training.vectors import Vectors

TABLE = "leaks.csv"
NEIGHBOURS = 5  # nearest training images of a validation image; an image with 5 or more copies is not found
SHARE = 0.25  # share of the distance to the fifth neighbour, see `find`; measured: docs/measurements/leaks.md
ROUNDING = 1e-6  # maximum distance of identical features, because of rounding in float32
BLOCK = 2048  # images of each split that are compared at a time; their similarities take 16 MB
MAX_PAIRS = 2_000_000_000  # compared pairs; 80,000 training and 20,000 validation images make 1,600,000,000 pairs


class Leak(NamedTuple):
    """A validation image and its nearest training image."""

    key: str  # path of the validation image below raw/
    training_key: str
    similarity: float  # cosine of the angle between the features, -1 to 1
    label: str  # of the validation image
    training_label: str
    position: int  # among the validation images, from 0
    training_position: int


class Leaks(NamedTuple):
    """The pairs of near-duplicates."""

    pairs: list[Leak]  # the most similar pair first
    compared: int  # number of validation images that were compared


def find(
    training: Vectors,
    validation: Vectors,
    keys: Sequence[Sequence[str]],
    labels: Sequence[Sequence[str]],
) -> Leaks:
    """Find the validation images whose nearest training image is much nearer than other training images.

    `training` and `validation` are features (float32 [n, d] and [m, d]) and may be memory-mapped. `keys` and `labels`
    each have two parts: the first for the training images, the second for the validation images.

    A pair is reported if its cosine distance meets two conditions:
    1. It is below SHARE of the distance between the validation image and its fifth nearest training image. This is the
       ratio test of Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", 2004, section 7.1.
    2. It is below SHARE of a distance that is small in this data set. Each compared validation image has a distance to
       its fifth nearest training image. The small distance is the lower quartile of these distances.

    No fixed threshold works: a similarity of 0.9 is rare for photographs of clothing, but usual for photographs of
    solar cells, and for the features of a random network.

    The time grows with n times m. With 1,280 dimensions, it is 0.1 CPU seconds for 2,400 images, 2 seconds for 20,000
    images and about 50 seconds for 100,000 images. If there are more than MAX_PAIRS pairs, only an evenly spread sample
    of the validation images is compared.
    """
    if len(training) < NEIGHBOURS or not len(validation):
        return Leaks([], 0)
    step = -(-len(training) * len(validation) // MAX_PAIRS)
    compared = np.arange(0, len(validation), step)
    similarities, nearest = _neighbours(training, validation, compared)
    distances = (1 - similarities).clip(min=0)
    limit = SHARE * np.minimum(distances[:, -1], np.quantile(distances[:, -1], 0.25))
    chosen = np.flatnonzero((distances[:, 0] < limit) & (limit > ROUNDING))
    pairs = []
    for row in chosen[np.argsort(distances[chosen, 0], kind="stable")]:
        position, training_position = int(compared[row]), int(nearest[row])
        pairs.append(
            Leak(
                key=keys[1][position],
                training_key=keys[0][training_position],
                similarity=float(similarities[row, 0]),
                label=labels[1][position],
                training_label=labels[0][training_position],
                position=position,
                training_position=training_position,
            )
        )
    return Leaks(pairs, len(compared))


def write(leaks: Leaks, folder: Path) -> None:
    """Write `leaks.csv` into `folder`."""
    columns = ["validation key", "training key", "similarity", "validation label", "training label"]
    metrics.write_table(folder / TABLE, columns, (leak[:5] for leak in leaks.pairs))


def _neighbours(training: Vectors, validation: Vectors, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each chosen validation image its similarities to the nearest training images.

    The function also returns the position of the nearest training image. `chosen` are positions of validation images.
    The similarities are float32 [len(chosen), NEIGHBOURS], highest first. The returned positions are int64
    [len(chosen)].
    """
    best = np.full((len(chosen), NEIGHBOURS), -np.inf, np.float32)
    nearest = np.zeros(len(chosen), np.int64)
    for start in range(0, len(chosen), BLOCK):
        part = slice(start, start + BLOCK)
        vectors = _unit(validation[chosen[part]])
        for first in range(0, len(training), BLOCK):
            products = vectors @ _unit(training[first : first + BLOCK]).T
            highest = products.argmax(axis=1)
            nearer = products[np.arange(len(vectors)), highest] > best[part, 0]
            nearest[part][nearer] = first + highest[nearer]
            both = np.concatenate([best[part], products], axis=1)
            best[part] = -np.sort(-np.partition(both, -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:], axis=1)
    return best, nearest


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
