"""Compares two models on the same images. The result also says which losses of accuracy could be detected.

Labels are compared by name: the class indexes of the two models may differ.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from dgmd_pipeline.evaluation.predictions import PredictedLabels

RESAMPLES = 10_000
CONFIDENCE = 0.95
DISAGREEMENT = 0.07  # share of images that only one of two versions gets right, measured in docs/measurements/leaks.md
# `detection` uses the observed share of images that only one version gets right, if there are at least this many such
# images. Otherwise, `detection` uses DISAGREEMENT.
MIN_DISCORDANT = 10
LOSS = 0.03  # loss of accuracy; the report gives the probability that a comparison detects this loss
POWER = 0.8  # probability of detection, the usual choice for the power of a test
# Field of `Comparison` -> its key in comparison.json.
JSON_KEYS = {"labels_only_candidate": "labels_only_here", "labels_only_production": "labels_only_there"}


@dataclass(frozen=True)
class ClassComparison:
    """How the two models recognise the images of one true label."""

    label: str
    images: int  # at least 1
    recall: float  # of the candidate, 0 to 1
    production_recall: float
    gained: int  # images that only the candidate gets right
    lost: int  # images that only production gets right

    @property
    def change(self) -> float:
        """Return the candidate's recall minus production's."""
        return self.recall - self.production_recall


@dataclass(frozen=True)
class Detection:
    """The loss of accuracy that a comparison on these images can detect."""

    disagreement: float  # share of images that only one of the two models gets right, 0 to 1
    assumed: bool  # True: `disagreement` is DISAGREEMENT; False: it was observed
    loss: float  # the loss that `probability` is about; always LOSS
    probability: float  # probability that the comparison finds a true loss of `loss` significant
    detectable_loss: float | None  # smallest true loss that is found with probability POWER; None: no such loss


@dataclass(frozen=True)
class Comparison:
    """A candidate compared with production on the same images. Shares are 0 to 1."""

    version: int | None  # of production
    run: str  # the run that trained the production model
    left_out: int  # images that at least one of the two models was trained on
    images: int
    accuracy: float
    production_accuracy: float
    difference: float  # accuracy - production_accuracy
    low: float  # lower end of the 95 % interval of the difference
    high: float  # upper end
    gained: int  # images that only the candidate gets right
    lost: int  # images that only production gets right
    p: float  # p-value of the difference, see `mid_p`
    detection: Detection
    classes: list[ClassComparison]  # one for each true label, sorted by label
    labels_only_candidate: list[str]  # labels that only the candidate knows
    labels_only_production: list[str]

    @property
    def is_worse(self) -> bool:
        """Return whether the candidate's accuracy is significantly lower than production's."""
        # The bootstrap interval is not enough. With few images it is too narrow: with four lost images and no gained
        # image, it is below 0, although `p` is not significant.
        return self.high < 0 and self.p < 1 - CONFIDENCE

    @property
    def is_better(self) -> bool:
        """Return whether the candidate's accuracy is significantly higher than production's."""
        return self.low > 0 and self.p < 1 - CONFIDENCE


def compare(
    candidate: PredictedLabels,
    production: PredictedLabels,
    version: int | None = None,
    run: str = "",
    left_out: int = 0,
) -> Comparison:
    """Compare a candidate's predictions with production's. Both are for the same images, in the same order.

    Both models must know the true label of each image. So a label that only one model knows is never the true label of
    an image. `version` and `run` identify production. `left_out` is the number of images that were left out because a
    model was trained on them. The result has copies of `version`, `run` and `left_out`.

    The interval of the difference comes from a paired bootstrap with 10,000 resamples of the images (Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
    """
    correct, production_correct = candidate.correct, production.correct
    gained, lost = int((correct & ~production_correct).sum()), int((production_correct & ~correct).sum())
    low, high = _interval(gained, lost, len(correct))
    return Comparison(
        version=version,
        run=run,
        left_out=left_out,
        images=len(correct),
        accuracy=float(correct.mean()),
        production_accuracy=float(production_correct.mean()),
        difference=float(correct.mean() - production_correct.mean()),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p=mid_p(gained, lost),
        detection=detection(len(correct), gained + lost),
        classes=_compare_classes(candidate, production_correct),
        labels_only_candidate=sorted(set(candidate.labels) - set(production.labels)),
        labels_only_production=sorted(set(production.labels) - set(candidate.labels)),
    )


def _compare_classes(candidate: PredictedLabels, production_correct: np.ndarray) -> list[ClassComparison]:
    correct, labels = candidate.correct, candidate.labels
    kinds = (
        np.ones_like(correct),
        correct,
        production_correct,
        correct & ~production_correct,
        production_correct & ~correct,
    )
    counts = np.stack([np.bincount(candidate.truth[kind], minlength=len(labels)) for kind in kinds], axis=1).tolist()
    found = [
        ClassComparison(label, images, right / images, production_right / images, gained, lost)
        for label, (images, right, production_right, gained, lost) in zip(labels, counts, strict=True)
        if images
    ]
    return sorted(found, key=lambda row: row.label)


def mid_p(gained: int, lost: int) -> float:
    """Return the p-value (0 to 1) of McNemar's mid-p test. Its null hypothesis: gains and losses are equally likely.

    Source: Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data", BMC Medical Research
    Methodology 13:91, 2013. McNemar's exact test is not used: it rejects the null hypothesis much less often than its
    level allows, so it misses real losses.
    """
    from scipy.stats import binom

    images, larger = gained + lost, max(gained, lost)
    if gained == lost:
        return 1.0  # the source has a lower value, which is not significant either
    return float(2 * binom.sf(larger, images, 0.5) + binom.pmf(larger, images, 0.5))


def detection(images: int, discordant: int | None = None) -> Detection:
    """Return the loss of accuracy that a comparison on `images` images can detect.

    `discordant` is the number of images that only one of the two models gets right; None if nothing was compared.
    """
    assumed = discordant is None or discordant < MIN_DISCORDANT
    share = DISAGREEMENT if discordant is None or assumed else discordant / images
    low, high = 0.0, 1.0
    while high - low > 0.0005:
        middle = (low + high) / 2
        low, high = (low, middle) if power(images, middle, share) >= POWER else (middle, high)
    return Detection(
        disagreement=share,
        assumed=assumed,
        loss=LOSS,
        probability=power(images, LOSS, share),
        detectable_loss=high if power(images, high, share) >= POWER else None,
    )


def power(images: int, loss: float, disagreement: float) -> float:
    """Return the probability that `mid_p` finds a true loss of accuracy (0 to 1) significant.

    The value is exact, not simulated. The number of images that only one version gets right has a binomial distribution
    (`images`, `disagreement`). Given this number, the number of images that only production gets right has a binomial
    distribution, too. The disagreement of two versions cannot be smaller than the loss. If `disagreement` is smaller,
    the function uses `loss` instead. It then assumes that production gets every image right that the candidate gets
    right.

    `Comparison.is_worse` also requires a bootstrap interval below 0. With this requirement, the probability is lower by
    at most 3 points (docs/measurements/leaks.md).
    """
    from scipy.stats import binom

    disagreement = max(disagreement, loss)
    if not disagreement:
        return 0.0
    first, last = binom.interval(1 - 1e-9, images, disagreement)
    discordant = np.arange(max(first, 1), last + 1)
    start = binom.isf((1 - CONFIDENCE) / 2, discordant, 0.5)  # about the lowest significant number of losses
    needed = np.select(  # the exact number, at most one away from `start`; 0 if no number is significant
        [_is_significant(start + step, discordant) for step in (-1, 0, 1)], [start - 1, start, start + 1]
    )
    found = binom.sf(needed - 1, discordant, 0.5 + loss / (2 * disagreement)) * (needed > 0)
    return float((binom.pmf(discordant, images, disagreement) * found).sum())


def _is_significant(lost: np.ndarray, discordant: np.ndarray) -> np.ndarray:
    from scipy.stats import binom

    tail = 2 * binom.sf(lost, discordant, 0.5) + binom.pmf(lost, discordant, 0.5)
    return (tail < 1 - CONFIDENCE) & (2 * lost > discordant) & (lost <= discordant)


def _interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """Return the percentile interval of (gained - lost) / images.

    A gained image counts 1, a lost image -1 and any other image 0. So a resample of the images is a draw from a
    multinomial distribution.
    """
    random = np.random.default_rng(0)  # the same counts give the same interval
    draws = random.multinomial(images, np.array([gained, lost, images - gained - lost]) / images, size=RESAMPLES)
    edges = np.quantile((draws[:, 0] - draws[:, 1]) / images, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(edges[0]), float(edges[1])


def to_json(comparison: Comparison) -> dict[str, object]:
    """Return a comparison as the values of comparison.json."""
    return {JSON_KEYS.get(name, name): value for name, value in asdict(comparison).items()}


def from_json(values: Mapping[str, Any]) -> Comparison:
    """Return a comparison from the values of comparison.json. Raises KeyError or TypeError for other values.

    A version in the registry may come from an older pipeline, which recorded neither `run` nor `detection`.
    """
    recorded = {"run": "", "detection": None, **values}
    found = {field.name: recorded[JSON_KEYS.get(field.name, field.name)] for field in fields(Comparison)}
    known = found["detection"]
    found["detection"] = Detection(**known) if known else detection(found["images"], found["gained"] + found["lost"])
    found["classes"] = [ClassComparison(**row) for row in found["classes"]]
    return Comparison(**found)
