"""Measurements and pictures -> report.html, from which a person decides.

The page stands alone: no script, nothing from a network, pictures as data: URIs. Labels and file names come from
outside, so the template escapes everything and the page forbids itself to run or to fetch anything.
"""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgmd_pipeline import formatting
from dgmd_pipeline.evaluation import plots
from dgmd_pipeline.evaluation.comparison import detection, is_better, is_worse
from dgmd_pipeline.evaluation.gates import Gate
from dgmd_pipeline.evaluation.label_suspects import SHOWN
from dgmd_pipeline.evaluation.label_suspects import Found as Suspects
from dgmd_pipeline.evaluation.leaks import Found as Leaks
from dgmd_pipeline.evaluation.metrics import MOST_CONFIDENT, MOST_WRONG, Measurements
from dgmd_pipeline.formatting import format_bytes
from dgmd_pipeline.manifest import Rejected
from dgmd_pipeline.training.config import Epoch

PAGE = "report.html"
REJECTED = 50  # that are named
PAIRS = 24  # of near-duplicates that are shown
CARD = (320, 240)  # pixels that a picture of a mistake has at most: twice what it takes on the page
Draw = Callable[[], bytes]  # draws a picture


class Content(NamedTuple):
    """What the report says of a training. Shares are 0 to 1."""

    model_name: str
    created: str
    source: str  # where the pictures came from
    settings: Mapping[str, object]  # by variable
    labels: Sequence[str]  # by class index
    measured: Measurements
    thumbnails: Mapping[int, np.ndarray]  # uint8 [height, width, 3] by a mistake's position
    suspects: Suspects | None  # images with a likely wrong label; None where no features are stored
    suspect_thumbnails: Mapping[int, np.ndarray]  # as `thumbnails`, by a suspect's position
    leaks: Leaks | None  # None: no features are stored that could be compared
    leak_thumbnails: Mapping[int, np.ndarray]  # uint8 [height, width, 3] by the numbers that `pairs` gives
    history: Sequence[Epoch]
    head: Mapping[str, Any] | None  # how the head was chosen: `head_selection.to_json`; None for `cnn`
    counts: Sequence[plots.ClassCounts]
    rejected: Sequence[Rejected]
    seconds: Sequence[tuple[str, float]]  # of each step, in their order
    fine_tuning: str = ""  # what came of it, a sentence; "" where there was none


class Outcome(NamedTuple):
    """What it says for and against a promotion."""

    gates: Sequence[Gate]
    comparison: Mapping[str, Any] | None  # what `review.compare` returns
    comparison_missing: str  # why there is none, a sentence; "" where there is no production
    assessment: Mapping[str, Any] | None  # what `assessment.assess` returns
    assessment_missing: str  # why there is none, a sentence


class _Picture(NamedTuple):
    link: str  # data: URI
    width: int  # pixels of a page
    height: int


def draw(folder: Path, content: Content, comparison: Mapping[str, Any] | None) -> None:
    """Write the plots and the sheets of mistakes and suspects as PNG files into `folder`, in 3 to 4 s of one core."""
    drawn = _plots(content, comparison)
    mistakes = content.measured.mistakes
    if any(row.position in content.thumbnails for row in mistakes):
        drawn["mistakes"] = partial(plots.contact_sheet, mistakes, content.thumbnails)  # the report has them one by one
    if content.suspects and content.suspect_thumbnails:
        title = "Likely wrong labels: given \N{RIGHTWARDS ARROW} likely label and its probability"
        drawn["label_suspects"] = partial(
            plots.contact_sheet, content.suspects.suspects, content.suspect_thumbnails, title
        )
    for name, picture in drawn.items():
        (folder / f"{name}.png").write_bytes(picture())


def write(folder: Path, content: Content, outcome: Outcome) -> None:
    """Write `report.html` into `folder`, with the plots that `draw` has put there."""
    import jinja2

    shown = content.measured.mistakes
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A file name may hold what UTF-8 cannot write, or what reverses the text that follows.
        finalize=lambda value: value if hasattr(value, "__html__") else plots.printable(str(value)),
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "points": _points,
        "small": lambda value: "below 0.000001" if 0 < value < 1e-6 else f"{value:.6f}".rstrip("0").rstrip("."),
        "milliseconds": lambda value: f"{value:.1f} ms" if value < 9.95 else f"{value:,.0f} ms",
        "human": format_bytes,
        "duration": formatting.format_seconds,
    }
    environment.filters |= filters
    comparison = outcome.comparison
    text = environment.get_template(f"{PAGE}.jinja").render(
        content._asdict() | outcome._asdict(),
        pictures={name: _picture(folder / f"{name}.png") for name in _plots(content, comparison)},
        verdict=_verdict(outcome.gates),
        interval=comparison and _interval(comparison),
        compared=_by_change(comparison) if comparison else [],
        detection=comparison["detection"] if comparison else detection(int(content.measured.overall["images"])),
        unmeasured=_unmeasured(content),
        chance=math.log(len(content.labels)),
        mistakes={kind: [row for row in shown if row.kind == kind] for kind in (MOST_WRONG, MOST_CONFIDENT)},
        shown_leaks=content.leaks.leaks[:PAIRS] if content.leaks else [],
        leak_cards={number: _jpeg(picture) for number, picture in content.leak_thumbnails.items()},
        cards={position: _jpeg(picture) for position, picture in content.thumbnails.items()},
        suspect_cards={position: _jpeg(picture) for position, picture in content.suspect_thumbnails.items()},
        suspects_shown=content.suspects.suspects[:SHOWN] if content.suspects else [],
        reasons=Counter(row.reason for row in content.rejected).most_common(),
        named=content.rejected[:REJECTED],
    )
    (folder / PAGE).write_text(text, encoding="utf-8")


def pairs(leaks: Leaks | None) -> dict[int, str]:
    """Number the images of the pairs to show: 2 i for the validation image of pair i, 2 i + 1 for its partner."""
    shown = leaks.leaks[:PAIRS] if leaks else []
    return dict(enumerate(key for leak in shown for key in (leak.key, leak.training_key)))


def _plots(content: Content, comparison: Mapping[str, Any] | None) -> dict[str, Draw]:
    """Return what draws each picture, by the name of its file; none for what there is nothing of."""
    measured = content.measured
    theirs: dict[str, float] = {}
    if comparison:
        theirs = {row["label"]: row["production_recall"] for row in comparison["classes"]}
    recalls = [(row.label, row.images, row.recall, theirs.get(row.label)) for row in measured.classes]
    error = measured.overall["expected_calibration_error"]
    found: dict[str, Draw] = {
        "recall": partial(plots.recall, recalls),
        "confusion_matrix": partial(plots.confusion, measured.matrix, content.labels),
        "reliability": partial(plots.reliability, measured.bins, error),
    }
    if measured.pairs:
        found["confused_pairs"] = partial(plots.confused_pairs, measured.pairs)
    if content.counts:
        found["class_counts"] = partial(plots.class_counts, content.counts)
    if len(content.history) > 1:
        found["learning_curves"] = partial(plots.learning, content.history)
    if content.seconds:
        found["step_seconds"] = partial(plots.times, content.seconds)
    return found


def _verdict(gates: Sequence[Gate]) -> tuple[str, str, str]:
    """Return a CSS class, the verdict and the reason."""
    failed = [gate.name for gate in gates if gate.passed is False]
    applying = sum(gate.passed is not None for gate in gates)
    if failed:
        failures = f"Failed: {', '.join(failed)} ({len(failed)} of {applying} conditions)."
        return "no", "Do not promote this version", failures
    if not applying:
        return "open", "No condition decides", "None of those for a promotion applies: the decision is yours alone."
    return "yes", "This version may be promoted", f"Every condition that applies holds ({applying} of {applying})."


def _interval(comparison: Mapping[str, Any]) -> dict[str, float | str]:
    """Return where the interval of the difference lies on a line with zero in the middle, in percent of its length."""
    reach = 1.25 * max(abs(comparison["low"]), abs(comparison["high"]), 0.004)
    place = {name: 50 + 50 * comparison[name] / reach for name in ("low", "high", "difference")}
    if is_better(comparison):
        place["words"] = "This model is better, and chance is unlikely to be the reason."
    elif is_worse(comparison):
        place["words"] = "This model is worse, and chance is unlikely to be the reason."
    else:
        place["words"] = "The difference is small enough to be chance: on these pictures neither is surely better."
    return place


def _by_change(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of the labels with the change of recall, the one first that loses most against production."""
    rows = [{**row, "change": row["recall"] - row["production_recall"]} for row in comparison["classes"]]
    return sorted(rows, key=lambda row: row["change"])


def _unmeasured(content: Content) -> list[str]:
    measured = {row.label for row in content.measured.classes}
    return [label for label in content.labels if label not in measured]


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _points(value: float) -> str:
    """Return a difference of two shares in percentage points, with its sign."""
    return (
        f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0").replace("\N{MINUS SIGN}0.0", "0.0")
    )


def _picture(path: Path) -> _Picture:
    from PIL import Image

    drawn = path.read_bytes()
    size = [round(pixels * 96 / plots.DPI) for pixels in Image.open(io.BytesIO(drawn)).size]
    return _Picture(_uri("png", drawn), *size)


def _jpeg(pixels: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail(CARD)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
