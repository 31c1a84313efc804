"""The parts of `make bench-quality` that its figures depend on."""

import pickle

import numpy as np
import pytest

from benchmarks import datasets, imbalance, lite0, quality_report
from dgmd_pipeline.manifest import Image


def rows_of(sizes, group=1):
    """Images of labels of the given sizes; so many of a label in turn are near-duplicates."""
    return [
        Image(f"{label}/{number:03}.png", label, f"{label}{number}", "PNG", 8, 8, f"{label} {number // group}")
        for label, size in sizes.items()
        for number in range(size)
    ]


def test_a_test_part_has_its_share_of_each_label_and_whole_groups():
    rows = rows_of({"hat": 60, "shoe": 30}, group=3)
    kept, test = datasets.third_split(rows, 0)
    assert sorted(kept + test) == sorted(rows)
    assert [sum(row.label == label for row in test) for label in ("hat", "shoe")] == [12, 6]
    assert not {row.group for row in kept} & {row.group for row in test}


def test_each_repeat_has_another_test_part():
    rows = rows_of({"hat": 60})
    assert datasets.third_split(rows, 0) == datasets.third_split(rows, 0) != datasets.third_split(rows, 1)


def test_a_long_tail_falls_geometrically_and_takes_no_more_than_there_is():
    tail = imbalance.long_tail(rows_of({"a": 100, "b": 90, "c": 12}), 16, seed=0)
    assert [sum(row.label == label for row in tail) for label in "abc"] == [100, 25, 6]
    assert imbalance.long_tail(rows_of({"a": 100, "b": 3}), 2, seed=0)[-3:] == rows_of({"b": 3})


def test_a_file_of_weights_cannot_call_functions(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="names builtins.print"):
        lite0.read(file)


@pytest.mark.parametrize(("ours", "verdict"), [(0.80, "yes"), (0.79, "**no**")])
def test_a_claim_holds_down_to_half_a_point_below_logistic_regression(tmp_path, monkeypatch, ours, verdict):
    def figures(accuracy):
        return [dict.fromkeys((*quality_report.METRICS, "cpu_seconds"), 0.1) | {"accuracy": accuracy}] * 2

    found = quality_report.Found(repeats=2)
    methods = {quality_report.OURS: figures(ours), quality_report.LOGISTIC: figures(0.80)}
    methods[quality_report.RAW] = figures(0.7)
    counts = {"training": 2, "test": 1, "labels": 2}
    found.sets["solar"] = {"title": "solar cells", "counts": counts, "methods": methods}
    monkeypatch.setattr(quality_report, "QUALITY", tmp_path / "QUALITY.md")
    quality_report.write(found)
    claim = next(line for line in quality_report.QUALITY.read_text().splitlines() if "| accuracy at least" in line)
    assert claim.endswith(f"| {verdict} |")


def test_figures_are_those_of_the_evaluation():
    probabilities = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    found = quality_report.figures(probabilities, np.array([0, 1, 1]), ["hat", "shoe"])
    assert found["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["log_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.1]).mean(), abs=1e-4)
