import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline.data import split
from dgmd_pipeline.manifest import Example


def rows(label, *sizes):
    """Groups of near-duplicates of these sizes."""
    return [
        Example(f"{label}/{group}-{number}.png", label, 0, f"{label}{group}-{number}", f"{label}{group}")
        for group, size in enumerate(sizes)
        for number in range(size)
    ]


@given(st.integers(2, 400), st.floats(0.001, 0.999))
def test_each_label_gives_exactly_its_share_and_at_least_one_to_each_side(count, fraction):
    many = rows("anise", *[1] * count) + rows("mint", *[1] * 7)
    sides = split.split(many, fraction)
    assert sorted(sides.training + sides.validation) == sorted(many)
    expected = min(max(round(fraction * count), 1), count - 1)
    assert Counter(row.label for row in sides.validation)["anise"] == expected


def test_order_and_machine_do_not_matter():
    many = rows("anise", 1, 2, 1, 1, 3, 1, 1) + rows("mint", *[1] * 50)
    shuffled = random.Random(1).sample(many, len(many))
    assert split.split(many, 0.2) == split.split(shuffled, 0.2)
    chosen = [row.path for row in split.split(rows("mint", *[1] * 10), 0.2).validation]
    assert chosen == ["mint/6-0.png", "mint/8-0.png"]


def test_other_images_change_the_side_of_few():
    before = {row.path for row in split.split(rows("anise", *[1] * 1000), 0.2).validation}
    after = {row.path for row in split.split(rows("anise", *[1] * 1010), 0.2).validation}
    assert len(before - after) <= 10


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.sampled_from([0.1, 0.2, 0.5, 0.8]))
def test_groups_stay_whole_and_the_share_is_as_near_as_they_allow(sizes, fraction):
    many = rows("anise", *sizes)
    sides = split.split(many, fraction)
    assert not {row.group for row in sides.training} & {row.group for row in sides.validation}
    wanted = min(max(round(fraction * len(many)), 1), len(many) - 1)
    sums = {sum(some) for length in range(1, len(sizes)) for some in combinations(sizes, length)}
    if sums:
        assert abs(len(sides.validation) - wanted) == min(abs(total - wanted) for total in sums)
        assert sides.unvalidated == []
    else:
        assert (sides.validation, sides.unvalidated) == ([], ["anise"])


@pytest.mark.parametrize("fraction", [0.2, 0.9])
def test_a_group_that_spans_labels_is_trained_on(fraction):
    pair = [Example("anise/x.png", "anise", 0, "x", "same"), Example("mint/y.png", "mint", 1, "y", "same")]
    sides = split.split(rows("anise", *[1] * 9) + rows("mint", *[1] * 9) + pair, fraction)
    assert set(pair) <= set(sides.training)
    assert sides.across == 1


def test_a_hundred_thousand_images_of_one_label_are_split_exactly():
    sides = split.split(rows("anise", *[1, 1, 1, 2] * 20_000), 0.2)
    assert len(sides.validation) == 20_000
