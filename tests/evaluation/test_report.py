import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dgmd_pipeline.evaluation import metrics, report
from dgmd_pipeline.evaluation.gates import Gate
from dgmd_pipeline.evaluation.label_suspects import SUSPECT
from dgmd_pipeline.evaluation.label_suspects import Found as Suspects
from dgmd_pipeline.evaluation.leaks import Found, Leak
from dgmd_pipeline.evaluation.metrics import Misclassification
from dgmd_pipeline.evaluation.plots import ClassCounts
from dgmd_pipeline.evaluation.report import Content, Outcome
from dgmd_pipeline.manifest import Rejected
from dgmd_pipeline.training.config import Epoch

EVIL = "<script>alert('x')</script>"
LABELS = [EVIL, 'basil "sweet" & \udcff', "gone", "mint"]
TRUTH = np.array([0, 0, 0, 1, 1, 3])
PROBABILITIES = np.full((6, 4), 0.1)
PROBABILITIES[np.arange(6), [0, 0, 1, 1, 2, 3]] = 0.7
KEYS = [f"{LABELS[index]}/{number}.jpg" for number, index in enumerate(TRUTH)]
HISTORY = [Epoch(0, 0.5, 1.2, 0.4, 1.3, 0.01), Epoch(1, 0.7, 0.8, 0.6, 0.9, 0.005)]
SUSPECTS = [Misclassification(SUSPECT, f"{EVIL}/{row}.jpg", EVIL, "mint", 0.875, 0.0125, row) for row in range(60)]
COMPARISON = {
    "version": 7, "images": 1180, "left_out": 60, "accuracy": 0.794, "production_accuracy": 0.781,
    "difference": 0.013, "low": -0.004, "high": 0.03, "gained": 62, "lost": 47, "p": 0.183,
    "classes": [
        {"label": EVIL, "images": 3, "recall": 0.5, "production_recall": 0.75, "gained": 0, "lost": 1},
        {"label": "mint", "images": 1, "recall": 1.0, "production_recall": 1.0, "gained": 0, "lost": 0},
    ],
    "detection": {
        "disagreement": 0.092, "assumed": False, "loss": 0.03, "probability": 0.912, "detectable_loss": 0.025
    },
    "labels_only_here": ["gone"], "labels_only_there": ["<b>vanilla</b>"],
}  # fmt: skip
ASSESSMENT = {
    "load_seconds": 4.23, "latency_p50_ms": 38.2, "latency_p95_ms": 55.7, "images_per_second": 71.4, "batch": 32,
    "bytes": 32_400_000, "peak_memory_bytes": 812_000_000, "parameters": 7_014_000, "predictions_equal": True,
    "largest_difference": 2.4e-7,
}  # fmt: skip
BOTH = {
    "production_latency_p50_ms": 36.9, "latency_ratio": 1.035, "production_bytes": 31_000_000, "size_ratio": 1.045
}  # fmt: skip


def content(**changes):
    measured = metrics.measure(PROBABILITIES, TRUTH, LABELS, KEYS)
    first = Content(
        model_name="dgmd_model",
        created="2026-01-02 03:04 UTC",
        source="s3://bucket/train",
        settings={"EPOCHS": 2, "BACKBONE_WEIGHTS": None},
        labels=LABELS,
        measured=measured,
        thumbnails={row.position: np.full((12, 16, 3), 90, np.uint8) for row in measured.mistakes[:1]},
        suspects=Suspects(SUSPECTS, 70, 6),
        suspect_thumbnails={0: np.full((12, 16, 3), 90, np.uint8)},
        leaks=Found([], 6),
        leak_thumbnails={},
        history=HISTORY,
        head={
            "chosen": {"kind": "hidden", "epochs": 3, "log_loss": 0.41, "accuracy": 0.87},
            "options": [
                {"kind": "linear", "shrinkage": 1.0, "strength": 0.01, "log_loss": 0.44, "accuracy": 0.85},
                {"kind": "hidden", "epochs": 3, "log_loss": 0.41, "accuracy": 0.87},
            ],
            "held_out": 1234,
        },
        counts=[ClassCounts(label, 9, 6, 5, 1) for label in LABELS],
        rejected=[Rejected(f"{EVIL}/{number}.jpg", EVIL, "unreadable", "broken") for number in range(60)],
        seconds=[("raw", 61.0), ("evaluation", 4.0)],
    )
    return first._replace(**changes)


OUTCOME = Outcome(
    gates=[Gate("accuracy", True, "at least 50.0 % asked, 66.7 % came"), Gate("production", None, "there is none")],
    comparison=None,
    comparison_missing="",
    assessment=None,
    assessment_missing="The assessment was switched off.",
)


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.html, self.tags, self.text = html, [], ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with all plots of `content`."""
    folder = tmp_path_factory.mktemp("report")
    report.draw(folder, content(), COMPARISON)
    return folder


@pytest.fixture
def page(drawn):
    """A report with changes in `content` and OUTCOME."""

    def render(**changes):
        outcome = OUTCOME._replace(**{name: changes.pop(name) for name in Outcome._fields if name in changes})
        report.write(drawn, content(**changes), outcome)
        return Page((drawn / "report.html").read_text(encoding="utf-8"))

    return render


def test_the_report_stands_alone_and_has_each_plot(page, drawn):
    page = page(comparison=COMPARISON, assessment=ASSESSMENT | BOTH)
    assert {path.name for path in drawn.iterdir()} == {
        "report.html", "class_counts.png", "confused_pairs.png", "confusion_matrix.png", "label_suspects.png",
        "learning_curves.png", "mistakes.png", "recall.png", "reliability.png", "step_seconds.png",
    }  # fmt: skip
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert links and all(link.startswith("data:image/") for link in links)
    assert "url(" not in page.html and "@import" not in page.html
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:")
    assert sum(attrs.get("class") == "plot" for _, attrs in page.tags) == 7
    for link in links:
        Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))).verify()
    plot = next(attrs for tag, attrs in page.tags if tag == "img")
    assert base64.b64decode(plot["src"].split(",")[1]) == (drawn / "recall.png").read_bytes()


def test_what_comes_from_outside_is_text(page):
    shown = page(comparison=COMPARISON, gates=[Gate("<i>gate</i>", True, "<u>text</u>")], settings={"X": "<em>"})
    assert "<script" not in shown.html
    assert not {"u", "em"} & {tag for tag, _ in shown.tags}
    for text in (EVIL, "<b>vanilla</b>", "<i>gate</i>", "<u>text</u>", "<em>", 'basil "sweet" & \ufffd'):
        assert text in shown.text


@pytest.mark.parametrize(
    ("passed", "words"),
    [
        ([True, True, None], "This version may be promoted Every condition that applies holds (2 of 2)."),
        ([True, False, None], "Do not promote this version Failed: gate 1 (1 of 2 conditions)."),
        ([None], "No condition decides"),
        ([], "No condition decides"),
    ],
)
def test_the_verdict_comes_first_and_says_which_conditions_fail(page, passed, words):
    shown = page(gates=[Gate(f"gate {number}", one, "text") for number, one in enumerate(passed)])
    assert words in shown.text
    assert shown.text.index(words) < shown.text.index("Compared with production")
    assert shown.text.count("✓ holds") == passed.count(True)
    assert shown.text.count("\N{EN DASH} does not apply") == passed.count(None)


def test_the_comparison_is_told_in_numbers_with_units(page):
    text = page(comparison=COMPARISON).text
    for words in (
        "same 1,180 validation pictures", "60 more were left out", "79.4 %", "78.1 %", "+1.3 points",
        "+62 / \N{MINUS SIGN}47", "\N{MINUS SIGN}0.4 to +3.0 percentage points", "probability of 18.3 %",
        "comparison on 1,180 images would find it significantly worse with a probability of 91 %",
        "A loss of 2.5 points would be found", "takes into account that only one of the two models is right on 9 %",
        "(\N{MINUS SIGN}25.0 points on 3 pictures)", "only this model knows: gone",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.01, 0.02, "may be chance"), (0.001, 0.02, "is better, and"), (-0.02, -0.001, "is worse, and")],
)
def test_the_interval_of_the_difference_says_who_is_better(page, low, high, words):
    shown = page(comparison=COMPARISON | {"low": low, "high": high, "p": 1e-5})
    assert words.replace("may be", "small enough to be") in shown.text
    assert "less than 0.1 %" in shown.text
    left, right = map(float, re.search(r"left: ([\d.]+)%; right: ([\d.]+)%", shown.html).groups())
    assert 0 < left < 100 - right < 100
    assert (left < 50 < 100 - right) == (low < 0 < high)


def test_of_few_pictures_the_words_are_those_of_the_condition(page):
    shown = page(comparison=COMPARISON | {"low": -0.08, "high": -0.01, "p": 0.125})
    assert "small enough to be chance" in shown.text


def test_how_it_behaves_in_operation_is_compared_where_both_were_measured(page):
    text = page(assessment=ASSESSMENT).text
    for words in ("38 ms", "56 ms", "71 images/s", "32.4 MB", "812.0 MB", "4.2 s", "7,014,000", "below 0.000001"):
        assert words in text
    assert "production: 37 ms" not in text
    text = page(assessment=ASSESSMENT | BOTH | {"predictions_equal": False, "largest_difference": 0.25}).text
    assert "production: 37 ms, this is 1.03 times that" in text
    assert (
        "does not give the same answers as the one that was measured (largest difference of a probability: 0.25)"
        in text
    )


def test_how_many_original_files_get_another_label_is_said(page):
    served = {"served_images": 100, "served_other_labels": 3, "served_largest_difference": 0.25}
    assert "names another label for" not in page(assessment=ASSESSMENT).text
    text = page(assessment=ASSESSMENT | served).text
    assert "names another label for 3 of 100 validation images" in text
    assert "a random sample" not in text  # the figures of this page are of fewer images
    assert "(largest difference of a probability: 0.25)" in text


def test_what_is_missing_is_said(page):
    text = page(history=HISTORY[:1], head=None, rejected=[], counts=[], seconds=[]).text
    for words in (
        "There is no production version to compare with.", "The assessment was switched off.", "One epoch only",
        "nothing is known about how well they are recognised: gone.", "No file was left out",
        "How many images each label has was not noted.", "How long the steps took was not noted.", "no picture",
    ):  # fmt: skip
        assert words in text


def test_without_a_comparison_the_report_assumes_what_loss_could_be_shown(page):
    text = page().text
    assert "comparison on 6 images would find it significantly worse with a probability of 0 %" in text
    assert "assumes that only one of the two models is right on 7 %" in text


def test_near_duplicates_are_shown_in_pairs_with_both_labels(page):
    leaks = [Leak(KEYS[0], "mint/9.jpg", 0.973, EVIL, "mint", 0, 4)] * 30
    pictures = {number: np.full((12, 16, 3), 5 * number, np.uint8) for number in report.pairs(Found(leaks, 6))}
    assert len(pictures) == 48
    measured = content().measured
    measured = measured._replace(overall=measured.overall | {"leaks": 30, "accuracy_without_leaks": 0.25})
    shown = page(leaks=Found(leaks, 6), leak_thumbnails=pictures, measured=measured)
    for words in ("30 of 6 validation images have", "is 25.0 % instead of 66.7 %", "similarity 0.973", "6 more pairs"):
        assert words in shown.text
    names = [attrs["alt"] for tag, attrs in shown.tags if tag == "img" and "training image" in attrs.get("alt", "")]
    assert names == ["training image mint/9.jpg"] * 24


def test_what_was_not_compared_is_said(page):
    assert "BACKBONE=cnn" in page(leaks=None).text
    assert "None were found: no pair of the 6 validation images" in page().text
    assert "too few training images" in page(leaks=Found([], 0)).text


def test_why_there_is_no_comparison_is_said(page):
    assert "All of them were trained on." in page(comparison_missing="All of them were trained on.").text


def test_without_mistakes_the_report_says_so(page, tmp_path):
    perfect = metrics.measure(np.eye(4)[TRUTH], TRUTH, LABELS, KEYS)
    assert "all validation pictures are recognised" in page(measured=perfect, thumbnails={}).text
    report.draw(tmp_path, content(measured=perfect, thumbnails={}), None)
    assert (tmp_path / "recall.png").exists() and not (tmp_path / "mistakes.png").exists()


def test_likely_wrong_labels_are_shown_with_both_labels_and_what_to_do(page):
    shown = page()
    text = shown.text.partition("Likely wrong labels")[2].partition("left out before balancing")[0]
    for words in (
        "Each of 6 training and validation images", "For 70 of them", f"given {EVIL} 1.2 % likely mint 87.5 %",
        f"{EVIL}/47.jpg", "corrections.csv", "has the first 60 of these images", "38 more",
    ):  # fmt: skip
        assert words in text
    assert f"{EVIL}/48.jpg" not in text


@pytest.mark.parametrize(
    ("suspects", "words"),
    [
        (None, "not looked for: with BACKBONE=cnn no features are stored"),
        (Suspects([], 0, 6), "None were found: for each of the 6 training and validation images"),
        (Suspects([], 0, 0), "cannot be looked for: fewer than two labels"),
    ],
)
def test_why_there_are_no_likely_wrong_labels_is_said(suspects, words, page, tmp_path):
    changes = {"suspects": suspects, "suspect_thumbnails": {}}
    assert words in page(**changes).text
    report.draw(tmp_path, content(**changes), None)
    assert not (tmp_path / "label_suspects.png").exists()


def test_of_what_was_left_out_there_are_counts_and_the_first_fifty(page):
    shown = page()
    assert "60 files were left out before balancing: 60 unreadable." in shown.text
    assert shown.text.count("broken") == 50
