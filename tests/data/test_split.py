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
def test_each_label_has_its_exact_share_and_at_least_one_image_in_each_split(count, fraction):
    examples = rows("anise", *[1] * count) + rows("mint", *[1] * 7)
    found = split.split(examples, fraction)
    assert sorted(found.training + found.validation) == sorted(examples)
    expected = min(max(round(fraction * count), 1), count - 1)
    assert Counter(row.label for row in found.validation)["anise"] == expected


def test_the_split_depends_on_the_content_only():
    examples = rows("anise", 1, 2, 1, 1, 3, 1, 1) + rows("mint", *[1] * 50)
    shuffled = random.Random(1).sample(examples, len(examples))
    assert split.split(examples, 0.2) == split.split(shuffled, 0.2)
    chosen = [row.path for row in split.split(rows("mint", *[1] * 10), 0.2).validation]
    assert chosen == ["mint/6-0.png", "mint/8-0.png"]


def test_other_images_change_the_split_of_few():
    before = {row.path for row in split.split(rows("anise", *[1] * 1000), 0.2).validation}
    after = {row.path for row in split.split(rows("anise", *[1] * 1010), 0.2).validation}
    assert len(before - after) <= 10


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.sampled_from([0.1, 0.2, 0.5, 0.8]))
def test_groups_are_never_divided_and_the_share_is_the_nearest_possible(sizes, fraction):
    examples = rows("anise", *sizes)
    found = split.split(examples, fraction)
    assert not {row.group for row in found.training} & {row.group for row in found.validation}
    target = min(max(round(fraction * len(examples)), 1), len(examples) - 1)
    sums = {sum(some) for length in range(1, len(sizes)) for some in combinations(sizes, length)}
    if sums:
        assert abs(len(found.validation) - target) == min(abs(total - target) for total in sums)
        assert found.labels_without_validation == []
    else:
        assert (found.validation, found.labels_without_validation) == ([], ["anise"])


@pytest.mark.parametrize("fraction", [0.2, 0.9])
def test_a_group_across_labels_is_in_the_training_split(fraction):
    pair = [Example("anise/x.png", "anise", 0, "x", "same"), Example("mint/y.png", "mint", 1, "y", "same")]
    found = split.split(rows("anise", *[1] * 9) + rows("mint", *[1] * 9) + pair, fraction)
    assert set(pair) <= set(found.training)
    assert found.groups_across_labels == 1


def test_a_hundred_thousand_images_of_one_label_are_split_exactly():
    found = split.split(rows("anise", *[1, 1, 1, 2] * 20_000), 0.2)
    assert len(found.validation) == 20_000
