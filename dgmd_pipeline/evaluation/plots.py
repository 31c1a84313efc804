"""Plots of measurements: PNG files with a white background.

Labels may be of any length and in any script. The colours are from Okabe and Ito ("Color Universal Design",
jfly.uni-koeln.de/color). People with any kind of colour vision can tell these colours apart.
"""

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline import formatting
from dgmd_pipeline.evaluation.metrics import CalibrationBin, ConfusedPair, Misclassification, shares
from dgmd_pipeline.training.config import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 160  # pixels per inch of a file; enough for screens with small pixels, and for enlarging
SHEET_DPI = 120  # pixels per inch of a contact sheet; a larger value would only enlarge the thumbnails
WIDTH = 9.5  # inches
MAX_NUMBERED = 30  # classes; more leave no room for numbers in a confusion matrix
MAX_NAMED = 120  # classes; more leave no room for their labels
MAX_BARS = 60
MAX_PAIRS = 20
MAX_THUMBNAILS = 24
CELL, THUMBNAIL = 2.5, 1.9  # height of a line of a contact sheet, and maximum height of its images, in inches
WHITE, TEXT, MUTED, LINE = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
PALE = "#cfd6dd"  # bars behind others
FIRST, SECOND = "#0072b2", "#d55e00"
ARROW = "\N{RIGHTWARDS ARROW}"


class ClassCounts(NamedTuple):
    """How many images a label has."""

    label: str
    before: int  # usable images, before balancing
    after: int  # images that balancing kept
    training: int
    validation: int


class LabelRecall(NamedTuple):
    """The recall of a label, 0 to 1."""

    label: str
    images: int
    recall: float
    production_recall: float | None  # None: not compared


class Plot(NamedTuple):
    """A plot that is drawn when it is needed."""

    draw: Callable[["Figure"], None]
    width: float  # inches
    height: float
    photographs: bool = False  # it contains photographs, which need more than 256 colours

    @property
    def dpi(self) -> int:
        """The resolution of the file in pixels per inch."""
        return SHEET_DPI if self.photographs else DPI

    def figure(self) -> "Figure":
        """Return the plot as a figure. Pyplot is not used: it would keep the figure in memory and look for a screen."""
        from matplotlib.figure import Figure

        with _style():
            figure = Figure((self.width, self.height), dpi=self.dpi, layout="constrained")
            self.draw(figure)
        return figure

    def png(self) -> bytes:
        """Return the plot as the bytes of a PNG file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        with _style():
            canvas = FigureCanvasAgg(self.figure())
            canvas.draw()  # `savefig` draws a figure with this layout twice
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        if self.photographs:
            image.save(buffer, "PNG", compress_level=1)  # level 6 takes 4 times as long and saves a tenth of the bytes
        else:  # a palette saves two thirds of the bytes, and files are stored twice: here and in MLflow
            fast = Image.Quantize.MAXCOVERAGE  # half the time of the default
            image.quantize(256, fast, dither=Image.Dither.NONE).save(buffer, "PNG")
        return buffer.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    style = matplotlib.rc_context(
        {
            "text.parse_math": False,  # a label may contain dollar signs
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
    )
    with style, warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes. They are readable in report.html, which uses the browser's
        # fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="constrained_layout not applied", category=UserWarning)
        yield


def confusion_matrix(matrix: np.ndarray, labels: Sequence[str]) -> Plot:
    """Plot a confusion matrix (int [k, k], row: true label). The colour of a cell shows its share of the row."""
    classes = len(labels)
    side = min(max(0.31 * classes, 3.5), 10.5) if classes <= MAX_NAMED else 9
    room = 0.075 * max(len(_shorten(label, 26)) for label in labels) if classes <= MAX_NAMED else 0.5
    size = min(9.0, 55 * side / classes)

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        axes = figure.subplots()
        scale = LinearSegmentedColormap.from_list("share", [WHITE, FIRST])
        # The square root makes a few images in a wrong column visible.
        image = axes.imshow(shares(matrix), cmap=scale, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        if classes <= MAX_NUMBERED:
            _number_cells(axes, matrix, min(size, 7.5))
        if classes <= MAX_NAMED:
            names = [_shorten(label, 26) for label in labels]
            axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
            axes.set_yticks(range(classes), names, fontsize=size)
        axes.tick_params(length=0, labelcolor=TEXT)
        axes.set(xlabel="predicted label", ylabel="true label", title="Confusion matrix")
        bar = figure.colorbar(image, ax=axes, shrink=min(1, 3 / side), aspect=25, ticks=[0, 0.05, 0.2, 0.5, 1])
        bar.ax.set_yticklabels(["0 %", "5 %", "20 %", "50 %", "100 %"])
        bar.set_label("share of the true label's images")

    return Plot(draw, side + room + 1.6, side + room + 1)


def _number_cells(axes: "Axes", matrix: np.ndarray, fontsize: float) -> None:
    share = shares(matrix)
    for row, column in np.argwhere(matrix):
        axes.text(
            column, row, f"{matrix[row, column]}", ha="center", va="center", fontsize=fontsize,
            color=WHITE if share[row, column] > 0.3 else TEXT, in_layout=False,
        )  # fmt: skip


def reliability(bins: Sequence[CalibrationBin], error: float) -> Plot:
    """Plot accuracy against confidence; `error` is the expected calibration error, 0 to 1."""

    def draw(figure: "Figure") -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        centres = [(row.low + row.high) / 2 for row in bins]
        widths = [0.94 * (row.high - row.low) for row in bins]
        upper.bar(centres, [row.accuracy for row in bins], widths, color=FIRST, label="this model")
        upper.plot([0, 1], [0, 1], "--", color=MUTED, label="perfect calibration")
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is correct")
        upper.set_title(f"Confidence and accuracy (expected calibration error {_percent(error, 1)})")
        _format_percent(upper.yaxis)
        upper.legend(loc="upper left")
        lower.bar(centres, [row.images for row in bins], widths, color=PALE)
        lower.set(xlabel="confidence: the probability of the predicted label", ylabel="images")
        _format_percent(lower.xaxis)

    return Plot(draw, 7, 5.4)


def learning_curves(history: Sequence[Epoch]) -> Plot:
    """Plot the loss and the accuracy of each epoch. `history` has at least one epoch."""
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
        _format_percent(axes.yaxis, decimals=None)

    return Plot(draw, WIDTH, 3.7)


def class_counts(rows: Sequence[ClassCounts]) -> Plot:
    """Plot how many images each label has before balancing and in each split, the largest label first."""
    ordered = sorted(rows, key=lambda row: -row.before)
    shown, title = ordered, "Images of each label"
    if len(ordered) > MAX_BARS:
        shown = ordered[: MAX_BARS // 2] + ordered[-MAX_BARS // 2 :]
        title += f" (the {MAX_BARS // 2} largest and the {MAX_BARS // 2} smallest of {len(ordered)})"

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        positions = range(len(shown))
        training = [row.training for row in shown]
        validation = [row.validation for row in shown]
        axes.barh(positions, [row.before for row in shown], 0.84, color=PALE, label="before balancing")
        axes.barh(positions, training, 0.5, color=FIRST, label="training")
        axes.barh(positions, validation, 0.5, left=training, color=SECOND, label="validation")
        texts = [f"{row.after:,}" if row.after == row.before else f"{row.after:,} of {row.before:,}" for row in shown]
        _label_bars(axes, [row.label for row in shown], [max(row.before, row.after) for row in shown], texts)
        axes.set(title=title, xlabel="images")
        figure.legend(loc="outside lower center", ncols=3)

    return Plot(draw, WIDTH, 1.5 + 0.25 * len(shown))


def recall(rows: Sequence[LabelRecall]) -> Plot:
    """Plot the recall of each label, the lowest first. A second bar and a second number are production's recall."""
    shown = sorted(rows, key=lambda row: (row.recall, row.label))[:MAX_BARS]
    title = "Share of each label's images that is recognised (recall)"
    title += f": the lowest {MAX_BARS} of {len(rows)}" if len(rows) > MAX_BARS else ""
    compared = [(row.production_recall, position) for position, row in enumerate(shown)]
    others = [(value, position + 0.3) for value, position in compared if value is not None]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.barh(range(len(shown)), [row.recall for row in shown], 0.38, color=FIRST, label="this model")
        if others:
            values, places = zip(*others, strict=True)
            axes.barh(places, values, 0.2, color=SECOND, label="production, on the images that both predicted")
            figure.legend(loc="outside lower center", ncols=2)
        texts = [
            f"{_percent(row.recall)} of {row.images:,}"
            + ("" if row.production_recall is None else f" (production {_percent(row.production_recall)})")
            for row in shown
        ]
        _label_bars(axes, [row.label for row in shown], [1] * len(shown), texts)
        axes.set_xlim(0, 1.5 if others else 1.2)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        _format_percent(axes.xaxis)
        axes.set_title(title)

    return Plot(draw, WIDTH, 1.3 + 0.25 * len(shown))


def confused_pairs(pairs: Sequence[ConfusedPair]) -> Plot:
    """Plot the first MAX_PAIRS pairs of confused labels. There is at least one pair."""
    shown = pairs[:MAX_PAIRS]
    names = [f"{_shorten(pair.label, 26)} {ARROW} {_shorten(pair.predicted, 26)}" for pair in shown]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        images = [pair.images for pair in shown]
        axes.barh(range(len(shown)), images, 0.7, color=SECOND)
        _label_bars(axes, names, images, [f"{pair.images:,} ({_percent(pair.share)})" for pair in shown], 60)
        axes.set(title=f"Most confused: true {ARROW} predicted label", xlabel="validation images")

    return Plot(draw, WIDTH, 1.1 + 0.25 * len(shown))


def step_seconds(seconds: Sequence[tuple[str, float]]) -> Plot:
    """Plot how long each step took, in the given order. There is at least one step."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        values = [value for _, value in seconds]
        axes.barh(range(len(values)), values, 0.7, color=FIRST)
        _label_bars(axes, [name for name, _ in seconds], values, [formatting.format_seconds(value) for value in values])
        axes.set(title="Time of each step", xlabel="seconds")

    return Plot(draw, WIDTH, 1.1 + 0.27 * len(seconds))


def contact_sheet(
    rows: Sequence[Misclassification],
    thumbnails: Mapping[int, np.ndarray],
    title: str = f"Misclassified images: true {ARROW} predicted label and its probability",
) -> Plot:
    """Plot the thumbnails of the rows that `worst` selects. At least one row has a thumbnail.

    `thumbnails` maps the position of a row to its thumbnail, uint8 [height, width, 3].
    """
    shown = worst([row for row in rows if row.position in thumbnails])
    columns = min(4, len(shown)) or 1
    lines = -(-len(shown) // columns) or 1
    width, height = max(2.6 * columns, 5), CELL * lines + 0.5

    def draw(figure: "Figure") -> None:
        figure.set_layout_engine(None)
        axes = figure.add_axes((0, 0, 1, 1))  # one for all images: creating one for each image would take 15 ms each
        axes.set_axis_off()
        for place, row in enumerate(shown):
            line, column = divmod(place, columns)
            # In inches from the upper left corner of the sheet:
            x, y = (column + 0.5) * width / columns, 0.8 + CELL * line + THUMBNAIL / 2
            right, bottom = _fit(thumbnails[row.position], 0.94 * width / columns, THUMBNAIL)
            axes.imshow(thumbnails[row.position], extent=(x - right, x + right, y + bottom, y - bottom))
            above = f"{_shorten(row.label, 30)}\n{ARROW} {_shorten(row.predicted, 28)}, {_percent(row.probability)}"
            axes.text(x, y - bottom - 0.08, above, fontsize=8, ha="center", va="bottom")
            below = _shorten(row.key, 38)
            axes.text(x, y + bottom + 0.05, below, fontsize=6.5, color=MUTED, ha="center", va="top")
        axes.set(xlim=(0, width), ylim=(height, 0))
        figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=11)

    return Plot(draw, width, height, photographs=True)


def _fit(image: np.ndarray, width: float, height: float) -> tuple[float, float]:
    """Return half the width and half the height of an image that is scaled until it fits into a rectangle."""
    scale = min(width / image.shape[1], height / image.shape[0])
    return scale * image.shape[1] / 2, scale * image.shape[0] / 2


def worst(rows: Sequence[Misclassification]) -> list[Misclassification]:
    """Return up to MAX_THUMBNAILS rows, alternating between the kinds, each image once."""
    kinds = [[row for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)]
    once: dict[int, Misclassification] = {}
    for group in itertools.zip_longest(*kinds):
        for row in filter(None, group):
            once.setdefault(row.position, row)
    return list(once.values())[:MAX_THUMBNAILS]


def printable(text: str) -> str:
    """Replace characters without a glyph, for example control characters and characters that reorder other ones."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _shorten(text: str, length: int) -> str:
    text = printable(text)
    end = length // 3
    return text if len(text) <= length else f"{text[: length - end - 1]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def _percent(value: float, digits: int = 0) -> str:
    return f"{value:.{digits}%}".replace("%", " %")


def _format_percent(axis: "Axis", decimals: int | None = 0) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals, " %"))


def _label_bars(
    axes: "Axes", names: Sequence[str], ends: Sequence[float], texts: Sequence[str], length: int = 36
) -> None:
    """Label horizontal bars, the first at the top, and write a text at the end of each."""
    axes.set_yticks(range(len(names)), [_shorten(name, length) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * max(*ends, 1e-9))
    for position, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(
            text, (end, position), (6, 0), textcoords="offset points", va="center", fontsize=8, in_layout=False
        )
    axes.grid(axis="x")
