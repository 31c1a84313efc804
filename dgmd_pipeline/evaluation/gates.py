"""A review of a candidate -> whether it may be promoted: the gates and their results."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.comparison import Comparison
    from dgmd_pipeline.evaluation.review import Review

NO_PRODUCTION = "There is no production version to compare with."
MIN_CLASS_IMAGES = 3  # the recall of a class with fewer images is not checked


class Gate(NamedTuple):
    """A condition for promotion and its result."""

    name: str
    passed: bool | None  # None: it does not apply
    text: str  # the figures, as a sentence


class Limits(NamedTuple):
    """How much worse than production a candidate may be."""

    max_class_drop: float  # how much lower the recall of a class may be, 0 to 1
    max_latency_ratio: float  # candidate's median latency for one image, divided by production's


def check_gates(review: "Review", limits: Limits) -> list[Gate]:
    """Return the result of every gate. Gates that need production do not apply if there is none."""
    return [_assessment(review), *_accuracy(review, limits), _latency(review, limits)]


def _assessment(review: "Review") -> Gate:
    benchmark = review.serving_benchmark
    if benchmark is None or review.comparison_error:
        return Gate("assessment", False, " ".join(filter(None, [review.benchmark_error, review.comparison_error])))
    if not benchmark.predictions_equal:
        return Gate(
            "assessment",
            False,
            "In a clean process the saved model's predictions differ from those in training: probabilities differ by "
            f"up to {benchmark.largest_difference:.2g}.",
        )
    return Gate("assessment", True, "The saved model loads in a clean process and makes the same predictions there.")


def _accuracy(review: "Review", limits: Limits) -> list[Gate]:
    comparison = review.comparison
    if comparison is None:
        why = "The version was not compared with production." if review.comparison_error else NO_PRODUCTION
        return [Gate(name, None, why) for name in ("accuracy", "classes")]
    accuracy = Gate(
        "accuracy",
        not comparison.is_worse,
        f"{'Significantly worse' if comparison.is_worse else 'Not significantly worse'} than version "
        f"{comparison.version}: {100 * comparison.difference:+.1f} points (95 % interval {100 * comparison.low:+.1f} "
        f"to {100 * comparison.high:+.1f}, p {comparison.p:.2g}) on {comparison.images:,} images.",
    )
    return [accuracy, _classes(comparison, limits.max_class_drop)]


def _classes(comparison: "Comparison", max_drop: float) -> Gate:
    dropped = [
        f"{row.label} {row.production_recall:.0%} to {row.recall:.0%} of {row.images:,}"
        for row in comparison.classes
        if row.images >= MIN_CLASS_IMAGES and -row.change > max_drop + 1e-9
    ]
    if dropped:
        text = f"Classes whose recall is lower by more than {100 * max_drop:.0f} points: {'; '.join(dropped)}."
        return Gate("classes", False, text)
    text = f"No class has a recall more than {100 * max_drop:.0f} points below that of version {comparison.version}."
    return Gate("classes", True, text)


def _latency(review: "Review", limits: Limits) -> Gate:
    production = review.serving_benchmark and review.serving_benchmark.production
    if not production:
        missing = review.comparison_error or review.benchmark_error
        text = "The latency was not measured together with production's." if missing else NO_PRODUCTION
        return Gate("latency", None, text)
    return Gate(
        "latency",
        production.latency_ratio <= limits.max_latency_ratio,
        f"One image takes {production.latency_ratio:.2f} times as long as with the other model; the limit is "
        f"{limits.max_latency_ratio:g}.",
    )
