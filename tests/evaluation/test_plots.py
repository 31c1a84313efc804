import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dgmd_pipeline import formatting
from dgmd_pipeline.evaluation import plots
from dgmd_pipeline.evaluation.metrics import CalibrationBin, ConfusedPair, Misclassification
from dgmd_pipeline.evaluation.plots import ClassCounts
from dgmd_pipeline.training.config import Epoch

ODD = [
    r"price: $\frac 5 & $6",
    "saffron \u756a\u7d05\u82b1 \U0001f33f",
    "half \udcff and \u202ereversed\n",
    "long " * 60,
]
HISTORY = [Epoch(0, 0.5, 1.2, 0.4, 1.3, 0.01), Epoch(1, 0.7, 0.8, 0.6, 0.9, 0.005)]
MISTAKES = [
    Misclassification("most wrong", f"{ODD[2]}/a.jpg", ODD[0], ODD[1], 0.9, 0.1, 3),
    Misclassification("most confident", f"{ODD[2]}/a.jpg", ODD[0], ODD[1], 0.9, 0.1, 3),
    Misclassification("most wrong", "lost.jpg", ODD[3], ODD[2], 0.8, 0.2, 9),
]
PICTURES = {3: np.full((12, 16, 3), 200, np.uint8)}
DRAWN = {
    "confusion": lambda: plots.confusion(np.diag([3, 0, 2, 1]) + np.eye(4, k=1, dtype=int), ODD),
    "reliability": lambda: plots.reliability(
        [CalibrationBin(0.4, 0.6, 3, 0.5, 0.4), CalibrationBin(0.9, 1, 9, 0.95, 1)], 0.07
    ),
    "learning": lambda: plots.learning(HISTORY),
    "learning for one epoch": lambda: plots.learning(HISTORY[:1]),
    "class counts": lambda: plots.class_counts([ClassCounts(label, 9, 6, 5, 1) for label in ODD]),
    "recall": lambda: plots.recall([(ODD[0], 3, 0.5, 0.7), (ODD[1], 4, 0.0, None), (ODD[3], 1, 1.0, 1.0)]),
    "confused pairs": lambda: plots.confused_pairs([ConfusedPair(ODD[3], ODD[1], 3, 0.5)]),
    "times": lambda: plots.times([("one", 0.0), ("two", 4000.0)]),
    "sheet": lambda: plots.contact_sheet(MISTAKES, PICTURES),
}


def opened(png):
    return Image.open(io.BytesIO(png)).convert("RGB")


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_takes_any_label_and_warns_of_nothing(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = opened(DRAWN[name]())
    assert picture.getpixel((0, 0)) == (0xFF, 0xFF, 0xFF)
    assert max(picture.size) < 2500
    assert len(picture.getcolors(2**24)) > 20  # there is something on it


@pytest.mark.parametrize("classes", [2, 100, 300])
def test_a_confusion_matrix_of_many_classes_keeps_its_size(classes):
    matrix = np.eye(classes, dtype=int)
    picture = opened(plots.confusion(matrix, [f"label number {index}" for index in range(classes)]))
    assert min(picture.size) > 400
    assert max(picture.size) < 2400


def test_bars_of_many_classes_are_the_ones_that_matter():
    rows = [ClassCounts(f"{index}", index + 1, index + 1, index, 1) for index in range(200)]
    assert opened(plots.class_counts(rows)).height < 2700
    assert opened(plots.recall([(f"{index}", 1, index / 200, None) for index in range(200)])).height < 2700


def test_settings_of_matplotlib_stay_as_they_were():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.times([("one", 1.0)])
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "under 0.1 s"), (0.05, "0.1 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
     (3599.7, "1 h 00 min"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_a_duration_is_written_for_people(seconds, text):
    assert formatting.format_seconds(seconds) == text


def test_what_cannot_be_printed_is_replaced():
    assert plots.printable("a\tb\u202ec\udcffd \u756a") == "a b\ufffdc\ufffdd \u756a"


def test_the_sheet_has_the_worst_of_both_kinds_in_turns_and_each_picture_once():
    wrong = [Misclassification("most wrong", "", "a", "b", 0.5, 0.1, position) for position in range(30)]
    confident = [
        Misclassification("most confident", "", "a", "b", 0.9, 0.1, position) for position in (0, *range(100, 129))
    ]
    found = [row.position for row in plots.worst(wrong + confident)]
    assert found[:7] == [0, 1, 100, 2, 101, 3, 102]
    assert len(found) == len(set(found)) == 24
