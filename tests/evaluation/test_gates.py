"""The gates for a promotion."""

from dataclasses import replace

import pytest
from support.predictions import compare_flags

from dgmd_pipeline.evaluation.gates import Limits, check_gates
from dgmd_pipeline.evaluation.review import Review
from dgmd_pipeline.evaluation.serving_benchmark import ProductionBenchmark, ServingBenchmark

LIMITS = Limits(max_class_drop=0.15, max_latency_ratio=1.5)
ALONE = ServingBenchmark(
    load_seconds=1, latency_p50_ms=20, latency_p95_ms=30, images_per_second=50, batch=32, bytes=10**6,
    peak_memory_bytes=10**9, parameters=1000, predictions_equal=True, largest_difference=1e-6,
)  # fmt: skip
BENCHMARK = replace(ALONE, production=ProductionBenchmark(20, 1.0, 10**6, 1.0))


def state(comparison=None, comparison_error="", benchmark=BENCHMARK, benchmark_error=""):
    review = Review(comparison, comparison_error, benchmark, benchmark_error)
    return {gate.name: gate.passed for gate in check_gates(review, LIMITS)}


def test_without_production_only_the_assessment_counts():
    assert state(benchmark=ALONE) == {"assessment": True, "accuracy": None, "classes": None, "latency": None}


def test_a_missing_part_or_other_predictions_fail_the_assessment():
    assert state(comparison_error="No records.")["assessment"] is False
    assert state(benchmark=None, benchmark_error="It died.")["assessment"] is False
    assert state(benchmark=replace(BENCHMARK, predictions_equal=False))["assessment"] is False


def test_an_equally_good_model_passes():
    found = compare_flags([True] * 95 + [False] * 5, [True] * 94 + [False] * 6)
    assert state(found) == {"assessment": True, "accuracy": True, "classes": True, "latency": True}


def test_a_significantly_worse_model_fails():
    found = compare_flags([True] * 900 + [False] * 100, [True] * 950 + [False] * 50)
    assert found.high < 0
    assert state(found)["accuracy"] is False
    assert state(found)["classes"] is True  # five in a hundred


def test_a_few_lost_images_do_not_fail_though_the_bootstrap_alone_would():
    found = compare_flags([False] * 4 + [True] * 96, [True] * 100)
    assert found.high < 0 and found.p > 0.05
    assert state(found)["accuracy"] is True


@pytest.mark.parametrize(("images", "lost", "passed"), [(2, 2, True), (3, 1, False), (20, 3, True), (20, 4, False)])
def test_a_class_with_at_least_three_images_may_not_lose_too_much(images, lost, passed):
    found = compare_flags([False] * lost + [True] * (images - lost), [True] * images)
    assert state(found)["classes"] is passed


@pytest.mark.parametrize(("ratio", "passed"), [(1.5, True), (1.51, False)])
def test_a_model_may_not_be_too_slow(ratio, passed):
    found = compare_flags([True] * 3, [True] * 3)
    slow = replace(BENCHMARK, production=replace(BENCHMARK.production, latency_ratio=ratio))
    assert state(found, benchmark=slow)["latency"] is passed


def test_without_a_comparison_the_assessment_fails_and_the_other_gates_do_not_apply():
    assert state(comparison_error="No records.", benchmark=ALONE) == {
        "assessment": False, "accuracy": None, "classes": None, "latency": None,
    }  # fmt: skip
