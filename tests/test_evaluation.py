import csv
import json

import numpy as np
import pytest

from dgmd_pipeline import evaluation

LABELS = ["anise", "basil", "gone", "mint"]


def rows(path):
    return list(csv.reader(path.open()))


@pytest.fixture
def measured(tmp_path):
    truth = np.array([0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 1, 1, 2, 3])
    probabilities = np.full((6, 4), 0.1)
    probabilities[np.arange(6), predicted] = 0.7
    return tmp_path, evaluation.evaluate(probabilities, truth, LABELS, tmp_path)


def test_every_image_counts_once(measured):
    folder, overall = measured
    assert overall["images"] == 6
    assert overall["accuracy"] == pytest.approx(4 / 6)
    assert overall["recall"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert overall["log_loss"] == pytest.approx(-(4 * np.log(0.7) + 2 * np.log(0.1)) / 6)
    assert json.loads((folder / "metrics.json").read_text()) == overall


def test_each_class_has_its_row_and_one_without_images_has_none(measured):
    header, *table = rows(measured[0] / "per_class.csv")
    assert header == ["label", "precision", "recall", "f1", "images"]
    assert [row[0] for row in table] == ["anise", "basil", "mint"]
    assert [float(value) for value in table[0][1:]] == pytest.approx([1, 2 / 3, 0.8, 3])


def test_the_confusion_matrix_has_the_truth_in_its_rows(measured):
    assert rows(measured[0] / "confusion_matrix.csv") == [
        ["true label", *LABELS],
        ["anise", "2", "1", "0", "0"],
        ["basil", "0", "1", "1", "0"],
        ["gone", "0", "0", "0", "0"],
        ["mint", "0", "0", "0", "1"],
    ]


def test_the_predictions_are_kept(measured):
    with np.load(measured[0] / "predictions.npz") as kept:
        assert kept["probabilities"].shape == (6, 4)
        assert kept["truth"].tolist() == [0, 0, 0, 1, 1, 3]
