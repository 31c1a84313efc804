import io
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from dgmd_pipeline import formatting
from dgmd_pipeline.evaluation import plots
from dgmd_pipeline.evaluation.metrics import CalibrationBin, ConfusedPair, Misclassification
from dgmd_pipeline.evaluation.plots import ClassCounts, LabelRecall
from dgmd_pipeline.training.config import Epoch

ODD = [
    r"price: $\frac 5 & $6",
    "saffron \u756a\u7d05\u82b1 \U0001f33f",
    "half \udcff and \u202ereversed\n",
    "long " * 60,
]
SHOWN = [ODD[0], ODD[1], "half \ufffd and \ufffdreversed "]  # of the first three labels
HISTORY = [Epoch(0, 0.5, 1.2, 0.4, 1.3, 0.01), Epoch(1, 0.7, 0.8, 0.6, 0.9, 0.005)]
WRONG = [
    Misclassification("most wrong", f"{ODD[2]}/a.jpg", ODD[0], ODD[1], 0.9, 0.1, 3),
    Misclassification("most confident", f"{ODD[2]}/a.jpg", ODD[0], ODD[1], 0.9, 0.1, 3),
    Misclassification("most wrong", "lost.jpg", ODD[3], ODD[2], 0.8, 0.2, 9),
]
IMAGES = {3: np.full((12, 16, 3), 200, np.uint8)}
BINS = [CalibrationBin(0.4, 0.6, 3, 0.5, 0.4), CalibrationBin(0.9, 1, 9, 0.95, 1)]
PLOTS = {
    "confusion matrix": lambda: plots.confusion_matrix(np.diag([3, 0, 2, 1]) + np.eye(4, k=1, dtype=int), ODD),
    "reliability": lambda: plots.reliability(BINS, 0.07),
    "learning curves": lambda: plots.learning_curves(HISTORY),
    "learning curves of one epoch": lambda: plots.learning_curves(HISTORY[:1]),
    "class counts": lambda: plots.class_counts([ClassCounts(label, 9, 6, 5, 1) for label in ODD]),
    "recall": lambda: plots.recall(
        [LabelRecall(ODD[0], 3, 0.5, 0.7), LabelRecall(ODD[1], 4, 0.0, None), LabelRecall(ODD[3], 1, 1.0, 1.0)]
    ),
    "confused pairs": lambda: plots.confused_pairs([ConfusedPair(ODD[3], ODD[1], 3, 0.5)]),
    "step seconds": lambda: plots.step_seconds([("one", 0.0), ("two", 4000.0)]),
    "contact sheet": lambda: plots.contact_sheet(WRONG, IMAGES),
}


def pixels(plot):
    """Width and height of a plot's file."""
    return [round(inches * plot.dpi) for inches in (plot.width, plot.height)]


def bars(container, attribute="get_height"):
    return [getattr(bar, attribute)() for bar in container]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(artist):
    return [text.get_text() for text in artist.legends[0].get_texts()]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_accepts_any_label_and_causes_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = PLOTS[name]().png()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert list(image.size) == pytest.approx(pixels(PLOTS[name]()), abs=1)
    assert max(image.size) < 2500
    assert image.getpixel((0, 0)) == (0xFF, 0xFF, 0xFF)


def test_the_confusion_matrix_shows_shares_as_colours_and_counts_as_numbers():
    matrix = np.array([[9, 1, 0], [0, 2, 0], [0, 0, 0]])
    axes, scale = plots.confusion_matrix(matrix, ODD[:3]).figure().axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.9, 0.1, 0], [0, 1, 0], [0, 0, 0]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "9", (1, 0): "1", (1, 1): "2"}
    assert [to_hex(text.get_color()) for text in axes.texts] == [plots.WHITE, plots.TEXT, plots.WHITE]
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == SHOWN
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted label", "true label")
    assert ticks(scale.yaxis) == ["0 %", "5 %", "20 %", "50 %", "100 %"]


@pytest.mark.parametrize(("classes", "numbered", "named"), [(2, True, True), (100, False, True), (300, False, False)])
def test_a_confusion_matrix_of_many_classes_keeps_its_size(classes, numbered, named):
    labels = [f"label number {index}" for index in range(classes)]
    plot = plots.confusion_matrix(np.eye(classes, dtype=int), labels)
    axes = plot.figure().axes[0]
    assert min(pixels(plot)) > 400
    assert max(pixels(plot)) < 2400
    assert bool(axes.texts) is numbered
    assert (ticks(axes.yaxis) == labels) is named


def test_the_reliability_diagram_has_a_bar_for_each_bin():
    upper, lower = plots.reliability(BINS, 0.071).figure().axes
    assert bars(upper.containers[0]) == [0.4, 1]
    assert [bar.get_x() + bar.get_width() / 2 for bar in upper.containers[0]] == pytest.approx([0.5, 0.95])
    assert upper.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert "expected calibration error 7.1 %" in upper.get_title()
    assert bars(lower.containers[0]) == [3, 9]


def test_the_learning_curves_are_those_of_both_splits():
    loss, accuracy = plots.learning_curves(HISTORY).figure().axes
    assert [line.get_label() for line in loss.lines] == ["training", "validation"]
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 1.2], [2, 0.8]], [[1, 1.3], [2, 0.9]]]
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[0.5, 0.7], [0.4, 0.6]]


def test_class_counts_show_what_balancing_kept_and_both_splits_the_largest_label_first():
    rows = [ClassCounts("few", 6, 6, 5, 1), ClassCounts("many", 9, 6, 4, 2)]
    figure = plots.class_counts(rows).figure()
    (axes,) = figure.axes
    before, training, validation = axes.containers
    assert ticks(axes.yaxis) == ["many", "few"]
    assert [bars(each, "get_width") for each in (before, training, validation)] == [[9, 6], [4, 5], [2, 1]]
    assert bars(validation, "get_x") == [4, 5]
    assert texts(axes) == ["6 of 9", "6"]
    assert legend(figure) == ["before balancing", "training", "validation"]


def test_recall_shows_the_lowest_first_with_production_where_it_was_compared():
    rows = [LabelRecall("good", 1200, 1.0, 0.9), LabelRecall("new", 4, 0.5, None), LabelRecall("bad", 3, 0.0, 0.7)]
    figure = plots.recall(rows).figure()
    (axes,) = figure.axes
    assert ticks(axes.yaxis) == ["bad", "new", "good"]
    assert bars(axes.containers[0], "get_width") == [0, 0.5, 1]
    assert texts(axes) == ["0 % of 3 (production 70 %)", "50 % of 4", "100 % of 1,200 (production 90 %)"]
    assert bars(axes.containers[1], "get_width") == [0.7, 0.9]
    assert [round(bar.get_y()) for bar in axes.containers[1]] == [0, 2]
    assert legend(figure) == ["this model", "production, on the images that both predicted"]
    assert len(plots.recall(rows[1:2]).figure().axes[0].containers) == 1


def test_confused_pairs_name_both_labels_and_count_images():
    pairs = [ConfusedPair("a", "b", 3, 0.5), ConfusedPair("b", "a", 1, 0.25)] + [ConfusedPair("c", "d", 1, 0.1)] * 30
    (axes,) = plots.confused_pairs(pairs).figure().axes
    assert ticks(axes.yaxis)[:2] == ["a \N{RIGHTWARDS ARROW} b", "b \N{RIGHTWARDS ARROW} a"]
    assert bars(axes.containers[0], "get_width") == [3] + [1] * 19
    assert texts(axes)[:2] == ["3 (50 %)", "1 (25 %)"]


def test_the_time_of_each_step_is_written_beside_its_bar():
    (axes,) = PLOTS["step seconds"]().figure().axes
    assert ticks(axes.yaxis) == ["one", "two"]
    assert bars(axes.containers[0], "get_width") == [0, 4000]
    assert texts(axes) == ["under 0.1 s", "1 h 06 min"]


def test_of_many_classes_the_plots_show_those_that_matter():
    counts = plots.class_counts([ClassCounts(f"{index}", index + 1, index + 1, index, 1) for index in range(200)])
    assert pixels(counts)[1] < 2700
    axes = counts.figure().axes[0]
    assert ticks(axes.yaxis) == [str(index) for index in (*range(199, 169, -1), *range(29, -1, -1))]
    assert "of 200" in axes.get_title()
    recall = plots.recall([LabelRecall(f"{index}", 1, index / 200, None) for index in range(200)])
    assert pixels(recall)[1] < 2700
    assert ticks(recall.figure().axes[0].yaxis) == [str(index) for index in range(60)]


def test_settings_of_matplotlib_stay_unchanged():
    import matplotlib

    before = dict(matplotlib.rcParams)
    PLOTS["step seconds"]().png()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "under 0.1 s"), (0.05, "0.1 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
     (3599.7, "1 h 00 min"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_a_duration_is_written_for_people(seconds, text):
    assert formatting.format_seconds(seconds) == text


def test_unprintable_characters_are_replaced():
    assert plots.printable("a\tb\u202ec\udcffd \u756a") == "a b\ufffdc\ufffdd \u756a"


def test_the_contact_sheet_shows_each_image_once_with_both_labels_and_its_key():
    figure = plots.contact_sheet(WRONG, IMAGES, "Title").figure()
    (axes,), height, width = figure.axes, *IMAGES[3].shape[:2]
    assert (axes.images[0].get_array() == IMAGES[3]).all()
    left, right, bottom, top = axes.images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(width / height)
    assert texts(axes) == [f"{SHOWN[0]}\n\N{RIGHTWARDS ARROW} {SHOWN[1]}, 90 %", f"{SHOWN[2]}/a.jpg"]
    assert figure.get_suptitle() == "Title"


def test_the_contact_sheet_alternates_between_the_kinds():
    wrong = [Misclassification("most wrong", "", "a", "b", 0.5, 0.1, position) for position in range(30)]
    confident = [
        Misclassification("most confident", "", "a", "b", 0.9, 0.1, position) for position in (0, *range(100, 129))
    ]
    found = [row.position for row in plots.worst(wrong + confident)]
    assert found[:7] == [0, 1, 100, 2, 101, 3, 102]
    assert len(found) == len(set(found)) == 24
