"""Tests which classes are significantly worse, and computes which loss the test can detect.

Each class has a one-sided exact McNemar test. The p-values are corrected for the number of classes. An image is
discordant if only one of the two models gets it right. If the models are equally good, a discordant image is a loss
with probability 1/2.

The correction replaces each p-value p by an adjusted p-value: the probability that, by chance, at least one class has a
p-value of p or less. This probability is computed for two equally good models and the observed numbers of discordant
images. A class with few discordant images has few possible p-values. For example, the only possible p-values of
a class with two discordant images are 1/4, 3/4 and 1. If p is below 1/4, a class with two discordant images adds
nothing to the adjusted p-value. The test is step-down: it corrects the lowest p-value first, and leaves each corrected
class out of the later corrections.

Sources: Westfall and Young, "Resampling-Based Multiple Testing", 1993, section 2.6 (step-down minP), here without
resampling, because classes share no images; Tarone, "A modified Bonferroni method for discrete data", Biometrics 46,
1990 (why classes with few discordant images do not count). The test finds every loss that Holm's correction finds, and
further losses.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Level of significance of this one-sided test. The two-sided test of the accuracy finds a loss of accuracy at the same
# level. So at most 2.5 % + 2.5 % = 5 % of the versions that are as good as production are called worse by one or both
# of the two tests.
LEVEL = 0.025
POWER = 0.8  # probability of detection


def adjusted_p(gained: Sequence[int], lost: Sequence[int]) -> list[float]:
    """Return for each class the p-value (0 to 1) of its losses, corrected for the number of classes.

    Values up to LEVEL are exact. Of the values above LEVEL, the lowest is exact. All others are set to 1.

    For each class, `gained` has the number of images that only the candidate gets right. `lost` has the number of
    images that only production gets right.
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
        if last > LEVEL:  # the remaining classes have no lower values, so they are not significant
            break
    return adjusted.tolist()


def _lowest_of_all(p: float, counts: Counter[int]) -> float:
    """Return the probability that at least one of the classes has a p-value of at most `p` by chance.

    `counts` maps a number of discordant images to the number of classes that have it.
    """
    none = 1.0
    for discordant, classes in counts.items():
        none *= (1 - _attained(p, discordant)) ** classes
    return 1 - none


def _attained(p: float, discordant: int) -> float:
    """Return the probability that a class's p-value is at most `p`.

    This probability is equal to the largest p-value up to `p` that the class can have.
    """
    tails = _tails(discordant)
    return float(tails[tails <= p * (1 + 1e-9)].max(initial=0.0))


def _tails(discordant: int) -> "np.ndarray":
    """Return the p-value of a class for each number of lost images from 0 to `discordant`, float [discordant + 1]."""
    import numpy as np
    from scipy.stats import binom

    return binom.sf(np.arange(-1, discordant), discordant, 0.5)


def detectable_loss(images: int, others: Sequence[int], disagreement: float, max_drop: float) -> float | None:
    """Return the smallest true loss of a class's recall (0 to 1) that is found with probability POWER.

    Returns None if even a loss of 1 is found with a lower probability.

    The class has `images` images. `others` are the numbers of discordant images of the other classes. `disagreement`
    is the share of images that are discordant if the two models are equally good. A loss is found if it is significant
    and the observed loss of recall is larger than `max_drop`.
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
    """Return how many lost images are needed to find a loss, int [images + 1].

    Element d is the number for d discordant images. It is d + 1 if a loss is not found even when all d images are lost.
    """
    import numpy as np
    from scipy.stats import binom

    low, high = 0.0, LEVEL
    while high - low > 1e-6 * high:  # search for the largest p-value that is significant, given the other classes
        middle = (low + high) / 2
        low, high = (middle, high) if middle + _lowest_of_all(middle, others) <= LEVEL else (low, middle)
    discordant = np.arange(images + 1)
    significant = binom.isf(low, discordant, 0.5) + 1  # P(losses >= significant) <= low
    large = np.floor((max_drop * images + 1e-9 + discordant) / 2) + 1
    return np.minimum(np.maximum(significant, large), discordant + 1)


def _found(images: int, needed: "np.ndarray", loss: float, disagreement: float) -> float:
    """Return the probability that a true loss is found.

    The share of discordant images is the sum of `disagreement` and `loss`. For equally good models, the share is
    `disagreement`.
    """
    import numpy as np
    from scipy.stats import binom

    share = min(disagreement + loss, 1.0)
    if not share:
        return 0.0
    losses = min((disagreement / 2 + loss) / share, 1.0)
    discordant = np.arange(images + 1)
    return float((binom.pmf(discordant, images, share) * binom.sf(needed - 1, discordant, losses)).sum())
