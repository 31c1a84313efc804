"""A comparison and a serving benchmark -> the conditions for production."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dgmd_pipeline.evaluation import comparison as evaluation_comparison

NOTHING = "There is no production version to compare with."
MIN_CLASS_IMAGES = 3  # of a class, for its loss to count


class Gate(NamedTuple):
    """A condition for production."""

    name: str
    passed: bool | None  # None: it does not apply
    text: str  # the figures, in words


class Limits(NamedTuple):
    """What a candidate may lose against production."""

    max_class_drop: float  # of a class's recall, 0 to 1
    max_latency_ratio: float  # of the median time for one picture


def check_gates(
    comparison: Mapping[str, Any] | None,
    missing: str,
    assessment: Mapping[str, Any] | None,
    untried: str,
    limits: Limits,
) -> list[Gate]:
    """Return what has to hold for production: with figures from `compare` and from `assessment.assess`.

    Each is None where it could not be made, `missing` and `untried` say why; or where, with `missing` empty, there is
    no production to compare with.
    """
    return [
        _assessed(missing, assessment, untried),
        *_as_good(comparison, missing, limits),
        _as_fast(missing, assessment, untried, limits),
    ]


def _assessed(missing: str, assessment: Mapping[str, Any] | None, untried: str) -> Gate:
    if assessment is None or missing:
        return Gate("assessment", False, " ".join(filter(None, [untried, missing])))
    if not assessment["predictions_equal"]:
        return Gate(
            "assessment",
            False,
            "In a clean process the saved model predicts something else than before: probabilities differ by up to "
            f"{assessment['largest_difference']:.2g}.",
        )
    return Gate("assessment", True, "The saved model loads in a clean process and predicts the same there.")


def _as_good(comparison: Mapping[str, Any] | None, missing: str, limits: Limits) -> list[Gate]:
    if comparison is None:
        why = "It has not been compared with production." if missing else NOTHING
        return [Gate(name, None, why) for name in ("accuracy", "classes")]
    version, images = comparison["version"], comparison["images"]
    worse = evaluation_comparison.is_worse(comparison)
    accuracy = Gate(
        "accuracy",
        not worse,
        f"{'Significantly worse' if worse else 'Not significantly worse'} than version {version}: "
        f"{100 * comparison['difference']:+.1f} points (95 % interval {100 * comparison['low']:+.1f} to "
        f"{100 * comparison['high']:+.1f}, p {comparison['p']:.2g}) on {images:,} images.",
    )
    fallen = [
        f"{row['label']} {row['production_recall']:.0%} to {row['recall']:.0%} of {row['images']:,}"
        for row in comparison["classes"]
        if row["images"] >= MIN_CLASS_IMAGES and row["production_recall"] - row["recall"] > limits.max_class_drop + 1e-9
    ]
    text = f"No class loses more than {limits.max_class_drop:.0%} of its images against version {version}."
    if fallen:
        text = f"Classes that lose more than {limits.max_class_drop:.0%} of their images: {'; '.join(fallen)}."
    return [accuracy, Gate("classes", not fallen, text)]


def _as_fast(missing: str, assessment: Mapping[str, Any] | None, untried: str, limits: Limits) -> Gate:
    ratio = assessment and assessment.get("latency_ratio")
    if not ratio:
        return Gate("latency", None, "It has not been timed beside production." if missing or untried else NOTHING)
    return Gate(
        "latency",
        ratio <= limits.max_latency_ratio,
        f"One picture takes {ratio:.2f} times as long as with the other model; up to {limits.max_latency_ratio:g} is "
        "allowed.",
    )
