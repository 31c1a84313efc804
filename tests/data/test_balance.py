from collections import Counter

import pytest

from dgmd_pipeline.data import balance
from dgmd_pipeline.manifest import Image


def images(**counts):
    return [
        Image(f"{label}/{number}.png", label, f"{label}{number}", "PNG", 32, 32, f"{label}{number}")
        for label, count in counts.items()
        for number in range(count)
    ]


INDEXES = {"anise": 0, "basil": 1, "mint": 2}


def test_only_classes_above_the_limit_are_reduced_to_it():
    rows = balance.balance(images(anise=100, basil=10, mint=40), INDEXES, 1.2)
    assert Counter(row.label for row in rows) == {"anise": 60, "basil": 10, "mint": 40}
    assert len(set(rows)) == len(rows)


def test_without_a_limit_every_image_is_kept():
    rows = balance.balance(images(anise=100, basil=10, mint=40), INDEXES, None)
    assert Counter(row.label for row in rows) == {"anise": 100, "basil": 10, "mint": 40}


def test_images_of_labels_without_an_index_are_left_out():
    rows = balance.balance(images(anise=4, nutmeg=4, mint=4), INDEXES, 1.15)
    assert {(row.label, row.class_index) for row in rows} == {("anise", 0), ("mint", 2)}


def test_the_order_of_the_images_does_not_matter():
    found = images(anise=100, basil=10, mint=40)
    assert balance.balance(found, INDEXES, 1.15) == balance.balance(found[::-1], INDEXES, 1.15)


def test_most_rows_remain_when_other_images_arrive():
    before = set(balance.balance(images(anise=200, basil=20, mint=20), INDEXES, 1.0))
    after = set(balance.balance(images(anise=202, basil=20, mint=20), INDEXES, 1.0))
    assert len(before & after) >= len(before) - 2


def test_class_weights_are_inverse_square_roots_with_a_mean_of_1():
    rows = balance.balance(images(anise=90, basil=10, mint=40), INDEXES, 10)
    weights = balance.class_weights(rows)
    assert weights[1] / weights[0] == pytest.approx(3) and weights[2] / weights[0] == pytest.approx(1.5)
    assert sum(weights[row.class_index] for row in rows) / len(rows) == pytest.approx(1)
