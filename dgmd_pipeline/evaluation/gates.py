"""Decides whether a candidate should be promoted. The decision has a verdict and the results of the gates.

The verdict compares the candidate's accuracy with production's. A gate is a condition for a promotion. A candidate with
the verdict "no difference" may meet all conditions, but nothing shows that it is better. The input is a `Review`, which
has the comparison with production and the serving benchmark.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline import manifest
from dgmd_pipeline.evaluation import class_losses
from dgmd_pipeline.evaluation.summary import BETTER, FIRST, NO_DIFFERENCE, NOT_COMPARED, WORSE
from dgmd_pipeline.formatting import counted, percent, points

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.comparison import ClassComparison, Comparison
    from dgmd_pipeline.evaluation.review import Review

NO_PRODUCTION = "There is no production version to compare with."
VERDICT = "verdict.json"
ADVICE = {BETTER: "Ready to promote", NO_DIFFERENCE: "No reason to promote", FIRST: "Nothing to compare it with"}


class Gate(NamedTuple):
    """A condition for promotion and its result."""

    name: str
    passed: bool | None  # None: it does not apply
    text: str  # the figures, as a sentence


class Limits(NamedTuple):
    """How much worse than production a candidate may be."""

    max_class_drop: float  # loss of a class's recall, 0 to 1; the gate fails if a loss is larger and significant
    max_latency_ratio: float  # limit for the candidate's latency / production's latency (medians for one image)
    allow_lost_labels: bool = False  # whether a label of production may be missing, or have no training images


class Decision(NamedTuple):
    """The reasons for and against a promotion."""

    verdict: str  # BETTER, NO_DIFFERENCE, WORSE, FIRST or NOT_COMPARED
    finding: str  # a clause about the accuracy
    headline: str  # what to do, and the finding
    reason: str  # a sentence about the gates
    gates: Sequence[Gate]  # failed gates first
    drift: str = ""  # a sentence about the former production version that is more accurate than production, if any

    @property
    def failed(self) -> list[str]:
        """Return the names of the gates that fail."""
        return [gate.name for gate in self.gates if gate.passed is False]


def decide(review: "Review", limits: Limits) -> Decision:
    """Return the verdict on a candidate and the results of the gates."""
    gates = sorted(check_gates(review, limits), key=lambda gate: gate.passed is not False)
    failed = [gate.name for gate in gates if gate.passed is False]
    applying = sum(gate.passed is not None for gate in gates)
    verdict, finding = _verdict(review)
    reason = f"All conditions that apply are met ({applying} of {applying})."
    advice = ADVICE.get(verdict, "Do not promote")
    if failed:
        advice = "Do not promote"
        reason = f"Failed: {', '.join(failed)} ({len(failed)} of {applying} conditions)."
    drift = _drift(review.best) if review.best else ""
    return Decision(verdict, finding, f"{advice}: {finding}", reason, gates, drift)


def grouped(gates: Sequence[Gate]) -> list[Gate]:
    """Merge gates that have the same result and the same text. The name of a merged gate contains their names."""
    found: dict[tuple[bool | None, str], list[str]] = {}
    for gate in gates:
        found.setdefault((gate.passed, gate.text), []).append(gate.name)
    return [Gate(", ".join(names), passed, text) for (passed, text), names in found.items()]


def _verdict(review: "Review") -> tuple[str, str]:
    """Return the verdict and a clause about it."""
    compared = review.comparison
    if compared is None:
        return (NOT_COMPARED, "not compared with production") if review.comparison_error else (FIRST, "first version")
    figure = f"{points(compared.difference)} points"
    if compared.is_better:
        return BETTER, f"better than version {compared.version} ({figure})"
    if compared.is_worse:
        return WORSE, f"worse than version {compared.version} ({figure})"
    return NO_DIFFERENCE, f"no significant difference from version {compared.version} ({figure})"


def _drift(best: "Comparison") -> str:
    """Return a sentence that compares the version with the best former production version.

    The comparison reveals small losses of accuracy that have added up over several promotions.
    """
    outcome = "significantly worse" if best.is_worse else "significantly better" if best.is_better else "not different"
    return (
        f"Version {best.version}, which was production before, had the highest accuracy so far. Compared with it, this "
        f"version is {outcome} ({_interval(best)} on the same {best.images:,} images)."
    )


def _interval(comparison: "Comparison") -> str:
    interval = f"{points(comparison.low)} to {points(comparison.high)}"
    return f"{points(comparison.difference)} points, 95 % interval {interval}"


def check_gates(review: "Review", limits: Limits) -> list[Gate]:
    """Return the result of every gate. Gates that need a production version do not apply without one."""
    return [
        _labels(review, limits.allow_lost_labels),
        _assessment(review),
        *_accuracy(review, limits),
        _latency(review, limits),
    ]


def _labels(review: "Review", allowed: bool) -> Gate:
    changes = review.label_changes
    if review.label_changes_error:
        return Gate("labels", False, review.label_changes_error)
    if changes is None:
        unknown = "The labels were not compared with production's."
        return Gate("labels", None, unknown if review.comparison_error else NO_PRODUCTION)
    lost = bool(changes.lost or changes.emptied)
    found = [
        f"{meaning}: {_listed(labels)}."
        for meaning, labels in (
            ("This version cannot predict these labels any more", changes.lost),
            ("This version still predicts these labels, but they have no training images any more", changes.emptied),
            ("New labels", changes.new),
        )
        if labels
    ]
    if lost and allowed:
        found.append("ALLOW_LOST_LABELS accepts this.")
    return Gate("labels", allowed or not lost, " ".join(found) or "No label is lost or new.")


def _listed(labels: Sequence[str], shown: int = 20) -> str:
    more = len(labels) - shown
    return ", ".join(labels[:shown]) + (f" and {more:,} more" if more > 0 else "")


def _assessment(review: "Review") -> Gate:
    benchmark = review.serving_benchmark
    if benchmark is None or review.comparison_error:
        return Gate("assessment", False, " ".join(filter(None, [review.benchmark_error, review.comparison_error])))
    if not benchmark.predictions_equal:
        return Gate(
            "assessment",
            False,
            "The saved model's predictions in a clean process differ from its predictions in training: probabilities "
            f"differ by up to {benchmark.largest_difference:.2g}.",
        )
    return Gate("assessment", True, "The saved model loads in a clean process and makes the same predictions there.")


def _accuracy(review: "Review", limits: Limits) -> list[Gate]:
    comparison = review.comparison
    if comparison is None:
        why = "The version was not compared with production." if review.comparison_error else NO_PRODUCTION
        return [Gate(name, None, why) for name in ("accuracy", "classes")]
    outcome = {(True, False): "Significantly better", (False, True): "Significantly worse"}.get(
        (comparison.is_better, comparison.is_worse), "Not significantly better or worse"
    )
    p = "p below 0.001" if comparison.p < 0.001 else f"p {comparison.p:.2g}"
    accuracy = Gate(
        "accuracy",
        not comparison.is_worse,
        f"{outcome} than version {comparison.version}: {_interval(comparison)}, {p}, on {comparison.images:,} images.",
    )
    return [accuracy, _classes(comparison, limits.max_class_drop)]


def _classes(comparison: "Comparison", max_drop: float) -> Gate:
    dropped = lost_classes(comparison, max_drop)
    if dropped:
        listed = ", ".join(
            f"{row.label} (from {percent(row.production_recall)} to {percent(row.recall)} of {row.images:,} images)"
            for row in dropped
        )
        text = f"Significantly worse, and by more than {100 * max_drop:.0f} points: {listed}."
        return Gate("classes", False, text)
    text = f"Compared with version {comparison.version}, no label has a significant loss of more than"
    return Gate("classes", True, f"{text} {100 * max_drop:.0f} points. {_detectable(comparison, max_drop)}")


def lost_classes(comparison: "Comparison", max_drop: float) -> "list[ClassComparison]":
    """Return the classes that are significantly worse and whose recall is lower by more than `max_drop`, worst first.

    If the models are equally good, the probability that there is such a class is at most `class_losses.LEVEL`.
    """
    rows = comparison.classes
    adjusted = class_losses.adjusted_p([row.gained for row in rows], [row.lost for row in rows])
    found = [
        row for row, p in zip(rows, adjusted, strict=True) if p <= class_losses.LEVEL and -row.change > max_drop + 1e-9
    ]
    return sorted(found, key=lambda row: row.change)


def _detectable(comparison: "Comparison", max_drop: float) -> str:
    """Return a sentence about the smallest loss that the gate detects, for a label with the median number of images."""
    rows = sorted(comparison.classes, key=lambda row: row.images)
    middle = rows[(len(rows) - 1) // 2]
    images = middle.images
    others = [row.gained + row.lost for row in rows if row is not middle]
    loss = class_losses.detectable_loss(images, others, comparison.detection.disagreement, max_drop)
    label = f"a label with {counted(images, 'image')}"
    if loss is None:
        return f"This test is too weak for {label}: it can miss even a fall of the recall to 0 %."
    power = percent(class_losses.POWER)
    return f"For {label}, this test would find a loss of {100 * loss:.0f} points with a probability of {power}."


def _latency(review: "Review", limits: Limits) -> Gate:
    production = review.serving_benchmark and review.serving_benchmark.production
    if not production:
        missing = review.comparison_error or review.benchmark_error
        text = "The latency was not measured together with production's." if missing else NO_PRODUCTION
        return Gate("latency", None, text)
    other = f"version {review.comparison.version}" if review.comparison else "the other model"
    return Gate(
        "latency",
        production.latency_ratio <= limits.max_latency_ratio,
        f"One image takes {production.latency_ratio:.2f} times as long as with {other}; the limit is "
        f"{limits.max_latency_ratio:g} times.",
    )


def write(decision: Decision, folder: Path) -> None:
    """Write `verdict.json` into the folder of an evaluation."""
    gates = [gate._asdict() for gate in decision.gates]
    manifest.write_json(folder / VERDICT, {**decision._asdict(), "failed": decision.failed, "gates": gates})


def tags_of(folder: Path) -> dict[str, str]:
    """Return the tags that describe the decision in `folder`; {} if an older pipeline wrote the folder."""
    if not (folder / VERDICT).exists():
        return {}
    found = manifest.read_json(folder / VERDICT)
    return {"verdict": found["verdict"]} | ({"dgmd.failed": ", ".join(found["failed"])} if found["failed"] else {})
