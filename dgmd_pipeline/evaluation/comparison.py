"""Two models' probabilities for the same pictures -> which is better, and how sure that is; and what stands in the way.

Models are compared by the names of their labels: indexes may differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
DISAGREEMENT = 0.07  # share of images that only one of two versions gets right; measured: docs/measurements/leaks.md
LEAST_DISCORDANT = 10  # images that only one version gets right, for their share to be used instead
LOSS = 0.03  # of accuracy, whose detection is reported
SURE = 0.8  # probability of detection, the usual choice for the power of a test


def compare(
    here: np.ndarray,
    there: np.ndarray,
    truth: Sequence[str],
    labels_here: Sequence[str],
    labels_there: Sequence[str],
) -> dict[str, Any]:
    """Compare a candidate (`here`) with production (`there`) on the same n pictures.

    `here` is float [n, len(labels_here)], `there` float [n, len(labels_there)], `truth` the n true labels, all of them
    among both models' labels. A model that names a label which only it knows is wrong.

    Returns plain values for JSON: images; accuracy and production_accuracy; difference (candidate - production) with
    low and high, its 95 % interval by the paired bootstrap (Efron and Tibshirani 1993, chapter 13: 10,000 resamples of
    the pictures); gained and lost, the pictures that only the one or only the other gets right, and p, of `mid_p`;
    `detection`, what `detection` returns; `classes`, a row for each true label with images, recall, production_recall,
    gained and lost; labels_only_here and labels_only_there.
    """
    actual = np.array(truth)
    right = np.array(labels_here)[here.argmax(axis=1)] == actual
    production_right = np.array(labels_there)[there.argmax(axis=1)] == actual
    won, lost = right & ~production_right, production_right & ~right
    low, high = _interval(int(won.sum()), int(lost.sum()), len(actual))
    classes = [
        {
            "label": str(label),
            "images": int(chosen.sum()),
            "recall": float(right[chosen].mean()),
            "production_recall": float(production_right[chosen].mean()),
            "gained": int(won[chosen].sum()),
            "lost": int(lost[chosen].sum()),
        }
        for label in np.unique(actual)
        for chosen in [actual == label]
    ]
    return {
        "images": len(actual),
        "accuracy": float(right.mean()),
        "production_accuracy": float(production_right.mean()),
        "difference": float(right.mean() - production_right.mean()),
        "low": low,
        "high": high,
        "gained": int(won.sum()),
        "lost": int(lost.sum()),
        "p": mid_p(int(won.sum()), int(lost.sum())),
        "detection": detection(len(actual), int(won.sum() + lost.sum())),
        "classes": classes,
        "labels_only_here": sorted(set(labels_here) - set(labels_there)),
        "labels_only_there": sorted(set(labels_there) - set(labels_here)),
    }


def mid_p(gained: int, lost: int) -> float:
    """Return the p-value (0 to 1) of McNemar's mid-p test of whether gains and losses differ by more than chance.

    Source: Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data", BMC Medical Research
    Methodology 13:91, 2013. The exact test rejects much less often than its level says, and so misses real losses.
    """
    from scipy.stats import binom

    images, most = gained + lost, max(gained, lost)
    if gained == lost:
        return 1.0  # the formula below gives less than 1 here; the source says 1 - P(gained) / 2, which decides nothing
    return float(2 * binom.sf(most, images, 0.5) + binom.pmf(most, images, 0.5))


def detection(images: int, discordant: int | None = None) -> dict[str, Any]:
    """Return what loss of accuracy the validation images can show at all.

    `discordant` is how many of the n `images` only one of two versions gets right; None where nothing was compared.

    Returns plain values for JSON: `disagreement`, the share of such images that is reckoned with, and whether it is
    `assumed` (DISAGREEMENT) or observed (from LEAST_DISCORDANT images on); `probability`, that a true `loss` (LOSS) is
    found to be significant; `detectable_loss`, the true loss for which that probability is SURE; None where none is.
    """
    assumed = discordant is None or discordant < LEAST_DISCORDANT
    share = DISAGREEMENT if discordant is None or assumed else discordant / images
    low, high = 0.0, 1.0
    while high - low > 0.0005:
        middle = (low + high) / 2
        low, high = (low, middle) if power(images, middle, share) >= SURE else (middle, high)
    return {
        "disagreement": share,
        "assumed": assumed,
        "loss": LOSS,
        "probability": power(images, LOSS, share),
        "detectable_loss": high if power(images, high, share) >= SURE else None,
    }


def power(images: int, loss: float, disagreement: float) -> float:
    """Return the probability that `mid_p` finds a true loss of accuracy (0 to 1) significant on so many images.

    Exact: the number of images that only one version gets right is binomial (`images`, `disagreement`), and of these
    the number of lost ones. Where the loss is larger than the disagreement, every disagreement is a loss. `is_worse`
    also asks for the bootstrap's interval, which lowers the probability by at most 3 points:
    docs/measurements/leaks.md.
    """
    from scipy.stats import binom

    disagreement = max(disagreement, loss)
    if not disagreement:
        return 0.0
    least, most = binom.interval(1 - 1e-9, images, disagreement)
    discordant = np.arange(max(least, 1), most + 1)
    start = binom.isf((1 - CONFIDENCE) / 2, discordant, 0.5)  # the critical number of losses is this or a neighbour
    needed = np.select([_significant(start + step, discordant) for step in (-1, 0, 1)], [start - 1, start, start + 1])
    found = binom.sf(needed - 1, discordant, 0.5 + loss / (2 * disagreement)) * (needed > 0)
    return float((binom.pmf(discordant, images, disagreement) * found).sum())


def _significant(lost: np.ndarray, discordant: np.ndarray) -> np.ndarray:
    from scipy.stats import binom

    tail = 2 * binom.sf(lost, discordant, 0.5) + binom.pmf(lost, discordant, 0.5)
    return (tail < 1 - CONFIDENCE) & (2 * lost > discordant) & (lost <= discordant)


def _interval(won: int, lost: int, images: int) -> tuple[float, float]:
    """Return the percentile interval of (won - lost) / images.

    A picture counts 1, -1 or 0, so resampling pictures is drawing from a multinomial distribution.
    """
    random = np.random.default_rng(0)  # the same figures give the same interval
    draws = random.multinomial(images, np.array([won, lost, images - won - lost]) / images, size=RESAMPLES)
    edges = np.quantile((draws[:, 0] - draws[:, 1]) / images, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(edges[0]), float(edges[1])


def is_worse(comparison: Mapping[str, Any]) -> bool:
    """Whether the candidate's accuracy is lower than production's by more than chance, by what `compare` returns."""
    # Of few pictures the bootstrap alone is too sure of itself: four that are lost and none gained would do.
    return comparison["high"] < 0 and comparison["p"] < 1 - CONFIDENCE


def is_better(comparison: Mapping[str, Any]) -> bool:
    """Whether it is higher by more than chance."""
    return comparison["low"] > 0 and comparison["p"] < 1 - CONFIDENCE
