import numpy as np
import pytest

from dgmd_pipeline.evaluation import charts
from dgmd_pipeline.evaluation.comparison import ClassComparison
from dgmd_pipeline.evaluation.metrics import CalibrationBin, ClassMetrics, ConfusedPair
from dgmd_pipeline.training.config import Epoch


def metrics_of(recalls, images=4):
    return [ClassMetrics(f"{number:04}", 0.5, recall, 0.5, images) for number, recall in enumerate(recalls)]


def pair(label, predicted, images=1):
    return ConfusedPair(label, predicted, images, 0.25)


def test_curves_stay_within_their_axes_and_start_and_end_at_the_first_and_last_epoch():
    loss, accuracy = charts.curves([Epoch(0, 0.5, 1.2, 0.4, 1.3, 0.01), Epoch(1, 0.7, 0.8, 0.6, 0.9, 0.005)])
    assert [curve.name for curve in loss.curves] == ["training", "validation"]
    for panel in (loss, accuracy):
        places = [[tick.at for tick in ticks] for ticks in (panel.x_ticks, panel.y_ticks)]
        for curve in panel.curves:
            xs, ys = zip(*curve.points, strict=True)
            assert list(xs) == [places[0][0], places[0][-1]]
            assert charts.TOP <= min(ys) < max(ys) <= charts.BOTTOM
    assert [tick.text for tick in loss.x_ticks] == ["1", "2"]
    assert loss.curves[0].points[0][1] < loss.curves[0].points[1][1]  # y grows downwards: a lower loss is further down
    assert accuracy.y_ticks[0].text.endswith(" %")


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_a_constant_curve_lies_inside_its_axes(value):
    panel = charts.panel("title", [1, 2, 3], {"line": [value] * 3}, "{:.3g}".format)
    assert all(charts.TOP <= y <= charts.BOTTOM for _, y in panel.curves[0].points)


def test_the_bars_of_the_reliability_diagram_have_the_height_of_the_accuracy():
    diagram = charts.reliability([CalibrationBin(0.4, 0.6, 3, 0.5, 0.0), CalibrationBin(0.8, 1, 6, 0.95, 1)])
    assert [row.top for row in diagram.bins] == [charts.BOTTOM, charts.TOP]
    assert [row.images_top for row in diagram.bins] == [35, 10]
    assert diagram.bins[1].left + diagram.bins[1].width == pytest.approx(charts.RIGHT - 1)


def test_a_matrix_of_few_labels_has_all_of_them():
    matrix = charts.matrix(metrics_of([0.75, 1.0]), [pair("0000", "unmeasured")])
    assert matrix.labels == ["0000", "0001", "unmeasured"]
    assert matrix.all_labels
    assert [[cell.images for cell in row] for row in matrix.rows] == [[3, 0, 1], [0, 4, 0], [0, 0, 0]]
    assert [cell.kind for cell in matrix.rows[0]] == ["right", "wrong", "wrong"]
    assert not any(cell.images for cell in matrix.others)


def test_a_matrix_of_many_labels_has_those_that_are_confused_most_and_counts_the_others():
    classes = metrics_of([0.5] * 1200, images=10)
    pairs = [pair("0700", "0701", 3), *(pair(f"{number:04}", f"{number + 1:04}") for number in range(20, 60, 2))]
    matrix = charts.matrix(classes, [*pairs, pair("0700", "0999", 2)])
    assert matrix.labels[:4] == ["0700", "0701", "0020", "0021"] and len(matrix.labels) == charts.MATRIX_LABELS
    assert [cell.images for cell in matrix.rows[0]] == [5, 3] + [0] * 8
    assert matrix.others[0].images == 2
    assert not matrix.all_labels


def test_without_confused_labels_there_is_no_matrix():
    assert charts.matrix(metrics_of([1.0]), []) is None


def test_changes_are_bars_from_the_middle_the_largest_loss_first():
    recalls = {"same": (0.5, 0.5), "gained": (0.75, 0.5), "lost": (0.0, 0.5), "less": (0.4, 0.5)}
    found = charts.changes(ClassComparison(label, 4, *pair, 0, 0) for label, pair in recalls.items())
    assert [(change.row.label, change.bar) for change in found] == [
        ("lost", charts.Bar(0, 50)), ("less", charts.Bar(40, 10)), ("gained", charts.Bar(50, 25)),
    ]  # fmt: skip
    assert charts.changes([]) == []


def test_of_many_labels_only_those_between_never_and_always_have_a_bar():
    recalls = charts.recalls(metrics_of([0.0] * 60 + [1.0] * 100 + list(np.linspace(0.1, 0.9, 40))))
    assert len(recalls.never) == 60 and recalls.always == 100
    assert [row.label for row in recalls.shown] == [f"{number:04}" for number in range(160, 180)]
    assert recalls.between == 20
    assert charts.recalls(metrics_of([1.0, 0.0])).shown == metrics_of([1.0, 0.0])[::-1]


def test_the_rows_of_the_table_know_their_place_in_each_order():
    classes = [ClassMetrics(*row) for row in (("b", 0, 0.5, 0, 9), ("a", 0, 1, 0, 3), ("c", 0, 0, 0, 5))]
    compared = [ClassComparison("b", 4, 0.5, 0.25, 1, 0), ClassComparison("c", 4, 0, 1, 0, 4)]
    rows = charts.label_rows(classes, compared)
    assert [row.label for row in rows] == ["c", "b", "a"]  # the lowest recall first
    assert [row.by_label for row in rows] == [2, 1, 0]
    assert [row.by_images for row in rows] == [1, 2, 0]
    assert [(row.change, row.by_change) for row in rows] == [(-1, 0), (0.25, 1), (None, 2)]
