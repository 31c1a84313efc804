"""Writes report.html, which an operator reads to decide on a promotion.

The page is self-contained: it has no script, it loads nothing from a network, and its images are data: URIs. Labels and
file names come from outside, so the templates escape everything, and the page's policy forbids scripts and requests.
The templates draw the charts (see `charts`), so that labels appear in the browser's fonts. The PNG files are for MLflow
and for documents.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline import formatting
from dgmd_pipeline.evaluation import charts, plots, versions_so_far
from dgmd_pipeline.evaluation.comparison import Comparison, detection
from dgmd_pipeline.evaluation.gates import Decision, grouped
from dgmd_pipeline.evaluation.label_suspects import SHOWN, LabelSuspects
from dgmd_pipeline.evaluation.leaks import Leaks
from dgmd_pipeline.evaluation.metrics import MOST_CONFIDENT, MOST_WRONG, Measurements
from dgmd_pipeline.evaluation.plots import Plot
from dgmd_pipeline.evaluation.summary import BETTER
from dgmd_pipeline.evaluation.versions_so_far import VersionSummary
from dgmd_pipeline.manifest import Rejected
from dgmd_pipeline.training.config import Epoch

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.review import Review

PAGE = "report.html"
MAX_REJECTED = 50  # rejected files in the table
MAX_LEAKS = 24  # pairs of near-duplicates that are shown
CARD = (320, 240)  # largest width and height in pixels of an image; the page shows it at half this size


class Content(NamedTuple):
    """What the report shows of a training. Shares are 0 to 1."""

    model_name: str
    created: str  # ISO 8601
    source: str  # URI of the images
    settings: Mapping[str, object]  # environment variable -> setting
    labels: Sequence[str]  # by class index
    measured: Measurements
    thumbnails: Mapping[int, np.ndarray]  # position of a misclassification -> uint8 [height, width, 3]
    suspects: LabelSuspects | None  # None: no features are stored
    suspect_thumbnails: Mapping[int, np.ndarray]  # position of a suspect -> uint8 [height, width, 3]
    leaks: Leaks | None  # None: no features are stored
    leak_thumbnails: Mapping[int, np.ndarray]  # image number (see `leak_keys`) -> uint8 [height, width, 3]
    history: Sequence[Epoch]
    head: Mapping[str, object] | None  # the heads that were tried, and the chosen one; None for the backbone `cnn`
    counts: Sequence[plots.ClassCounts]
    rejected: Sequence[Rejected]
    seconds: Sequence[tuple[str, float]]  # name and duration of each step, in the order of the steps
    versions: Sequence[VersionSummary] = ()  # registered versions, the oldest first
    fine_tuning: str = ""  # result of fine-tuning as a sentence; "" without fine-tuning


class _Interval(NamedTuple):
    """The interval of the difference on a line with zero in the middle, in percent of the line's length."""

    low: float
    high: float
    difference: float
    words: str  # what the interval means, as a sentence


def draw(folder: Path, content: Content, comparison: Comparison | None) -> None:
    """Write the plots and the contact sheets as PNG files into `folder`. This takes 3 to 4 CPU seconds."""
    for name, plot in (_plots(content, comparison) | _contact_sheets(content)).items():
        (folder / f"{name}.png").write_bytes(plot.png())


def write(folder: Path, content: Content, review: "Review", decision: Decision) -> None:
    """Write `report.html` into `folder`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A file name may contain characters that UTF-8 cannot encode or that reverse the following text.
        finalize=lambda value: value if hasattr(value, "__html__") else plots.printable(str(value)),
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "points": formatting.points,
        "small": lambda value: "below 0.000001" if 0 < value < 1e-6 else f"{value:.6f}".rstrip("0").rstrip("."),
        "milliseconds": lambda value: f"{value:.1f} ms" if value < 9.95 else f"{value:,.0f} ms",
        "human": formatting.format_bytes,
        "duration": formatting.format_seconds,
        "whole": lambda value: f"{value:,}",
        "date": _date,
        "day": lambda seconds: _date(datetime.fromtimestamp(seconds, UTC).isoformat()),
        "css": lambda value: f"{value:.2f}".rstrip("0").rstrip(".") + "%",  # a length
    }
    environment.filters |= filters
    environment.globals["charts"] = charts  # the sizes that the templates draw with
    values = content._asdict() | review._asdict() | _derived(content, review.comparison)
    decided = {"decision": decision, "gates": grouped(decision.gates), "mark": _mark(decision)}
    text = environment.get_template(f"{PAGE}.jinja").render(values | _charts(content, review.comparison), **decided)
    (folder / PAGE).write_text(text, encoding="utf-8")


def _charts(content: Content, comparison: Comparison | None) -> dict[str, object]:
    """Return the geometry of the charts."""
    measured = content.measured
    compared = comparison.classes if comparison else []
    shown = [*content.versions, _summary(content)] if content.versions else []
    return {
        "changes": charts.changes(compared),
        "recalls": charts.recalls(measured.classes),
        "label_rows": charts.label_rows(measured.classes, compared),
        "matrix": charts.matrix(measured.classes, measured.confused_pairs),
        "reliability": charts.reliability(measured.calibration),
        "learning_curves": charts.curves(content.history) if len(content.history) > 1 else [],
        "versions_shown": shown,
        "version_panels": versions_so_far.panels(shown),
        "largest_first": sorted(content.counts, key=lambda row: (-row.before, row.label)),
        "most_images": max((max(row.before, row.after) for row in content.counts), default=1) or 1,
    }


def _summary(content: Content) -> VersionSummary:
    """Return the summary of this version. Its version number is assumed to be the next one."""
    return VersionSummary(
        version=content.versions[-1].version + 1,
        created=datetime.fromisoformat(content.created).timestamp(),
        accuracy=content.measured.overall["accuracy"],
        images=sum(row.training for row in content.counts) if content.counts else None,
        labels=len(content.labels),
        left_out=len(content.rejected),
    )


def _derived(content: Content, comparison: Comparison | None) -> dict[str, object]:
    """Return values for the template that are computed from the content and the comparison."""
    measured = content.measured
    return {
        "interval": comparison and _interval(comparison),
        "detection": comparison.detection if comparison else detection(int(measured.overall["images"])),
        "unmeasured": _unmeasured(content),
        "guessing": math.log(len(content.labels)),  # log loss of random guessing
        "misclassified": {
            kind: [row for row in measured.misclassifications if row.kind == kind]
            for kind in (MOST_CONFIDENT, MOST_WRONG)
        },
        "shown_leaks": content.leaks.pairs[:MAX_LEAKS] if content.leaks else [],
        "shown_suspects": content.suspects.suspects[:SHOWN] if content.suspects else [],
        "shown_rejected": content.rejected[:MAX_REJECTED],
        "reasons": Counter(row.reason for row in content.rejected).most_common(),
        "cards": _jpegs(content.thumbnails),
        "leak_cards": _jpegs(content.leak_thumbnails),
        "suspect_cards": _jpegs(content.suspect_thumbnails),
    }


def leak_keys(leaks: Leaks | None) -> dict[int, str]:
    """Return the images of the shown pairs: image number -> key.

    In pair i (from 0), the validation image has the number 2 i, and the training image has the number 2 i + 1.
    """
    shown = leaks.pairs[:MAX_LEAKS] if leaks else []
    return dict(enumerate(key for leak in shown for key in (leak.key, leak.training_key)))


def _plots(content: Content, comparison: Comparison | None) -> dict[str, Plot]:
    """Return the plots of the report: file name without .png -> plot. Plots without data are left out."""
    measured = content.measured
    production = {row.label: row.production_recall for row in comparison.classes} if comparison else {}
    recalls = [
        plots.LabelRecall(row.label, row.images, row.recall, production.get(row.label)) for row in measured.classes
    ]
    found = {
        "recall": plots.recall(recalls),
        "reliability": plots.reliability(measured.calibration, measured.overall["expected_calibration_error"]),
    }
    if measured.confusion_matrix is not None:
        found["confusion_matrix"] = plots.confusion_matrix(measured.confusion_matrix, content.labels)
    if measured.confused_pairs:
        found["confused_pairs"] = plots.confused_pairs(measured.confused_pairs)
    if content.counts:
        found["class_counts"] = plots.class_counts(content.counts)
    if len(content.history) > 1:
        found["learning_curves"] = plots.learning_curves(content.history)
    if content.seconds:
        found["step_seconds"] = plots.step_seconds(content.seconds)
    return found


def _contact_sheets(content: Content) -> dict[str, Plot]:
    """Return the contact sheets: file name without .png -> plot. The report shows the same images one by one."""
    found = {}
    misclassified = content.measured.misclassifications
    if any(row.position in content.thumbnails for row in misclassified):
        found["mistakes"] = plots.contact_sheet(misclassified, content.thumbnails)
    if content.suspects and content.suspect_thumbnails:
        title = f"Likely wrong labels: given {plots.ARROW} likely label and its probability"
        found["label_suspects"] = plots.contact_sheet(content.suspects.suspects, content.suspect_thumbnails, title)
    return found


def _mark(decision: Decision) -> str:
    """Return the CSS class of the verdict: only a better version that meets all conditions is green."""
    if decision.failed:
        return "no"
    return "yes" if decision.verdict == BETTER else "open"


def _interval(comparison: Comparison) -> _Interval:
    reach = 1.25 * max(abs(comparison.low), abs(comparison.high), 0.004)
    if comparison.is_better:
        words = "This model is better, and chance is unlikely to be the reason."
    elif comparison.is_worse:
        words = "This model is worse, and chance is unlikely to be the reason."
    else:
        words = "The difference is small enough to be chance: these images do not show which model is better."
    low, high, middle = (50 + 50 * value / reach for value in (comparison.low, comparison.high, comparison.difference))
    return _Interval(low, high, middle, words)


def _unmeasured(content: Content) -> list[str]:
    measured = {row.label for row in content.measured.classes}
    return [label for label in content.labels if label not in measured]


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _date(text: str) -> str:
    """Convert a UTC time from ISO 8601 to the form "26 November 2026, 03:00 UTC"."""
    time = datetime.fromisoformat(text)
    return f"{time.day} {time:%B %Y, %H:%M} UTC"


def _jpegs(thumbnails: Mapping[int, np.ndarray]) -> dict[int, str]:
    """Return thumbnails as data: URIs, under the same numbers."""
    from PIL import Image

    found = {}
    for number, pixels in thumbnails.items():
        image = Image.fromarray(pixels)
        image.thumbnail(CARD)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        found[number] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found
