"""Cross-validation folds: whole groups, even labels, the same for the same rows and seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgmd_pipeline.training import folds


def table(labels, fold_of, count):
    """Return how many rows of each label (row) each fold (column) has."""
    found = np.zeros((max(labels) + 1, count), int)
    np.add.at(found, (labels, fold_of), 1)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_single_rows_are_spread_evenly_by_label_and_in_total(seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2, 3], [1000, 333, 52, 4]))
    fold_of = folds.assign(labels, [f"g{row}" for row in range(len(labels))], 5, seed)
    found = table(labels, fold_of, 5)
    assert np.ptp(found, axis=1).max() <= 1
    assert np.ptp(found.sum(0)) <= 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=60), st.integers(2, 6))
def test_a_group_is_never_divided_and_every_row_has_a_fold(rows, count):
    labels, groups = np.array([row[0] for row in rows]), [str(row[1]) for row in rows]
    fold_of = folds.assign(labels, groups, count, 0)
    assert fold_of.shape == labels.shape
    assert set(fold_of) <= set(range(count))
    assert len({*zip(groups, fold_of.tolist(), strict=True)}) == len(set(groups))


def test_labels_stay_even_where_groups_are_large_and_span_labels():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(600), random.integers(1, 6, 600))
    labels = groups % 3
    labels[random.random(len(labels)) < 0.05] = 3  # in the groups of the others
    found = table(labels, folds.assign(labels, [str(group) for group in groups], 5, 1), 5)
    assert (np.ptp(found, axis=1) <= [3, 3, 3, 8]).all(), found


def test_folds_depend_on_the_rows_and_the_seed_and_not_on_their_order():
    random = np.random.default_rng(0)
    labels, groups = random.integers(0, 5, 300), [str(group) for group in random.integers(0, 200, 300)]
    fold_of, order = folds.assign(labels, groups, 5, 7), random.permutation(300)
    again = folds.assign(labels[order], [groups[row] for row in order], 5, 7)
    assert (again == fold_of[order]).all()
    assert (folds.assign(labels, groups, 5, 8) != fold_of).any()
