"""Likely wrong labels of real images: found in bounded memory, and not confirmed by an image's own copies."""

import csv

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dgmd_pipeline.data import corrections
from dgmd_pipeline.evaluation import label_suspects
from dgmd_pipeline.evaluation.label_suspects import LabelSuspects

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits():
    """The pixels of 1,200 handwritten digits (float32 [n, 64]) and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return pixels[:1200].astype(np.float32), labels[:1200]


def flipped(labels, seed, classes=10):
    """Give 5 % of the images a wrong label; return the labels and which are wrong."""
    random = np.random.default_rng(seed)
    wrong = random.choice(len(labels), len(labels) // 20, replace=False)
    given = labels.copy()
    given[wrong] = (given[wrong] + random.integers(1, classes, len(wrong))) % classes
    return given, np.isin(np.arange(len(labels)), wrong)


def find(features, given, names=NAMES, groups=None):
    keys = [f"{names[label]}/{row}.png" for row, label in enumerate(given)]
    return label_suspects.find([features[:900], features[900:]], given, groups or keys, keys, names)


def found_among(found, wrong, first):
    return wrong[[row.position for row in found.suspects[:first]]]


@pytest.mark.parametrize("seed", range(2))
def test_flipped_labels_of_real_images_come_first(digits, seed):
    features, labels = digits
    given, wrong = flipped(labels, seed)
    found = find(features, given)
    assert found.judged == 1200
    assert found_among(found, wrong, 30).mean() >= 0.9
    assert found_among(found, wrong, 2 * wrong.sum()).sum() >= 0.85 * wrong.sum()
    top = found.suspects[:30]
    assert [row.label for row in top] == [NAMES[given[row.position]] for row in top]
    assert [row.key for row in top] == [f"{row.label}/{row.position}.png" for row in top]
    assert np.mean([row.predicted == NAMES[labels[row.position]] for row in top]) >= 0.8
    own = [row.true_probability for row in found.suspects]
    assert own == sorted(own)
    assert all(0 <= row.true_probability < row.probability <= 1 for row in found.suspects)


def test_flipped_labels_are_also_found_among_two_labels(digits):
    features, labels = digits
    given, wrong = flipped(labels % 2, 0, classes=2)
    found = find(features, given, ["even", "odd"])
    assert found_among(found, wrong, 20).mean() >= 0.9


def test_near_duplicates_of_an_image_do_not_confirm_its_wrong_label(digits):
    features, labels = digits
    random = np.random.default_rng(0)
    copied = np.repeat(random.choice(1200, 20, replace=False), 8)
    many = np.concatenate([features, features[copied] + random.normal(0, 0.1, (160, 64)).astype(np.float32)])
    given = np.concatenate([labels, (labels[copied] + 1) % 10])
    groups = [str(row) for row in [*range(1200), *copied]]
    given[copied] = (labels[copied] + 1) % 10
    wrong = np.isin(groups, copied.astype(str))
    assert found_among(find(many, given, groups=groups), wrong, 160).mean() >= 0.9
    apart = find(many, given, groups=[str(row) for row in range(len(given))])
    assert found_among(apart, wrong, 160).mean() < 0.7


def test_a_label_whose_images_are_one_group_is_not_judged(digits):
    features, labels = digits
    groups = [f"{row}" if label else "zeros" for row, label in enumerate(labels)]
    found = find(features, labels, groups=groups)
    assert found.judged == (labels > 0).sum()
    assert "0" not in {row.label for row in found.suspects}
    assert find(features, np.zeros(1200, int)) == LabelSuspects([], 0, 0)
    assert find(features, labels, groups=["all"] * 1200) == LabelSuspects([], 0, 0)


def test_heads_are_fitted_on_a_sample_and_judge_all_images_in_blocks(digits, monkeypatch):
    features, labels = digits
    monkeypatch.setattr(label_suspects, "MAX_FITTED", 800)
    monkeypatch.setattr(label_suspects, "BLOCK", 128)
    monkeypatch.setattr(label_suspects, "MAX_LISTED", 70)
    given, wrong = flipped(labels, 0)
    found = find(features, given)
    assert (found.judged, len(found.suspects)) == (1200, 70)
    assert found.total > 70
    assert found_among(found, wrong, 30).mean() >= 0.9


def test_the_sample_keeps_the_proportions_of_labels_and_enough_of_rare_ones(monkeypatch):
    monkeypatch.setattr(label_suspects, "MAX_FITTED", 1000)
    given = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [6000, 3000, 100, 7]))
    sample = label_suspects._sample(given, 0)
    assert np.bincount(given[sample]).tolist() == [659, 330, 20, 0, 7]
    assert (np.diff(sample) > 0).all()
    assert len(set(sample // 3000)) > 2


def test_identical_features_are_no_error():
    found = find(np.ones((1000, 8), np.float32), np.arange(1000) % 2)
    assert found.judged == 1000


def test_a_wrong_number_of_features_is_refused(digits):
    with pytest.raises(ValueError, match="1,200 rows of features for 1,100 labels"):
        find(digits[0], digits[1][:1100])


def test_rows_of_the_table_can_be_used_as_corrections(digits, tmp_path):
    features, labels = digits
    given, _ = flipped(labels, 0)
    names = ["=1+1", *NAMES[1:]]
    found = find(features, given, names)
    label_suspects.write(found, tmp_path)
    table = list(csv.DictReader((tmp_path / "label_suspects.csv").open(encoding="utf-8")))
    assert len(table) == len(found.suspects)
    assert list(table[0]) == [
        "key", "given label", "likely label", "probability of the likely label", "probability of the given label",
    ]  # fmt: skip
    cells = {cell for row in table for cell in row.values()}
    assert not [cell for cell in cells if cell.startswith("=")]
    with (tmp_path / corrections.NAME).open("w", newline="") as file:
        csv.writer(file).writerows([["key", "label"], *([row["key"], row["likely label"]] for row in table)])
    assert corrections.read(tmp_path / corrections.NAME) == {row.key: row.predicted for row in found.suspects}
