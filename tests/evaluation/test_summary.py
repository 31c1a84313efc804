"""What operators read of a version, and how percentages and counts are written."""

import pytest

from dgmd_pipeline.evaluation.summary import from_counts, sentences
from dgmd_pipeline.formatting import counted, percent, points

MEASURED = {"accuracy": 0.9512, "images": 1200, "f1": 0.9}
COMPARED = {"compared_with": 6, "difference": 0.031, "low": 0.012, "high": 0.05, "failed": []}


@pytest.mark.parametrize(
    ("counts", "verdict", "command"),
    [
        (
            {"verdict": "better"} | COMPARED,
            "Better than version 6: +3.1 points, 95 % interval +1.2 to +5.0.",
            "Next command: `promote 7` makes it production.",
        ),
        (
            {"verdict": "better"} | COMPARED | {"failed": ["labels", "latency"]},
            "Better than version 6: +3.1 points, 95 % interval +1.2 to +5.0. Failed conditions: labels, latency.",
            "Next command: `promote 7` shows each condition and refuses the version.",
        ),
        (
            {"verdict": "no difference"} | COMPARED | {"difference": -0.001, "low": -0.01},
            "No significant difference from version 6: -0.1 points, 95 % interval -1.0 to +5.0.",
            "Next command: `promote 7` shows each condition and asks.",
        ),
        (
            {"verdict": "first", "failed": []},
            "First version. There is no production version to compare it with.",
            "Next command: `promote 7` makes it production.",
        ),
        (
            {"verdict": "not compared", "failed": ["assessment"]},
            "Not compared. Failed conditions: assessment.",
            "Next command: `promote 7` shows each condition and refuses the version.",
        ),
    ],
)
def test_sentences_give_accuracy_verdict_report_and_the_next_command(counts, verdict, command):
    said = sentences(from_counts(MEASURED | counts), "data/evaluation/report.html", 7)
    accuracy = "Accuracy 95.1 % on 1,200 validation images."
    assert said == [accuracy, verdict, command, "Report: data/evaluation/report.html"]


def test_an_evaluation_of_before_there_were_verdicts_has_none():
    said = sentences(from_counts(MEASURED | {"difference": 0.1}), "report.html")
    assert said == ["Accuracy 95.1 % on 1,200 validation images.", "Report: report.html"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.0001, "0.1 %"), (0.5, "50 %"), (0.9966, "99.7 %"), (0.9999, "99.9 %"), (1, "100 %")],
)
def test_a_percentage_has_one_decimal_and_only_all_is_100(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("difference", "text"), [(0.031, "+3.1"), (-0.0004, "0.0"), (0, "0.0"), (-0.25, "-25.0")])
def test_a_difference_in_points_has_one_decimal_and_a_sign_in_ascii(difference, text):
    assert points(difference) == text


def test_one_thing_is_singular():
    assert [counted(count, "epoch") for count in (0, 1, 1200)] == ["0 epochs", "1 epoch", "1,200 epochs"]
