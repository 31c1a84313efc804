"""Gains and losses of each class -> the classes that are significantly worse, and what loss could be detected.

One test for each class, with a correction for their number. For a class, the images that only one of two equally good
models gets right are losses with a probability of 1/2 (McNemar's exact test, one-sided). The p-values of small classes
have few possible values: a class with two such images can have no p-value below 1/4, so it cannot be the reason for a
smaller one. The correction uses this: an adjusted p-value is the probability that equally good models have a p-value as
small as this one in any class, given how many images of each class only one model gets right. The test is step-down:
the class with the lowest p-value does not count for the others.

Sources: Westfall and Young, "Resampling-Based Multiple Testing", 1993, section 2.6 (step-down minP), here without
resampling, because classes share no images; Tarone, "A modified Bonferroni method for discrete data", Biometrics 46,
1990 (why classes with few such images do not count). It finds everything that Holm's correction finds, and more.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.025  # with the 0.025 of the test of the accuracy, at most 0.05 of equally good versions are called worse
POWER = 0.8  # probability of detection


def adjusted_p(gained: Sequence[int], lost: Sequence[int]) -> list[float]:
    """Return for each class the p-value (0 to 1) of its losses, corrected for the number of classes.

    It is exact up to LEVEL. Of the larger ones, only the first is exact; the others are 1. `gained` and `lost` are the
    numbers of images that only the candidate or only production gets right.
    """
    import numpy as np
    from scipy.stats import binom

    discordant = np.add(gained, lost)
    p = binom.sf(np.subtract(lost, 1), discordant, 0.5)
    counts, adjusted, last = Counter(discordant.tolist()), np.ones(len(p)), 0.0
    for index in np.argsort(p, kind="stable"):
        last = max(last, _lowest_of_all(float(p[index]), counts))
        adjusted[index] = last
        counts[int(discordant[index])] -= 1
        if last > LEVEL:  # the others are not lower: they need no exact value
            break
    return adjusted.tolist()


def _lowest_of_all(p: float, counts: Counter[int]) -> float:
    """Return the probability that at least one of the classes has a p-value of at most `p` by chance.

    `counts` is the number of classes by their number of discordant images.
    """
    none = 1.0
    for discordant, classes in counts.items():
        none *= (1 - _attained(p, discordant)) ** classes
    return 1 - none


def _attained(p: float, discordant: int) -> float:
    """Return the probability that a class's p-value is at most `p`: the largest possible p-value that is."""
    tails = _tails(discordant)
    return float(tails[tails <= p * (1 + 1e-9)].max(initial=0.0))


def _tails(discordant: int) -> "np.ndarray":
    """Return the possible p-values of a class, float [discordant + 1], by the number of lost images."""
    import numpy as np
    from scipy.stats import binom

    return binom.sf(np.arange(-1, discordant), discordant, 0.5)


def detectable_loss(images: int, others: Sequence[int], disagreement: float, max_drop: float) -> float | None:
    """Return the true loss of a class's recall (0 to 1) that is found with probability POWER; None if there is none.

    The class has `images` images. `others` are the numbers of discordant images of the other classes, `disagreement` is
    the share of images that only one of two equally good models gets right. Found: significant, and a loss of recall
    of more than `max_drop` is observed.
    """
    needed = _needed(images, Counter(others), max_drop)
    if _found(images, needed, 1.0, disagreement) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 0.0005:
        middle = (low + high) / 2
        low, high = (low, middle) if _found(images, needed, middle, disagreement) >= POWER else (middle, high)
    return high


def _needed(images: int, others: Counter[int], max_drop: float) -> "np.ndarray":
    """Return how many losses are found, int [images + 1], by the number of discordant images; one more if none is."""
    import numpy as np
    from scipy.stats import binom

    low, high = 0.0, LEVEL
    while high - low > 1e-6 * high:  # the largest p-value that is significant beside the other classes
        middle = (low + high) / 2
        low, high = (middle, high) if middle + _lowest_of_all(middle, others) <= LEVEL else (low, middle)
    discordant = np.arange(images + 1)
    significant = binom.isf(low, discordant, 0.5) + 1  # P(losses >= this) <= low
    large = np.floor((max_drop * images + 1e-9 + discordant) / 2) + 1
    return np.minimum(np.maximum(significant, large), discordant + 1)


def _found(images: int, needed: "np.ndarray", loss: float, disagreement: float) -> float:
    """Return the probability that a loss is found. It comes on top of the disagreement of equally good models."""
    import numpy as np
    from scipy.stats import binom

    share = min(disagreement + loss, 1.0)
    if not share:
        return 0.0
    losses = min((disagreement / 2 + loss) / share, 1.0)
    discordant = np.arange(images + 1)
    return float((binom.pmf(discordant, images, share) * binom.sf(needed - 1, discordant, losses)).sum())
