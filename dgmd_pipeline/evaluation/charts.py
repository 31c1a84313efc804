"""The geometry of the charts in report.html. The templates draw them with the browser's fonts and colours.

Bars are HTML elements. Their lengths are in percent of the width that a chart has for bars. Curves are SVG elements.
Their lengths are in units of the SVG view box.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.evaluation.metrics import CalibrationBin, ClassMetrics, ConfusedPair
from dgmd_pipeline.training.config import Epoch

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.comparison import ClassComparison

ALL_BARS = 30  # labels in a chart; if there are more, the chart shows a selection
BARS = 10  # half the number of labels in a selection; most selections show this many labels from each end of the order
PAIRS = 15  # confused pairs
MATRIX_LABELS = 10  # labels of a confusion matrix; more do not fit on the screen of a phone
FEW_IMAGES = 10  # validation images; a label with fewer validation images has an uncertain recall
WIDTH, HEIGHT = 420, 230  # size of the view box of a chart with axes
LEFT, RIGHT, TOP, BOTTOM = 48, 412, 12, 200  # edges of the area between the axes, in the view box
COUNTS_BOTTOM = 60  # lower end of the bars of the numbers of images; these bars have a separate view box
MARKED = 30  # points; a curve with more points has no marks


class Tick(NamedTuple):
    """A tick of an axis."""

    at: float
    text: str


class Curve(NamedTuple):
    """A line through points."""

    name: str
    points: list[tuple[float, float]]  # x, y
    marked: bool  # whether each point has a mark


class Panel(NamedTuple):
    """Curves over the same axes."""

    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]


class Bar(NamedTuple):
    """The start and the length of a bar, in percent of the width for bars."""

    start: float
    length: float


class Bin(NamedTuple):
    """A bin of the reliability diagram: the bars of its accuracy and of its number of images, in view box units."""

    left: float
    width: float
    top: float  # upper end of the bar of the accuracy
    images_top: float  # upper end of the bar of the number of images
    text: str


class Reliability(NamedTuple):
    """A reliability diagram, and the numbers of images that are drawn below it."""

    bins: list[Bin]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Cell(NamedTuple):
    """A cell of the confusion matrix."""

    images: int
    shade: int  # strength of the cell's colour in percent
    kind: str  # "right" on the diagonal, "wrong" elsewhere


class Matrix(NamedTuple):
    """The confusion matrix of the labels that are confused most often."""

    labels: list[str]
    rows: list[list[Cell]]  # one row for each true label; a row has one cell for each predicted label
    others: list[Cell]  # one cell for each true label: its images whose predicted label is not shown
    all_labels: bool  # whether all measured labels are shown


class LabelRow(NamedTuple):
    """A row of the table of all labels, and its rank in each sort order."""

    label: str
    images: int
    recall: float
    precision: float
    f1: float
    change: float | None  # recall minus production's recall; None: not compared
    by_label: int  # rank in the order of the names, from 0
    by_images: int  # rank by the number of images, the fewest first
    by_change: int  # rank by the change, the largest loss first


class Change(NamedTuple):
    """A label whose recall differs from production's."""

    row: "ClassComparison"
    bar: Bar


class Recalls(NamedTuple):
    """The labels that the chart of the recall shows."""

    never: list[str]  # labels of which no image is recognised; empty if the chart shows all labels
    shown: list[ClassMetrics]  # lowest recall first
    always: int  # number of labels that are left out because all their images are recognised
    between: int  # number of left-out labels whose recall is between 0 and 1


def curves(history: Sequence[Epoch]) -> list[Panel]:
    """Return a panel of the loss and a panel of the accuracy. `history` has at least two epochs."""
    epochs = [row.epoch + 1 for row in history]
    losses = {"training": [row.loss for row in history], "validation": [row.val_loss for row in history]}
    shares = {"training": [row.accuracy for row in history], "validation": [row.val_accuracy for row in history]}
    return [
        panel("Loss: lower is better", epochs, losses, "{:.3g}".format),
        panel("Accuracy: higher is better", epochs, shares, percent),
    ]


def panel(
    title: str,
    x: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    write: Callable[[float], str],
    counts: bool = False,
) -> Panel:
    """Return the geometry of lines with the same integer x values. `write` formats a value of the y axis.

    With `counts`, the ticks of the y axis are whole numbers.
    """
    from matplotlib.ticker import MaxNLocator

    values = [value for line in lines.values() for value in line]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    y_values = [float(value) for value in MaxNLocator(nbins=4, integer=counts).tick_values(low, high)]
    x_values = [float(value) for value in MaxNLocator(nbins=6, integer=True).tick_values(x[0], x[-1])]
    low, high, reach = min(low, y_values[0]), max(high, y_values[-1]), max(x[-1] - x[0], 1)

    def across(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (0.02 + 0.96 * (value - x[0]) / reach), 1)

    def down(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    return Panel(
        title,
        [Tick(across(value), f"{value:.0f}") for value in x_values if x[0] <= value <= x[-1]],
        [Tick(down(value), write(value)) for value in y_values],
        [
            Curve(name, [(across(one), down(other)) for one, other in zip(x, line, strict=True)], len(x) <= MARKED)
            for name, line in lines.items()
        ],
    )


def percent(share: float) -> str:
    """Return a share as text, with a decimal only where it is needed."""
    return f"{round(100 * share, 1):g} %"


def reliability(bins: Sequence[CalibrationBin]) -> Reliability:
    """Return the bars of a reliability diagram. Accuracies and numbers of images have separate view boxes."""
    most = max(row.images for row in bins)

    def across(share: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * share, 1)

    def down(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    drawn = [
        Bin(
            left=across(row.low) + 1,
            width=round(across(row.high) - across(row.low) - 2, 1),
            top=down(row.accuracy),
            images_top=round(COUNTS_BOTTOM - 50 * row.images / most, 1),
            text=f"confidence {percent(row.low)} to {percent(row.high)}: {percent(row.accuracy)} of {row.images:,} "
            "images are correct",
        )
        for row in bins
    ]
    quarters = [0, 0.25, 0.5, 0.75, 1]
    return Reliability(
        drawn,
        [Tick(across(share), percent(share)) for share in quarters],
        [Tick(down(share), percent(share)) for share in quarters],
    )


def matrix(classes: Sequence[ClassMetrics], pairs: Sequence[ConfusedPair]) -> Matrix | None:
    """Return the confusion matrix; None if no labels are confused.

    The matrix has all labels if there are at most MATRIX_LABELS labels. Otherwise it has the labels that are confused
    most often. `pairs` has the pair with the most images first. The matrix is made from the pairs, because `metrics`
    computes a complete matrix only for at most `metrics.MAX_MATRIX` labels.
    """
    if not pairs:
        return None
    labels = list(dict.fromkeys(row.label for row in classes))
    involved = dict.fromkeys(label for pair in pairs for label in (pair.label, pair.predicted))
    complete = len(set(labels) | set(involved)) <= MATRIX_LABELS
    if complete:
        labels += [label for label in involved if label not in labels]
    else:
        labels = list(involved)[:MATRIX_LABELS]
    rows_of = {row.label: row for row in classes}
    wrong = {(pair.label, pair.predicted): pair.images for pair in pairs}
    rows, others = [], []
    for label in labels:
        row = rows_of.get(label)
        images, correct = (row.images, round(row.recall * row.images)) if row else (0, 0)
        counts = [correct if other == label else wrong.get((label, other), 0) for other in labels]
        rows.append([_cell(count, images, other == label) for count, other in zip(counts, labels, strict=True)])
        others.append(_cell(images - sum(counts), images, right=False))
    return Matrix(labels, rows, others, complete)


def _cell(images: int, total: int, right: bool) -> Cell:
    # The square root makes a few images in a wrong column visible. Above 45 %, text would have too little contrast.
    shade = round(45 * (images / max(total, 1)) ** 0.5)
    return Cell(images, shade, "right" if right else "wrong")


def changes(rows: Iterable["ClassComparison"]) -> list[Change]:
    """Return the labels whose recall differs from production's, the largest loss first.

    The bar of a loss goes from the middle to the left. The bar of a gain goes from the middle to the right.
    """
    changed = sorted((row for row in rows if row.change), key=lambda row: (row.change, -row.images, row.label))
    reach = max((abs(row.change) for row in changed), default=1)
    return [
        Change(row, Bar(round(50 + min(0, 50 * row.change / reach), 2), round(abs(50 * row.change / reach), 2)))
        for row in changed
    ]


def recalls(classes: Sequence[ClassMetrics]) -> Recalls:
    """Choose the labels that the chart of the recall shows.

    If there are more than ALL_BARS labels, the chart leaves out all labels with a recall of 0 or 1. Of the remaining
    labels, it shows the 2 * BARS labels with the lowest recall.
    """
    ordered = sorted(classes, key=lambda row: (row.recall, row.label))
    if len(ordered) <= ALL_BARS:
        return Recalls([], ordered, 0, 0)
    never = [row.label for row in ordered if row.recall == 0]
    between = [row for row in ordered if 0 < row.recall < 1]
    shown = between[: 2 * BARS]
    return Recalls(never, shown, len(ordered) - len(never) - len(between), len(between) - len(shown))


def label_rows(classes: Sequence[ClassMetrics], compared: Iterable["ClassComparison"]) -> list[LabelRow]:
    """Return the rows of the table of all labels, the lowest recall first."""
    change = {row.label: row.change for row in compared}
    names = [row.label for row in classes]
    by_label = _places(names)
    by_images = _places([(row.images, row.label) for row in classes])
    by_change = _places([(change.get(name, 9.0), name) for name in names])
    rows = [
        LabelRow(row.label, row.images, row.recall, row.precision, row.f1, change.get(row.label), *places)
        for row, *places in zip(classes, by_label, by_images, by_change, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.recall, row.label))


def _places(keys: Sequence[object]) -> list[int]:
    """Return the rank of each key."""
    order = sorted(range(len(keys)), key=lambda index: keys[index])  # type: ignore[arg-type, return-value]
    found = [0] * len(keys)
    for place, index in enumerate(order):
        found[index] = place
    return found
