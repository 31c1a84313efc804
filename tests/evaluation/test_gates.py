"""The gates for a promotion."""

from dataclasses import replace

import pytest
from support.predictions import compare_flags, predictions_of

from dgmd_pipeline.evaluation import gates
from dgmd_pipeline.evaluation.comparison import compare
from dgmd_pipeline.evaluation.gates import Limits, check_gates, decide, grouped
from dgmd_pipeline.evaluation.review import LabelChanges, Review
from dgmd_pipeline.evaluation.serving_benchmark import ProductionBenchmark, ServingBenchmark
from dgmd_pipeline.evaluation.summary import BETTER

LIMITS = Limits(max_class_drop=0.15, max_latency_ratio=1.5)
ALONE = ServingBenchmark(
    load_seconds=1, latency_p50_ms=20, latency_p95_ms=30, images_per_second=50, batch=32, bytes=10**6,
    peak_memory_bytes=10**9, parameters=1000, predictions_equal=True, largest_difference=1e-6,
)  # fmt: skip
BENCHMARK = replace(ALONE, production=ProductionBenchmark(20, 1.0, 10**6, 1.0))


SAME = LabelChanges([], [], [])


def state(comparison=None, comparison_error="", benchmark=BENCHMARK, benchmark_error=""):
    review = Review(comparison, comparison_error, benchmark, benchmark_error)
    return {gate.name: gate.passed for gate in check_gates(review, LIMITS)}


def decision(comparison, labels=SAME, limits=LIMITS, **more):
    return decide(Review(comparison, "", BENCHMARK, "", labels, **more), limits)


def gate(name, **more):
    return next(each for each in decision(**more).gates if each.name == name)


def compare_classes(counts):
    """A comparison with version 7, given the images, gained and lost images of each label."""
    truth = [label for label, (images, _, _) in counts.items() for _ in range(images)]
    labels, right, before = [*counts, "other"], [], []
    for label, (images, gained, lost) in counts.items():
        right += [label] * gained + ["other"] * lost + [label] * (images - gained - lost)
        before += ["other"] * gained + [label] * (images - gained)
    return compare(predictions_of(right, truth, labels), predictions_of(before, truth, labels), version=7)


def test_without_production_only_the_assessment_counts():
    assert state(benchmark=ALONE) == {
        "labels": None, "assessment": True, "accuracy": None, "classes": None, "latency": None,
    }  # fmt: skip
    gates = decide(Review(None, "", ALONE, ""), LIMITS).gates
    assert [each.name for each in grouped(gates)] == ["labels, accuracy, classes, latency", "assessment"]


def test_a_missing_part_or_other_predictions_fail_the_assessment():
    assert state(comparison_error="No records.")["assessment"] is False
    assert state(benchmark=None, benchmark_error="It died.")["assessment"] is False
    assert state(benchmark=replace(BENCHMARK, predictions_equal=False))["assessment"] is False


def test_an_equally_good_model_passes():
    found = compare_flags([True] * 95 + [False] * 5, [True] * 94 + [False] * 6)
    assert state(found) == {"labels": None, "assessment": True, "accuracy": True, "classes": True, "latency": True}


def test_a_significantly_worse_model_fails():
    found = compare_flags([True] * 900 + [False] * 100, [True] * 950 + [False] * 50)
    assert found.high < 0
    assert state(found)["accuracy"] is False
    assert state(found)["classes"] is True  # five in a hundred


def test_a_few_lost_images_do_not_fail_though_the_bootstrap_alone_would():
    found = compare_flags([False] * 4 + [True] * 96, [True] * 100)
    assert found.high < 0 and found.p > 0.05
    assert state(found)["accuracy"] is True


@pytest.mark.parametrize(
    ("images", "gained", "lost", "passed"),
    [
        (9, 0, 2, True),  # two of nine: chance
        (18, 1, 5, True),
        (18, 0, 12, False),
        (200, 10, 40, True),  # significant, but not more than 15 points
        (200, 0, 32, False),
    ],
)
def test_a_class_fails_if_it_is_significantly_worse_and_by_more_than_the_limit(images, gained, lost, passed):
    others = {f"label {number}": (images, 1, 1) for number in range(23)}
    found = compare_classes({"anise": (images, gained, lost), **others, "zest": (images, min(40, images), 0)})
    assert state(found)["classes"] is passed


def test_a_much_better_version_that_loses_two_images_of_nine_may_be_promoted():
    found = compare_classes({"anise": (9, 0, 2), **{f"label {number}": (9, 6, 0) for number in range(9)}})
    assert found.difference > 0.5
    decided = decision(found)
    assert (decided.verdict, decided.failed) == (BETTER, [])


def test_the_classes_that_fail_are_listed_from_the_worst_and_a_pass_says_what_it_can_find():
    found = compare_classes({"mint": (100, 0, 20), "anise": (100, 0, 60), "zest": (100, 50, 0)})
    assert gate("classes", comparison=found).text == (
        "Significantly worse, and by more than 15 points: anise (from 100 % to 40 % of 100 images), "
        "mint (from 100 % to 80 % of 100 images)."
    )
    found = compare_classes({"mint": (18, 1, 1), "anise": (18, 0, 1), "zest": (18, 1, 0)})
    assert gate("classes", comparison=found).text.startswith(
        "Compared with version 7, no label has a significant loss of more than 15 points. For a label with 18 images, "
    )
    assert (
        "can miss even a fall of the recall to 0 %"
        in gate("classes", comparison=compare_classes({"mint": (4, 0, 1)})).text
    )


EQUAL = compare_flags([True] * 95 + [False] * 5, [True] * 94 + [False] * 6)


@pytest.mark.parametrize(
    ("changes", "passed", "text"),
    [
        (SAME, True, "No label is lost or new."),
        (LabelChanges([], [], ["dill"]), True, "New labels: dill."),
        (
            LabelChanges(["mint"], [], ["dill"]),
            False,
            "This version cannot predict these labels any more: mint. New labels: dill.",
        ),
        (
            LabelChanges([], ["mint"], []),
            False,
            "This version still predicts these labels, but they have no training images",
        ),
    ],
)
def test_a_lost_label_fails_unless_it_is_allowed(changes, passed, text):
    refused = gate("labels", comparison=EQUAL, labels=changes)
    assert refused.passed is passed and refused.text.startswith(text)
    allowed = gate("labels", comparison=EQUAL, labels=changes, limits=LIMITS._replace(allow_lost_labels=True))
    assert allowed.passed
    assert ("ALLOW_LOST_LABELS" in allowed.text) is not passed


def test_unknown_labels_of_production_fail():
    assert gate("labels", comparison=EQUAL, labels=None, label_changes_error="Version 7 has no list.").passed is False


def test_many_lost_labels_are_not_all_listed():
    found = gate("labels", comparison=EQUAL, labels=LabelChanges([f"{number:03}" for number in range(200)], [], []))
    assert found.text.endswith("019 and 180 more.")


WORSE = compare_flags([True] * 900 + [False] * 100, [True] * 950 + [False] * 50)
GAIN = compare_flags([True] * 950 + [False] * 50, [True] * 900 + [False] * 100)


@pytest.mark.parametrize(
    ("comparison", "labels", "verdict", "headline"),
    [
        (GAIN, SAME, "better", "Ready to promote: better than version 7 (+5.0 points)"),
        (EQUAL, SAME, "no difference", "No reason to promote: no significant difference from version 7 (+1.0 points)"),
        (WORSE, SAME, "worse", "Do not promote: worse than version 7 (-5.0 points)"),
        (GAIN, LabelChanges([], ["mint"], []), "better", "Do not promote: better than version 7 (+5.0 points)"),
        (None, None, "first", "Nothing to compare it with: first version"),
    ],
)
def test_the_verdict_has_three_outcomes_and_does_not_hide_a_condition_that_fails(comparison, labels, verdict, headline):
    benchmark = BENCHMARK if comparison else ALONE
    found = decide(Review(comparison, "", benchmark, "", labels), LIMITS)
    assert (found.verdict, found.headline) == (verdict, headline)
    failed = [each.name for each in found.gates if each.passed is False]
    assert found.failed == failed == [each.name for each in found.gates][: len(failed)]


@pytest.mark.parametrize(
    ("best", "words"),
    [(WORSE, "significantly worse (-5.0 points, 95 % interval -6"), (EQUAL, "not different (+1.0 points, ")],
)
def test_many_small_losses_show_against_the_best_version_that_was_production_before(best, words):
    found = decision(EQUAL, best=replace(best, version=3))
    assert "Version 3, which was production before, had the highest accuracy so far." in found.drift
    assert f"this version is {words}" in found.drift and f"on the same {best.images:,} images" in found.drift
    assert found.verdict == "no difference"


def test_a_failed_comparison_has_a_verdict_of_its_own():
    found = decide(Review(None, "No records.", ALONE, ""), LIMITS)
    assert (found.verdict, found.failed) == ("not compared", ["assessment"])
    assert found.headline == "Do not promote: not compared with production"


def test_a_decision_gives_tags_and_an_older_evaluation_gives_none(tmp_path):
    assert gates.tags_of(tmp_path) == {}
    gates.write(decision(GAIN, LabelChanges(["mint"], [], [])), tmp_path)
    assert gates.tags_of(tmp_path) == {"verdict": "better", "dgmd.failed": "labels"}
    gates.write(decision(GAIN), tmp_path)
    assert gates.tags_of(tmp_path) == {"verdict": "better"}


@pytest.mark.parametrize(("ratio", "passed"), [(1.5, True), (1.51, False)])
def test_a_model_may_not_be_too_slow(ratio, passed):
    found = compare_flags([True] * 3, [True] * 3)
    slow = replace(BENCHMARK, production=replace(BENCHMARK.production, latency_ratio=ratio))
    assert state(found, benchmark=slow)["latency"] is passed


def test_without_a_comparison_the_assessment_fails_and_the_other_gates_do_not_apply():
    assert state(comparison_error="No records.", benchmark=ALONE) == {
        "labels": None, "assessment": False, "accuracy": None, "classes": None, "latency": None,
    }  # fmt: skip
