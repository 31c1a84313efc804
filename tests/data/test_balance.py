from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgmd_pipeline import manifest
from dgmd_pipeline.data import balance
from dgmd_pipeline.manifest import Example, Image


def images(**counts):
    return [
        Image(f"{label}/{number}.png", label, f"{label}{number}", "PNG", 32, 32, f"{label}{number}")
        for label, count in counts.items()
        for number in range(count)
    ]


INDEXES = {"anise": 0, "basil": 1, "mint": 2}


@pytest.fixture(scope="session")
def reduce(tmp_path_factory):
    """Write images, balance them, and return the rows, the class weights and the counts."""
    folder = tmp_path_factory.mktemp("balance")

    def reduce(images, indexes, limit):
        manifest.write(folder / "inspected.csv", Image, sorted(images))
        counts = balance.write_balanced(folder / "inspected.csv", indexes, limit, folder)
        rows = list(manifest.read(folder / "images.csv", Example))
        return rows, manifest.read_json(folder / "class_weights.json"), counts

    return reduce


def test_only_classes_above_the_limit_are_reduced_to_it(reduce):
    rows, _, counts = reduce(images(anise=100, basil=10, mint=40), INDEXES, 1.2)
    assert Counter(row.label for row in rows) == counts["after"] == {"anise": 60, "basil": 10, "mint": 40}
    assert counts["before"] == {"anise": 100, "basil": 10, "mint": 40}
    assert len(set(rows)) == len(rows)


def test_without_a_limit_every_image_is_kept(reduce):
    rows, _, _ = reduce(images(anise=100, basil=10, mint=40), INDEXES, None)
    assert Counter(row.label for row in rows) == {"anise": 100, "basil": 10, "mint": 40}


def test_images_of_labels_without_an_index_are_left_out(reduce):
    rows, _, counts = reduce(images(anise=4, nutmeg=4, mint=4), INDEXES, 1.15)
    assert {(row.label, row.class_index) for row in rows} == {("anise", 0), ("mint", 2)}
    assert counts["before"] == {"anise": 4, "mint": 4}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0)), min_size=1, unique=True), st.floats(1, 3))
def test_the_rows_are_those_of_the_definition(reduce, pairs, limit):
    found = [Image(f"{label}/{number}", label, f"{label}{number}", "PNG", 9, 9, "g") for label, number in pairs]
    indexes = {"a": 2, "b": 0, "c": 1}
    of = {label: [image for image in found if image.label == label] for label in indexes}
    cap = int(limit * sum(map(len, of.values())) / max(sum(map(bool, of.values())), 1))
    kept = [image for each in of.values() for image in sorted(each, key=rank)[:cap]]
    if kept:
        rows, _, _ = reduce(found, indexes, limit)
        assert rows == sorted(Example(i.path, i.label, indexes[i.label], i.sha256, i.group) for i in kept)


def rank(image):
    return sha256(f"balance {image.sha256}".encode()).digest()


def test_most_rows_remain_when_other_images_arrive(reduce):
    before = set(reduce(images(anise=200, basil=20, mint=20), INDEXES, 1.0)[0])
    after = set(reduce(images(anise=202, basil=20, mint=20), INDEXES, 1.0)[0])
    assert len(before & after) >= len(before) - 2


def test_class_weights_are_inverse_square_roots_with_a_mean_of_1(reduce):
    rows, weights, counts = reduce(images(anise=90, basil=10, mint=40), INDEXES, 10)
    assert weights["1"] / weights["0"] == pytest.approx(3) and weights["2"] / weights["0"] == pytest.approx(1.5)
    assert sum(weights[str(row.class_index)] for row in rows) / len(rows) == pytest.approx(1)
    assert counts["largest weight"] == round(weights["1"], 3)
