import random
from collections import Counter, defaultdict
from hashlib import sha256
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgmd_pipeline import manifest
from dgmd_pipeline.data import split, subset_sum
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Example


def rows(label, *sizes):
    """Groups of near-duplicates of these sizes."""
    return [
        Example(f"{label}/{group}-{number}.png", label, 0, f"{label}{group}-{number}", f"{label}{group}")
        for group, size in enumerate(sizes)
        for number in range(size)
    ]


@pytest.fixture(scope="session")
def divide(tmp_path_factory):
    """Write rows, split them, and return the rows of both splits and the counts."""
    folder = tmp_path_factory.mktemp("split")

    def divide(examples, fraction):
        manifest.write(folder / "images.csv", Example, sorted(examples))
        counts = split.write_splits(folder / "images.csv", fraction, folder)
        return *(list(manifest.read(folder / f"{name}.csv", Example)) for name in ("training", "validation")), counts

    return divide


@settings(max_examples=40)
@given(st.integers(2, 400), st.floats(0.001, 0.999))
def test_each_label_has_its_exact_share_and_at_least_one_image_in_each_split(divide, count, fraction):
    examples = rows("anise", *[1] * count) + rows("mint", *[1] * 7)
    training, validation, counts = divide(examples, fraction)
    assert sorted(training + validation) == sorted(examples)
    assert counts == {"training": len(training), "validation": len(validation), "across labels": 0}
    expected = min(max(round(fraction * count), 1), count - 1)
    assert Counter(row.label for row in validation)["anise"] == expected


def test_the_split_depends_on_the_content_only(divide):
    assert [row.path for row in divide(rows("mint", *[1] * 10), 0.2)[1]] == ["mint/6-0.png", "mint/8-0.png"]


def test_other_images_change_the_split_of_few(divide):
    before = {row.path for row in divide(rows("anise", *[1] * 1000), 0.2)[1]}
    after = {row.path for row in divide(rows("anise", *[1] * 1010), 0.2)[1]}
    assert len(before - after) <= 10


SIZES = st.sampled_from(
    [(1, 1, 1, 2, 3), (1, 2, 3, 4, 5), (6, 6, 6, 2, 3), (4, 4, 10, 7, 25), (2, 2, 2, 2, 3), (9, 40)]
)


@given(SIZES.flatmap(lambda sizes: st.lists(st.sampled_from(sizes), min_size=1, max_size=60)), st.floats(0, 1))
def test_the_chosen_sizes_are_those_of_the_exhaustive_search(sizes, fraction):
    count = sum(sizes)
    target = min(max(round(fraction * count), 1), count - 1)
    assert subset_sum.nearest_subset(sizes, target, count - 1) == exhaustive_search(sizes, target, count - 1)


def exhaustive_search(sizes, target, limit):
    """The same with one set of sums for each position, which needs quadratic time and memory."""
    sums = [{0}]
    for size in reversed(sizes):
        sums.append(sums[-1] | {each + size for each in sums[-1]})
    sums.reverse()
    remaining = min((s for s in sums[0] if 1 <= s <= limit), key=lambda s: (abs(s - target), s), default=0)
    chosen = []
    for position, size in enumerate(sizes):
        if remaining - size in sums[position + 1]:
            chosen.append(position)
            remaining -= size
    return chosen


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.sampled_from([0.1, 0.2, 0.5, 0.8]))
def test_groups_are_never_divided_and_the_share_is_the_nearest_possible(divide, sizes, fraction):
    examples = rows("anise", *sizes)
    training, validation, _ = divide(examples + rows("mint", 1, 1), fraction)
    validation = [row for row in validation if row.label == "anise"]
    assert not {row.group for row in training} & {row.group for row in validation}
    target = min(max(round(fraction * len(examples)), 1), len(examples) - 1)
    sums = {sum(some) for length in range(1, len(sizes)) for some in combinations(sizes, length)}
    if sums:
        assert abs(len(validation) - target) == min(abs(total - target) for total in sums)
    else:
        assert not validation


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=40),
    st.sampled_from([0.1, 0.2, 0.5, 0.9]),
)
def test_the_rows_of_the_validation_split_are_those_of_the_definition(divide, groups, fraction):
    examples = rows("mint", 1, 1) + [
        Example(f"{label}/{number}-{copy}", label, 0, f"{number} {copy}", f"{group}")
        for number, (label, group, size) in enumerate(groups)
        for copy in range(size)
    ]
    training, validation, counts = divide(examples, fraction)
    expected, across = by_definition(examples, fraction)
    assert (validation, counts["across labels"]) == ([row for row in sorted(examples) if row in expected], across)
    assert training == [row for row in sorted(examples) if row not in expected]


def by_definition(examples, fraction):
    """The rows of the validation split, and the number of groups across labels."""
    members = defaultdict(list)
    for row in examples:
        members[row.group].append(row)
    across = {group for group, found in members.items() if len({row.label for row in found}) > 1}
    chosen = set()
    for label, count in Counter(row.label for row in examples).items():
        candidates = [group for group, found in members.items() if group not in across and found[0].label == label]
        candidates.sort(key=lambda group: sha256(f"split {group}".encode()).digest())
        target = min(max(round(fraction * count), 1), count - 1)
        positions = exhaustive_search([len(members[group]) for group in candidates], target, count - 1)
        chosen.update(row for position in positions for row in members[candidates[position]])
    return chosen, len(across)


def test_labels_that_are_a_single_group_are_named(divide, caplog):
    divide(rows("mint", 1, 1) + rows("zest", 3) + rows("anise", 2), 0.2)
    assert caplog.messages == ["labels without validation images (a single image or only near-duplicates): anise, zest"]
    with pytest.raises(NoUsableInput, match="single image, or only near-duplicates"):
        divide(rows("zest", 3) + rows("anise", 2), 0.2)


@pytest.mark.parametrize("fraction", [0.2, 0.9])
def test_a_group_across_labels_is_in_the_training_split(divide, fraction):
    pair = [Example("anise/x.png", "anise", 0, "x", "same"), Example("mint/y.png", "mint", 1, "y", "same")]
    training, _, counts = divide(rows("anise", *[1] * 9) + rows("mint", *[1] * 9) + pair, fraction)
    assert set(pair) <= set(training)
    assert counts["across labels"] == 1


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1, 2), (2, 2, 2, 3), (5, 7, 9, 50)])
def test_half_a_million_groups_of_one_label_are_split_exactly(sizes):
    groups = random.Random(1).choices(sizes, k=500_000)
    chosen = subset_sum.nearest_subset(groups, sum(groups) // 5, sum(groups) - 1)
    assert sum(groups[position] for position in chosen) == sum(groups) // 5
