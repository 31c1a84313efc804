"""The test of each class: error rate and power in simulations, and p-values against other methods."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from dgmd_pipeline.evaluation.class_losses import LEVEL, adjusted_p, detectable_loss
from dgmd_pipeline.evaluation.comparison import mid_p

SIZES = [(24, 18), (10, 9), (200, 20)]  # classes, validation images of each
MAX_DROP = 0.15


def draw(random, classes, images, disagreement, loss=0.0):
    """Gained and lost images of two models that are equally good, except for a loss of the first class."""
    found = random.multinomial(images, [disagreement / 2, disagreement / 2, 1 - disagreement], classes)[:, :2]
    if loss:
        lost = disagreement / 2 + loss
        share = min(disagreement + loss, 1)
        found[0] = random.multinomial(images, [share - min(lost, share), min(lost, share), 1 - share])[:2]
    return found.T


def found_worse(gained, lost, images):
    return (np.array(adjusted_p(gained, lost)) <= LEVEL) & ((lost - gained) / images > MAX_DROP)


@pytest.mark.parametrize(("classes", "images"), SIZES)
@pytest.mark.parametrize("disagreement", [0.04, 0.12, 0.3])
def test_at_most_one_in_twenty_equally_good_versions_is_refused(classes, images, disagreement):
    """Refused for its accuracy or for a class. With a fixed limit of 15 points, 8 to 100 % were refused."""
    random = np.random.default_rng(7)
    refused = 0
    for _ in range(400):
        gained, lost = draw(random, classes, images, disagreement)
        worse = lost.sum() > gained.sum() and mid_p(gained.sum(), lost.sum()) < 0.05
        refused += worse or found_worse(gained, lost, images).any()
    assert refused / 400 <= 0.05


@pytest.mark.parametrize(("classes", "images"), SIZES)
def test_the_detectable_loss_is_found_in_four_of_five_cases(classes, images):
    random = np.random.default_rng(8)
    others = draw(random, classes - 1, images, 0.07).sum(axis=0)
    loss = detectable_loss(images, others.tolist(), 0.07, MAX_DROP)
    found = [found_worse(*draw(random, classes, images, 0.07, loss), images)[0] for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_the_correction_is_exact_and_step_down():
    """Enumerated: all losses that equally good models can have, given how many images only one gets right."""
    gained, lost = np.array([0, 1, 0, 2]), np.array([9, 9, 2, 1])
    discordant = gained + lost

    def chance_of(p, classes):
        """The probability that a class has a p-value of at most `p`."""
        total = 0.0
        for losses in product(*(range(discordant[one] + 1) for one in classes)):
            lowest = min(binom.sf(less - 1, discordant[one], 0.5) for less, one in zip(losses, classes, strict=True))
            if lowest <= p * (1 + 1e-9):
                total += np.prod(
                    [binom.pmf(less, discordant[one], 0.5) for less, one in zip(losses, classes, strict=True)]
                )
        return total

    first, second = binom.sf(8, 9, 0.5), binom.sf(8, 10, 0.5)
    found = adjusted_p(gained, lost)
    assert found[0] == pytest.approx(chance_of(first, [0, 1, 2, 3]))
    assert found[1] == pytest.approx(chance_of(second, [1, 2, 3]))
    assert found[2] > LEVEL and found[3] > LEVEL


def holm(gained, lost):
    p, adjusted, largest = binom.sf(lost - 1, gained + lost, 0.5), np.ones(len(lost)), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min((len(p) - rank) * p[index], 1))
        adjusted[index] = largest
    return adjusted


def test_it_finds_all_that_holm_finds_and_more():
    random, by_holm, ours = np.random.default_rng(9), 0, 0
    for _ in range(100):
        gained, lost = draw(random, 24, 18, 0.07, loss=0.5)
        with_holm = holm(gained, lost) <= LEVEL
        found = np.array(adjusted_p(gained, lost)) <= LEVEL
        assert (found >= with_holm).all()
        by_holm, ours = by_holm + with_holm[0], ours + found[0]
    assert ours > 2 * by_holm


def test_no_loss_of_a_class_with_few_images_can_be_found():
    assert detectable_loss(5, [0] * 9, 0.07, MAX_DROP) is None
    assert adjusted_p([0], [5])[0] > LEVEL
    assert detectable_loss(6, [0] * 9, 0.07, MAX_DROP) < 1


def test_a_thousand_classes_cost_no_more_than_their_different_counts():
    random = np.random.default_rng(10)
    found = adjusted_p(*draw(random, 1000, 500, 0.1))
    assert len(found) == 1000 and min(found) > LEVEL


def test_no_class_is_worse_without_any_difference():
    assert adjusted_p([], []) == []
    assert adjusted_p([0, 3], [0, 0]) == [1, 1]
