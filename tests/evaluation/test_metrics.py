import csv
import json

import numpy as np
import pytest

from dgmd_pipeline.evaluation import metrics, predictions
from dgmd_pipeline.evaluation.predictions import Predictions

LABELS = ["anise", "basil", "gone", "mint"]
TRUTH = np.array([0, 0, 0, 1, 1, 3])
PREDICTED = np.array([0, 0, 1, 1, 2, 3])
KEYS = ["anise/1.jpg", "anise/2.jpg", "anise/\u00e9 \udcff.jpg", "basil/1.jpg", "basil/2.jpg", "mint/1.jpg"]


def rows(path):
    return list(csv.reader(path.open(encoding="utf-8", errors="surrogateescape")))


def answers(predicted, truth=TRUTH, labels=LABELS, keys=None, high=0.7):
    """Predictions with the probability `high` for the predicted class; the others share the rest."""
    probabilities = np.full((len(predicted), len(labels)), (1 - high) / (len(labels) - 1))
    probabilities[np.arange(len(predicted)), predicted] = high
    return Predictions(probabilities, truth, labels, keys or ["k"] * len(truth))


def measure(probabilities, truth):
    """The measurements of images whose labels are named by their index."""
    probabilities = np.array(probabilities)
    labels = [str(index) for index in range(probabilities.shape[1])]
    return metrics.measure(
        Predictions(probabilities, np.array(truth), labels, [f"k{row}" for row in range(len(truth))])
    )


@pytest.fixture
def measured(tmp_path):
    return tmp_path, metrics.evaluate(answers(PREDICTED, keys=KEYS), tmp_path).overall


def test_every_image_counts_once(measured):
    folder, overall = measured
    assert overall["images"] == 6
    assert overall["accuracy"] == pytest.approx(4 / 6)
    assert overall["recall"] == overall["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert overall["log_loss"] == pytest.approx(-(4 * np.log(0.7) + 2 * np.log(0.1)) / 6)
    assert json.loads((folder / "metrics.json").read_text()) == overall


@pytest.mark.parametrize("leaked", [[], [0, 1], list(range(6))])
def test_the_accuracy_without_leaks_is_that_of_the_other_images(leaked, tmp_path):
    found = metrics.evaluate(answers(PREDICTED), tmp_path, leaked).overall
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert found["leaks"] == len(leaked)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found.get("accuracy_without_leaks") == {0: pytest.approx(4 / 6), 2: 0.5, 6: None}[len(leaked)]


def test_the_top_3_accuracy_counts_three_labels_or_all_of_fewer():
    def top_3(probabilities, truth):
        return measure(probabilities, truth).overall["top_3_accuracy"]

    row = [0.4, 0.3, 0.2, 0.1]
    assert top_3([row] * 4, [0, 1, 2, 3]) == 0.75
    assert top_3([[0.25] * 4] * 4, [0, 1, 2, 3]) == 0.75  # only three of four equals count
    assert top_3([[0.9, 0.1]] * 2, [0, 1]) == 1


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy_weighted_by_images():
    # 4 images at 0.9, of which 3 are right; 2 at 0.6, of which none is
    found = measure([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2, [0, 0, 0, 1, 0, 0])
    assert found.overall["expected_calibration_error"] == pytest.approx((4 * 0.15 + 2 * 0.6) / 6)
    assert [(row.images, row.accuracy) for row in found.calibration] == [(2, 0), (4, 0.75)]
    assert [row.confidence for row in found.calibration] == pytest.approx([0.6, 0.9])
    assert all(row.low < row.confidence <= row.high for row in found.calibration)


def test_certainty_and_even_odds_have_bins():
    low, high = measure([[1.0, 0.0], [0.5, 0.5]], [0, 0]).calibration
    assert (low.images, high.images, high.high) == (1, 1, 1)


def test_each_class_with_images_has_a_row(measured):
    header, *table = rows(measured[0] / "per_class.csv")
    assert header == ["label", "precision", "recall", "f1", "images"]
    assert [row[0] for row in table] == ["anise", "basil", "mint"]
    assert [float(value) for value in table[0][1:]] == pytest.approx([1, 2 / 3, 0.8, 3])


def test_the_rows_of_the_confusion_matrix_are_true_labels(measured):
    assert rows(measured[0] / "confusion_matrix.csv") == [
        ["true label", *LABELS],
        ["anise", "2", "1", "0", "0"],
        ["basil", "0", "1", "1", "0"],
        ["gone", "0", "0", "0", "0"],
        ["mint", "0", "0", "0", "1"],
    ]


def test_the_rows_of_the_normalised_confusion_matrix_sum_to_one(measured):
    _, *table = rows(measured[0] / "confusion_matrix_normalised.csv")
    assert [sum(map(float, row[1:])) for row in table] == pytest.approx([1, 1, 0, 1])
    assert float(table[0][1]) == pytest.approx(2 / 3)


def test_confused_pairs_are_the_cells_off_the_diagonal_most_images_first(tmp_path):
    truth, predicted = np.array([0, 0, 1, 1, 1, 1, 3]), np.array([0, 1, 0, 0, 1, 1, 3])
    metrics.evaluate(answers(predicted, truth), tmp_path)
    assert rows(tmp_path / "confused_pairs.csv") == [
        ["true label", "predicted label", "images", "share"],
        ["basil", "anise", "2", "0.5"],
        ["anise", "basil", "1", "0.5"],
    ]


def test_the_calibration_table_leaves_out_bins_without_images(measured):
    header, row = rows(measured[0] / "calibration.csv")
    assert header == ["low", "high", "images", "confidence", "accuracy"]
    assert [float(value) for value in row] == pytest.approx([10 / 15, 11 / 15, 6, 0.7, 4 / 6])


def test_misclassifications_are_the_most_wrong_and_the_most_confident():
    probabilities = [[0.2, 0.5, 0.3], [0.05, 0.5, 0.45], [0.4, 0.6, 0.0], [0.9, 0.05, 0.05]]
    found = measure(probabilities, [0] * 4).misclassifications
    assert [(row.kind, row.key) for row in found] == [
        ("most wrong", "k1"), ("most wrong", "k0"), ("most wrong", "k2"),
        ("most confident", "k2"), ("most confident", "k0"), ("most confident", "k1"),
    ]  # fmt: skip
    assert found[0] == ("most wrong", "k1", "0", "1", 0.5, 0.05, 1)


def test_the_table_has_at_most_24_misclassifications_of_each_kind_with_their_keys(tmp_path, measured):
    header, first, *_ = rows(measured[0] / "mistakes.csv")
    assert header == ["kind", "key", "true label", "predicted label", "probability", "probability of the true label",
                      "position"]  # fmt: skip
    assert first[:4] == ["most wrong", KEYS[2], "anise", "basil"]
    assert [float(value) for value in first[4:]] == pytest.approx([0.7, 0.1, 2])
    metrics.evaluate(answers(np.ones(60, int), np.zeros(60, int), ["a", "b"]), tmp_path)
    assert len(rows(tmp_path / "mistakes.csv")) == 1 + 2 * 24


def test_without_misclassifications_the_tables_have_only_a_header(tmp_path):
    assert metrics.evaluate(answers(TRUTH), tmp_path).overall["accuracy"] == 1
    assert [len(rows(tmp_path / name)) for name in ("mistakes.csv", "confused_pairs.csv")] == [1, 1]


def test_a_spreadsheet_sees_no_formula_in_a_label_or_a_key(tmp_path):
    labels = ["=1+1", "@basil", "plain"]
    keys = ["=1+1/a.jpg", "@basil/b.jpg", "plain/-c.jpg"]
    metrics.evaluate(answers(np.array([1, 2, 1]), np.array([0, 1, 2]), labels, keys), tmp_path)
    cells = [cell for path in tmp_path.glob("*.csv") for row in rows(path) for cell in row]
    assert {"'=1+1", "'@basil", "'=1+1/a.jpg", "plain/-c.jpg"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert np.load(tmp_path / predictions.PREDICTIONS)["keys"].tolist() == keys


def test_a_small_predictions_file_has_all_probabilities(measured):
    folder, overall = measured
    with np.load(folder / predictions.PREDICTIONS, allow_pickle=False) as file:
        found = dict(file)
    assert found["keys"].tolist() == KEYS and found["truth"].dtype == np.int64
    assert found["probabilities"].dtype == np.float32
    again = Predictions(found["probabilities"], found["truth"], LABELS, KEYS)
    assert metrics.measure(again).overall == pytest.approx(overall)
    assert (found["top_classes"] == np.argsort(-found["probabilities"], axis=1, kind="stable")).all()
    assert (found["top_probabilities"] == -np.sort(-found["probabilities"], axis=1)).all()


def test_a_large_predictions_file_has_the_most_probable_classes_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "BLOCK", 7)
    monkeypatch.setattr(predictions, "MAX_BYTES", 4 * 300 * 50 - 1)
    random = np.random.default_rng(0)
    # Rounded, so that there are equals; the first image has only equals, the second one zeros beside the last class.
    probabilities = random.dirichlet(np.full(50, 0.2), 300).round(2).astype(np.float32)
    probabilities[0], probabilities[1] = 0.02, np.eye(50, dtype=np.float32)[49]
    truth = random.integers(0, 50, 300)
    predictions.write(Predictions(probabilities, truth, [str(each) for each in range(50)], ["k"] * 300), tmp_path)
    with np.load(tmp_path / predictions.PREDICTIONS, allow_pickle=False) as file:
        found = dict(file)
    expected = np.argsort(-probabilities, axis=1, kind="stable")[:, : predictions.TOP]
    assert "probabilities" not in found
    assert (found["top_classes"] == expected).all()
    assert (found["top_probabilities"] == np.take_along_axis(probabilities, expected, axis=1)).all()
    assert (found["true_probabilities"] == probabilities[np.arange(300), truth]).all()


def test_metrics_are_those_of_scikit_learn(monkeypatch):
    from sklearn import metrics as reference

    monkeypatch.setattr(predictions, "BLOCK", 7)
    random = np.random.default_rng(1)
    probabilities = random.dirichlet(np.full(8, 0.2), 200).astype(np.float32)
    probabilities[3] = np.eye(8)[7]  # the probability of the true class is 0
    truth = np.concatenate([np.arange(8), random.integers(0, 8, 192)])
    measured = measure(probabilities, truth)
    found, labels, predicted = measured.overall, np.arange(8), probabilities.argmax(axis=1)
    by_class = reference.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    assert [tuple(row[1:]) for row in measured.classes] == list(zip(*by_class, strict=True))
    assert (measured.confusion_matrix == reference.confusion_matrix(truth, predicted, labels=labels)).all()
    assert found["log_loss"] == pytest.approx(reference.log_loss(truth, probabilities, labels=labels), rel=1e-5)
    assert found["top_3_accuracy"] == reference.top_k_accuracy_score(truth, probabilities, k=3, labels=labels)


def test_probabilities_that_are_no_numbers_are_a_bug():
    with pytest.raises(ValueError, match="contain NaN"):
        measure([[np.nan, np.nan]], [0])


def test_with_more_labels_than_a_matrix_may_have_only_the_pairs_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_MATRIX", 3)
    found = metrics.evaluate(answers(PREDICTED), tmp_path)
    assert found.confusion_matrix is None and not list(tmp_path.glob("confusion_matrix*"))
    assert [pair[:3] for pair in found.confused_pairs] == [("basil", "gone", 1), ("anise", "basil", 1)]


def test_blocks_are_gathered_in_order_and_counted():
    blocks = [np.full((2, 3), 1.0), np.full((1, 3), 2.0)]
    assert predictions.gather(blocks, 3, 3).tolist() == np.concatenate(blocks).tolist()
    with pytest.raises(ValueError, match="expected probabilities of 4 images, got 3"):
        predictions.gather(blocks, 4, 3)
