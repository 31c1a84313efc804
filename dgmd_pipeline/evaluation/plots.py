"""Measurements -> pictures for people: PNG files on white.

All functions return the bytes of a PNG and take labels of any length and script. Colours are those of Okabe and Ito
("Color Universal Design", jfly.uni-koeln.de/color), which people with any kind of colour vision tell apart.
"""

import io
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import formatting
from dgmd_pipeline.evaluation.metrics import CalibrationBin, ConfusedPair, Misclassification, shares
from dgmd_pipeline.training.config import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160  # of the file; a page shows it at 96, so it stays sharp where it is enlarged
WIDTH = 9.5  # inches, 912 pixels of a page
COUNTED = 30  # classes: with more there is no room for numbers in a confusion matrix
NAMED = 120  # classes: with more there is no room for their labels
ROWS = 60  # bars in a picture
PAIRS = 20
THUMBNAILS = 24


class ClassCounts(NamedTuple):
    """How many images a label has."""

    label: str
    before: int  # usable ones that were found
    after: int  # those that balancing kept
    training: int
    validation: int


WHITE, TEXT, MUTED, LINE = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
PALE = "#cfd6dd"  # bars behind others
FIRST, SECOND = "#0072b2", "#d55e00"


def confusion(matrix: np.ndarray, labels: Sequence[str]) -> bytes:
    """Draw a confusion matrix (int [k, k], the true label in the row), coloured by share of the row."""
    classes = len(labels)
    share = shares(matrix)
    side = min(max(0.31 * classes, 3.5), 10.5) if classes <= NAMED else 9
    room = 0.075 * max(len(_shown(label, 26)) for label in labels) if classes <= NAMED else 0.5
    size = min(9.0, 55 * side / classes)

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        axes = figure.subplots()
        scale = LinearSegmentedColormap.from_list("share", [WHITE, FIRST])
        # Its square root: a few images in the wrong column are what one looks for.
        image = axes.imshow(share, cmap=scale, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        if classes <= COUNTED:
            for row, column in np.argwhere(matrix):
                strong = share[row, column] > 0.3
                axes.text(
                    column, row, f"{matrix[row, column]}", ha="center", va="center", fontsize=min(size, 7.5),
                    color=WHITE if strong else TEXT, in_layout=False,
                )  # fmt: skip
        if classes <= NAMED:
            names = [_shown(label, 26) for label in labels]
            axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
            axes.set_yticks(range(classes), names, fontsize=size)
        axes.tick_params(length=0, labelcolor=TEXT)
        axes.set(xlabel="predicted label", ylabel="true label", title="Which label is taken for which")
        bar = figure.colorbar(image, ax=axes, shrink=min(1, 3 / side), aspect=25, ticks=[0, 0.05, 0.2, 0.5, 1])
        bar.ax.set_yticklabels(["0 %", "5 %", "20 %", "50 %", "100 %"])
        bar.set_label("share of the true label's images")

    return _png(draw, side + room + 1.6, side + room + 1)


def reliability(bins: Sequence[CalibrationBin], error: float) -> bytes:
    """Draw how often the model is right against how sure it is; `error` is the expected calibration error."""

    def draw(figure: "Figure") -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        place = [(row.low + row.high) / 2 for row in bins]
        widths = [0.94 * (row.high - row.low) for row in bins]
        upper.bar(place, [row.accuracy for row in bins], widths, color=FIRST, label="what is right")
        upper.plot([0, 1], [0, 1], "--", color=MUTED, label="as right as it is sure")
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
        upper.set_title(f"Is it as right as it is sure? (expected calibration error {_percent(error, 1)})")
        _percents(upper.yaxis)
        upper.legend(loc="upper left")
        lower.bar(place, [row.images for row in bins], widths, color=PALE)
        lower.set(xlabel="confidence: the probability of the predicted label", ylabel="images")
        _percents(lower.xaxis)

    return _png(draw, 7, 5.4)


def learning(history: Sequence[Epoch]) -> bytes:
    """Draw loss and accuracy of each epoch, at least one."""
    epochs = [row.epoch + 1 for row in history]
    panels = [
        ("Loss (lower is better)", [row.loss for row in history], [row.val_loss for row in history]),
        ("Accuracy (higher is better)", [row.accuracy for row in history], [row.val_accuracy for row in history]),
    ]

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        for axes, (title, training, validation) in zip(figure.subplots(1, 2), panels, strict=True):
            axes.plot(epochs, training, "o--", color=FIRST, markersize=4, label="training")
            axes.plot(epochs, validation, "s-", color=SECOND, markersize=4, label="validation")
            axes.set(title=title, xlabel="epoch", xlim=(0.5, epochs[-1] + 0.5))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y")
            axes.legend(loc="best")
        _percents(axes.yaxis, places=None)

    return _png(draw, WIDTH, 3.7)


def class_counts(rows: Sequence[ClassCounts]) -> bytes:
    """Draw how many images each label has, the largest first: found, and kept for training and validation."""
    shown, left_out = _ends(sorted(rows, key=lambda row: -row.before))
    title = "Images of each label" + (f" ({left_out} of middling size left out)" if left_out else "")
    names = [row.label for row in shown]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        place = range(len(shown))
        training = [row.training for row in shown]
        axes.barh(place, [row.before for row in shown], 0.84, color=PALE, label="found, before balancing")
        axes.barh(place, training, 0.5, color=FIRST, label="training")
        axes.barh(place, [row.validation for row in shown], 0.5, left=training, color=SECOND, label="validation")
        texts = [f"{row.after:,}" if row.after == row.before else f"{row.after:,} of {row.before:,}" for row in shown]
        _rows(axes, names, [max(row.before, row.after) for row in shown], texts)
        axes.set(title=title, xlabel="images")
        figure.legend(loc="outside lower center", ncols=3)

    return _png(draw, WIDTH, 1.5 + 0.25 * len(shown))


def recall(rows: Sequence[tuple[str, int, float, float | None]]) -> bytes:
    """Draw the recall of each label, the lowest first; rows are (label, images, recall, production's or None)."""
    ordered = sorted(rows, key=lambda row: (row[2], row[0]))
    shown = ordered[:ROWS]
    title = "Of each label's images, how many are recognised (recall)"
    title += f": the lowest {ROWS} of {len(rows)}" if len(rows) > ROWS else ""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.barh(range(len(shown)), [row[2] for row in shown], 0.7, color=FIRST, label="this model")
        theirs = [(value, place) for place, (_, _, _, value) in enumerate(shown) if value is not None]
        if theirs:
            axes.plot(
                *zip(*theirs, strict=True), "D", color=SECOND, markeredgecolor=WHITE, markersize=7,
                linestyle="none", label="production", clip_on=False,
            )  # fmt: skip
            figure.legend(loc="outside lower center", ncols=2)
        texts = [f"{_percent(row[2])} of {row[1]:,}" for row in shown]
        _rows(
            axes, [row[0] for row in shown], [1] * len(shown), texts
        )  # not at the end, where production's mark may be
        axes.set_xlim(0, 1.2)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        _percents(axes.xaxis)
        axes.set_title(title)

    return _png(draw, WIDTH, 1.3 + 0.25 * len(shown))


def confused_pairs(pairs: Sequence[ConfusedPair]) -> bytes:
    """Draw the pairs of labels that are confused most (at least one), in the order given."""
    shown = pairs[:PAIRS]
    names = [f"{_shown(pair.label, 26)} \N{RIGHTWARDS ARROW} {_shown(pair.predicted, 26)}" for pair in shown]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.barh(range(len(shown)), [pair.images for pair in shown], 0.7, color=SECOND)
        texts = [f"{pair.images:,} ({_percent(pair.share)})" for pair in shown]
        _rows(axes, names, [pair.images for pair in shown], texts, 60)
        axes.set(title="Most confused: true \N{RIGHTWARDS ARROW} predicted label", xlabel="validation images")

    return _png(draw, WIDTH, 1.1 + 0.25 * len(shown))


def times(seconds: Sequence[tuple[str, float]]) -> bytes:
    """Draw how long each step took, in the order given (at least one)."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        values = [value for _, value in seconds]
        axes.barh(range(len(values)), values, 0.7, color=FIRST)
        _rows(axes, [name for name, _ in seconds], values, [formatting.format_seconds(value) for value in values])
        axes.set(title="Time of each step", xlabel="seconds")

    return _png(draw, WIDTH, 1.1 + 0.27 * len(seconds))


def contact_sheet(
    mistakes: Sequence[Misclassification],
    thumbnails: Mapping[int, np.ndarray],
    title: str = "Mistakes: true \N{RIGHTWARDS ARROW} predicted label and its probability",
) -> bytes:
    """Draw the pictures (uint8 [height, width, 3], by position) of the `worst` mistakes (at least one)."""
    shown = worst([row for row in mistakes if row.position in thumbnails])
    columns = min(4, len(shown)) or 1
    lines = -(-len(shown) // columns) or 1
    height = 2.5 * lines + 0.5

    def draw(figure: "Figure") -> None:
        figure.set_layout_engine(None)  # all places are the same and known
        figure.subplots_adjust(0.01, 0.3 / height, 0.99, 1 - 0.85 / height, 0.06, 0.3)
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, row in zip(grid, shown, strict=False):
            axes.imshow(thumbnails[row.position])
            answer = f"{_shown(row.predicted, 28)}, {_percent(row.probability)}"
            text = f"{_shown(row.label, 30)}\n\N{RIGHTWARDS ARROW} {answer}"
            axes.set_title(text, fontsize=8, color=TEXT)
            axes.text(
                0.5, -0.03, _shown(row.key, 38), fontsize=6.5, color=MUTED, ha="center", va="top",
                transform=axes.transAxes,
            )  # fmt: skip
        figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=11)

    return _png(draw, max(2.6 * columns, 5), height, photographs=True)


def worst(mistakes: Sequence[Misclassification]) -> list[Misclassification]:
    """Return the first of each kind in turns, each image once, up to THUMBNAILS."""
    kinds = [[row for row in mistakes if row.kind == kind] for kind in dict.fromkeys(row.kind for row in mistakes)]
    once: dict[int, Misclassification] = {}
    for rows in itertools.zip_longest(*kinds):
        for row in filter(None, rows):
            once.setdefault(row.position, row)
    return list(once.values())[:THUMBNAILS]


def printable(text: str) -> str:
    """Return `text` with a sign in the place of what has no glyph or moves others: controls, halves of surrogates."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _shown(text: str, length: int) -> str:
    text = printable(text)
    end = length // 3
    return text if len(text) <= length else f"{text[: length - end - 1]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def _percent(value: float, digits: int = 0) -> str:
    return f"{value:.{digits}%}".replace("%", " %")


def _percents(axis: Any, places: int | None = 0) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, places, " %"))


def _rows(axes: "Axes", names: Sequence[str], ends: Sequence[float], texts: Sequence[str], length: int = 36) -> None:
    """Name horizontal bars, the first at the top, and write something after the end of each."""
    axes.set_yticks(range(len(names)), [_shown(name, length) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * max(*ends, 1e-9))
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=8, in_layout=False)
    axes.grid(axis="x")


def _ends(rows: list[ClassCounts]) -> tuple[list[ClassCounts], int]:
    """Return the first and last rows, where there are more than fit, and how many are left out."""
    if len(rows) <= ROWS:
        return rows, 0
    return rows[: ROWS // 2] + rows[-ROWS // 2 :], len(rows) - ROWS


def _png(draw: Callable[["Figure"], None], width: float, height: float, photographs: bool = False) -> bytes:
    """Return a picture of `width` x `height` inches. Without pyplot: that one keeps figures and looks for a screen."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    style: dict[Any, Any] = {
        "text.parse_math": False,  # a label may hold dollar signs
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.titlesize": 11,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": WHITE,
        "savefig.facecolor": WHITE,
        "axes.facecolor": WHITE,
        "legend.facecolor": WHITE,
        "legend.edgecolor": LINE,
        "axes.edgecolor": LINE,
        "grid.color": LINE,
        "text.color": TEXT,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.color": MUTED,
        "ytick.labelcolor": TEXT,
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; report.html has the browser's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="constrained_layout not applied", category=UserWarning)
        figure = Figure((width, height), dpi=DPI, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    if photographs:
        return buffer.getvalue()
    small = io.BytesIO()  # a third of the bytes: report.html has every picture twice
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()
