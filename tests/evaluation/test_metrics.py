import csv
import json

import numpy as np
import pytest

from dgmd_pipeline.evaluation import metrics, predictions

LABELS = ["anise", "basil", "gone", "mint"]
TRUTH = np.array([0, 0, 0, 1, 1, 3])
PREDICTED = np.array([0, 0, 1, 1, 2, 3])
KEYS = ["anise/1.jpg", "anise/2.jpg", "anise/\u00e9 \udcff.jpg", "basil/1.jpg", "basil/2.jpg", "mint/1.jpg"]


def rows(path):
    return list(csv.reader(path.open(encoding="utf-8", errors="surrogateescape")))


def answers(predicted, classes, high=0.7):
    """Probabilities with `high` for the predicted class and the rest shared by the others."""
    probabilities = np.full((len(predicted), classes), (1 - high) / (classes - 1))
    probabilities[np.arange(len(predicted)), predicted] = high
    return probabilities


@pytest.fixture
def measured(tmp_path):
    return tmp_path, metrics.evaluate(answers(PREDICTED, 4), TRUTH, LABELS, KEYS, tmp_path).overall


def test_every_image_counts_once(measured):
    folder, overall = measured
    assert overall["images"] == 6
    assert overall["accuracy"] == pytest.approx(4 / 6)
    assert overall["recall"] == overall["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert overall["log_loss"] == pytest.approx(-(4 * np.log(0.7) + 2 * np.log(0.1)) / 6)
    assert json.loads((folder / "metrics.json").read_text()) == overall


@pytest.mark.parametrize("leaked", [[], [0, 1], list(range(6))])
def test_the_accuracy_without_leaks_is_that_of_the_other_images(leaked, tmp_path):
    found = metrics.evaluate(answers(PREDICTED, 4), TRUTH, LABELS, KEYS, tmp_path, leaked).overall
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert found["leaks"] == len(leaked)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found.get("accuracy_without_leaks") == {0: pytest.approx(4 / 6), 2: 0.5, 6: None}[len(leaked)]


def test_the_three_most_probable_labels_count_and_of_fewer_all():
    def top_3(probabilities, truth, classes):
        labels, keys = [str(index) for index in range(classes)], ["k"] * len(truth)
        return metrics.measure(np.array(probabilities), np.array(truth), labels, keys).overall["top_3_accuracy"]

    row = [0.4, 0.3, 0.2, 0.1]
    assert top_3([row] * 4, [0, 1, 2, 3], 4) == 0.75
    assert top_3([[0.25] * 4] * 4, [0, 1, 2, 3], 4) == 0.75  # equal ones do not all count
    assert top_3([[0.9, 0.1]] * 2, [0, 1], 2) == 1


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy_weighted_by_images():
    # 4 images at 0.9 of which 3 are right, 2 at 0.6 of which none is
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    found = metrics.measure(probabilities, np.array([0, 0, 0, 1, 0, 0]), ["a", "b"], ["k"] * 6)
    assert found.overall["expected_calibration_error"] == pytest.approx((4 * 0.15 + 2 * 0.6) / 6)
    assert [(row.images, row.accuracy) for row in found.bins] == [(2, 0), (4, 0.75)]
    assert [row.confidence for row in found.bins] == pytest.approx([0.6, 0.9])
    assert all(row.low < row.confidence <= row.high for row in found.bins)


def test_certainty_and_even_odds_have_bins():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5]])
    low, high = metrics.measure(probabilities, np.array([0, 0]), ["a", "b"], ["k"] * 2).bins
    assert (low.images, high.images, high.high) == (1, 1, 1)


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


def test_the_normalised_confusion_matrix_has_rows_that_sum_to_one(measured):
    _, *table = rows(measured[0] / "confusion_matrix_normalised.csv")
    assert [sum(map(float, row[1:])) for row in table] == pytest.approx([1, 1, 0, 1])
    assert float(table[0][1]) == pytest.approx(2 / 3)


def test_confused_pairs_are_those_off_the_diagonal_most_images_first(tmp_path):
    truth, predicted = np.array([0, 0, 1, 1, 1, 1, 3]), np.array([0, 1, 0, 0, 1, 1, 3])
    metrics.evaluate(answers(predicted, 4), truth, LABELS, ["k"] * 7, tmp_path)
    assert rows(tmp_path / "confused_pairs.csv") == [
        ["true label", "predicted label", "images", "share"],
        ["basil", "anise", "2", "0.5"],
        ["anise", "basil", "1", "0.5"],
    ]


def test_the_calibration_table_leaves_out_bins_without_images(measured):
    header, row = rows(measured[0] / "calibration.csv")
    assert header == ["low", "high", "images", "confidence", "accuracy"]
    assert [float(value) for value in row] == pytest.approx([10 / 15, 11 / 15, 6, 0.7, 4 / 6])


def test_mistakes_are_the_most_wrong_and_the_most_confident():
    probabilities = np.array([[0.2, 0.5, 0.3], [0.05, 0.5, 0.45], [0.4, 0.6, 0.0], [0.9, 0.05, 0.05]])
    found = metrics.measure(probabilities, np.zeros(4, np.int64), ["a", "b", "c"], ["k0", "k1", "k2", "k3"]).mistakes
    assert [(row.kind, row.key) for row in found] == [
        ("most wrong", "k1"), ("most wrong", "k0"), ("most wrong", "k2"),
        ("most confident", "k2"), ("most confident", "k0"), ("most confident", "k1"),
    ]  # fmt: skip
    assert found[0] == ("most wrong", "k1", "a", "b", 0.5, 0.05, 1)


def test_there_are_at_most_24_mistakes_of_each_kind_and_their_table_has_the_keys(tmp_path, measured):
    header, first, *_ = rows(measured[0] / "mistakes.csv")
    assert header == ["kind", "key", "true label", "predicted label", "probability", "probability of the true label",
                      "position"]  # fmt: skip
    assert first[:4] == ["most wrong", KEYS[2], "anise", "basil"]
    assert [float(value) for value in first[4:]] == pytest.approx([0.7, 0.1, 2])
    metrics.evaluate(answers(np.ones(60, int), 2), np.zeros(60, int), ["a", "b"], ["k"] * 60, tmp_path)
    assert len(rows(tmp_path / "mistakes.csv")) == 1 + 2 * 24


def test_without_mistakes_the_tables_have_a_header_only(tmp_path):
    assert metrics.evaluate(answers(TRUTH, 4), TRUTH, LABELS, KEYS, tmp_path).overall["accuracy"] == 1
    assert [len(rows(tmp_path / name)) for name in ("mistakes.csv", "confused_pairs.csv")] == [1, 1]


def test_a_spreadsheet_sees_no_formula_in_a_label_or_a_key(tmp_path):
    labels = ["=1+1", "@basil", "plain"]
    keys = ["=1+1/a.jpg", "@basil/b.jpg", "plain/-c.jpg"]
    metrics.evaluate(answers(np.array([1, 2, 1]), 3), np.array([0, 1, 2]), labels, keys, tmp_path)
    cells = [cell for path in tmp_path.glob("*.csv") for row in rows(path) for cell in row]
    assert {"'=1+1", "'@basil", "'=1+1/a.jpg", "plain/-c.jpg"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert predictions.load(tmp_path)[2] == keys


def test_the_predictions_are_kept_and_say_the_same_again(measured):
    folder, overall = measured
    probabilities, truth, keys = predictions.load(folder)
    assert (probabilities.dtype, truth.dtype, keys) == (np.float32, np.int64, KEYS)
    assert metrics.measure(probabilities, truth, LABELS, keys).overall == pytest.approx(overall)
