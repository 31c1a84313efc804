import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dgmd_pipeline.evaluation import metrics, plots, report
from dgmd_pipeline.evaluation.comparison import ClassComparison, Comparison, Detection
from dgmd_pipeline.evaluation.gates import Decision, Gate
from dgmd_pipeline.evaluation.label_suspects import SUSPECT, LabelSuspects
from dgmd_pipeline.evaluation.leaks import Leak, Leaks
from dgmd_pipeline.evaluation.metrics import Misclassification
from dgmd_pipeline.evaluation.plots import ClassCounts
from dgmd_pipeline.evaluation.predictions import Predictions
from dgmd_pipeline.evaluation.report import Content
from dgmd_pipeline.evaluation.review import Review
from dgmd_pipeline.evaluation.serving_benchmark import ProductionBenchmark, ServedPredictions, ServingBenchmark
from dgmd_pipeline.evaluation.versions_so_far import VersionSummary
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
COMPARISON = Comparison(
    version=7,
    run="",
    left_out=60,
    images=1180,
    accuracy=0.794,
    production_accuracy=0.781,
    difference=0.013,
    low=-0.004,
    high=0.03,
    gained=62,
    lost=47,
    p=0.183,
    detection=Detection(disagreement=0.092, assumed=False, loss=0.03, probability=0.912, detectable_loss=0.025),
    classes=[
        ClassComparison(EVIL, images=3, recall=0.5, production_recall=0.75, gained=0, lost=1),
        ClassComparison("mint", images=1, recall=1.0, production_recall=1.0, gained=0, lost=0),
    ],
    labels_only_candidate=["gone"],
    labels_only_production=["<b>vanilla</b>"],
)
BENCHMARK = ServingBenchmark(
    load_seconds=4.23,
    latency_p50_ms=38.2,
    latency_p95_ms=55.7,
    images_per_second=71.4,
    batch=32,
    bytes=32_400_000,
    peak_memory_bytes=812_000_000,
    parameters=7_014_000,
    predictions_equal=True,
    largest_difference=2.4e-7,
)
PRODUCTION = ProductionBenchmark(36.9, 1.035, 31_000_000, 1.045)
REVIEW = Review(None, "", None, "The benchmark was switched off.")
GATES = [Gate("accuracy", True, "at least 50.0 %, found 66.7 %"), Gate("production", None, "there is none")]


def content(**changes):
    measured = metrics.measure(Predictions(PROBABILITIES, TRUTH, LABELS, KEYS))
    first = Content(
        model_name="dgmd_model",
        created="2026-01-02T03:04:05+00:00",
        source="s3://bucket/train",
        settings={"EPOCHS": 2, "BACKBONE_WEIGHTS": None},
        labels=LABELS,
        measured=measured,
        thumbnails={row.position: np.full((12, 16, 3), 90, np.uint8) for row in measured.misclassifications[:1]},
        suspects=LabelSuspects(SUSPECTS, 70, 6),
        suspect_thumbnails={0: np.full((12, 16, 3), 90, np.uint8)},
        leaks=Leaks([], 6),
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


def section(page, name):
    """Return the text of a section."""
    return Page(page.html.partition(f'<section id="{name}">')[2].partition("</section>")[0]).text


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with all plots of `content`."""
    folder = tmp_path_factory.mktemp("report")
    report.draw(folder, content(), COMPARISON)
    return folder


@pytest.fixture
def drawn_names(tmp_path, monkeypatch):
    """Return the names of the files that `draw` writes for changes in `content`; their plots stay empty."""
    monkeypatch.setattr(plots.Plot, "png", lambda plot: b"")

    def names(**changes):
        report.draw(tmp_path, content(**changes), None)
        return {path.stem for path in tmp_path.iterdir()}

    return names


@pytest.fixture
def page(drawn):
    """A report with changes in `content`, REVIEW and GATES."""

    def render(gates=GATES, verdict="better", drift="", **changes):
        review = REVIEW._replace(**{name: changes.pop(name) for name in Review._fields if name in changes})
        report.write(
            drawn,
            content(**changes),
            review,
            Decision(verdict, "the finding", "The headline", "The reason.", gates, drift),
        )
        return Page((drawn / "report.html").read_text(encoding="utf-8"))

    return render


def test_the_report_is_self_contained_and_each_plot_is_a_file(page, drawn):
    page = page(comparison=COMPARISON, serving_benchmark=replace(BENCHMARK, production=PRODUCTION))
    assert {path.name for path in drawn.iterdir()} == {
        "report.html", "class_counts.png", "confused_pairs.png", "confusion_matrix.png", "label_suspects.png",
        "learning_curves.png", "mistakes.png", "recall.png", "reliability.png", "step_seconds.png",
    }  # fmt: skip
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert links and all(link.startswith("data:image/jpeg;") for link in links)
    assert "url(" not in page.html and "@import" not in page.html
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for link in links:
        Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))).verify()


def test_labels_in_any_script_are_text_that_does_not_reorder_what_follows(page):
    odd = ["\u756a\u7d05\u82b1", "\u0634\u0627\u064a", "\u0e43\u0e1a", "\U0001f33f mint"]
    measured = metrics.measure(Predictions(PROBABILITIES, TRUTH, odd, KEYS))
    compared = replace(COMPARISON, classes=[ClassComparison(odd[1], 3, 0.5, 0.75, 0, 1)])
    shown = page(labels=odd, measured=measured, comparison=compared, counts=[ClassCounts(odd[2], 9, 6, 5, 1)])
    arrow = f"<bdi>{odd[0]}</bdi> \N{RIGHTWARDS ARROW} <bdi>{odd[1]}</bdi>"
    assert arrow in shown.html
    for name, label in (("compared", odd[1]), ("labels", odd[0]), ("labels", odd[3]), ("data", odd[2])):
        assert label in section(shown, name)
    outside = re.sub(r"<bdi.*?</bdi>|<th title=.*?>|alt=.*?>", "", shown.html)
    assert not [label for label in odd if label in outside]


def many_labels(count):
    """Measurements of `count` labels with two images each: 60 are never recognised, 60 half, the others always."""
    labels = [f"label {number:04}" for number in range(count)]
    truth = np.repeat(np.arange(count), 2)
    predicted = truth.copy()
    predicted[:120] = (truth[:120] + 1) % count
    predicted[120:240:2] += 1
    probabilities = np.zeros((len(truth), count), np.float32)
    probabilities[np.arange(len(truth)), predicted] = 1
    return labels, metrics.measure(Predictions(probabilities, truth, labels, [f"{number}.jpg" for number in truth]))


@pytest.mark.parametrize("count", [200, 1000])
def test_of_many_labels_the_page_shows_those_that_matter_and_a_table_without_a_script(count, page):
    labels, measured = many_labels(count)
    rows = [ClassComparison(label, 2, 0.5, 0.5 + number % 3 / 4, 0, 0) for number, label in enumerate(labels)]
    shown = page(
        labels=labels, measured=measured, comparison=replace(COMPARISON, classes=rows),
        counts=[ClassCounts(label, 9, 6, 5, 1) for label in labels],
    )  # fmt: skip
    text = section(shown, "labels")
    assert "60 labels are never recognised: label 0000" in text and "and 30 more" in text
    assert f"Not shown: 40 labels with a higher recall and {count - 120} labels with a recall of 100 %." in text
    matrix = shown.html.partition('<table class="matrix">')[2].partition("</table>")[0]
    assert matrix.count("<tr>") == 11 and matrix.count("<td") == 110
    outside = re.sub(r"<table(?! class=.matrix).*?</table>", "", shown.html, flags=re.DOTALL)
    assert outside.count("<li>") < 250
    table = shown.html.partition('<div class="labels">')[2].partition("</table>")[0]
    assert table.count("<tr") == count + 1
    assert set(re.findall(r'value="(\w+)"', table)) == {
        "recall", "label", "images", "change", "all", "errors", "few", "worse",
    }  # fmt: skip
    assert len(shown.html) < 1000 * count


def test_the_versions_so_far_end_with_this_one(page):
    assert "Versions so far" not in page().text
    earlier = [
        VersionSummary(7, 1.7e9, 0.5, None, None, None),
        VersionSummary(9, 1.75e9, 0.625, 1200, 3, 2),
    ]
    shown = page(versions=earlier)
    assert "2 January 2026, 03:04 UTC. The last registered version is 9." in shown.text
    text = section(shown, "versions")
    rows = re.findall(r"<tr><td>(.*?)</tr>", shown.html.partition('<section id="versions">')[2], re.DOTALL)
    assert [re.sub("<.*?>", "|", row).split("|")[0] for row in rows] == ["this one", "9", "7"]
    for words in ("62.5 %", "1,200", "15 June 2025, 15:06 UTC", "Accuracy", "Training images", "Rejected files"):
        assert words in text


def test_the_contents_lead_to_all_sections(page):
    shown = page(versions=[VersionSummary(7, 1.7e9, 0.5, None, None, None)])
    targets = [attrs["for"] for tag, attrs in shown.tags if tag == "label" and "for" in attrs]
    assert targets == [attrs["id"] for tag, attrs in shown.tags if attrs.get("class") == "place"]
    assert targets == [f"to-{attrs['id']}" for tag, attrs in shown.tags if tag == "section"]


def test_labels_file_names_and_settings_are_escaped(page):
    shown = page(comparison=COMPARISON, gates=[Gate("<i>gate</i>", True, "<u>text</u>")], settings={"X": "<em>"})
    assert "<script" not in shown.html
    assert not {"u", "em"} & {tag for tag, _ in shown.tags}
    for text in (EVIL, "<b>vanilla</b>", "<i>gate</i>", "<u>text</u>", "<em>", 'basil "sweet" & \ufffd'):
        assert text in shown.text


@pytest.mark.parametrize(
    ("verdict", "passed", "mark"),
    [
        ("better", [True, True, None], "yes ✓"),
        ("better", [False, True, None], "no ✗"),
        ("no difference", [True, True], "open ="),
        ("worse", [False, True], "no ✗"),
        ("first", [None, None], "open ?"),
        ("first", [], "open ?"),
    ],
)
def test_the_verdict_comes_first_and_is_green_only_for_a_better_version(page, verdict, passed, mark):
    gates = [Gate(f"gate {number}", one, f"text {number}") for number, one in enumerate(passed)]
    shown = page(gates=gates, verdict=verdict, comparison=None if verdict == "first" else COMPARISON)
    (classes,) = (attrs["class"] for tag, attrs in shown.tags if attrs.get("class", "").startswith("verdict"))
    sign = shown.text[shown.text.index(" The headline The reason.") - 1]
    assert f"{classes} {sign}" == f"verdict {mark}"
    assert shown.text.index("The headline") < shown.text.index("Compared with production")
    assert shown.text.count("✓ holds") == passed.count(True)
    assert shown.text.count("\N{EN DASH} does not apply") == passed.count(None)


def test_a_drift_is_shown_below_the_verdict(page):
    shown = page(drift="Version 3 was better.").text
    assert shown.index("The reason.") < shown.index("Version 3 was better.") < shown.index("accuracy: at least")


def test_a_reason_why_several_conditions_do_not_apply_is_shown_once(page):
    shown = page(gates=[Gate(name, None, "There is no production version.") for name in ("accuracy", "latency")])
    assert shown.text.count("accuracy, latency: There is no production version.") == 1


def test_the_comparison_is_shown_in_numbers_with_units(page):
    text = page(comparison=COMPARISON).text
    for words in (
        "same 1,180 validation images", "60 more images were left out", "79.4 %", "78.1 %", "+1.3 points",
        "+62 / -47", "-0.4 to +3.0 percentage points", "at least as much as here is 18.3 %",
        "A comparison on 1,180 images would show with a probability of 91 % that this model is significantly worse.",
        "with a probability of 80 % is 2.5 points", "exactly one of the two models is right on 9 %",
        "the observed disagreement", "-25.0 points (75 % \N{RIGHTWARDS ARROW} 50 % of 3)",
        "only this model knows: gone",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.01, 0.02, "may be chance"), (0.001, 0.02, "is better, and"), (-0.02, -0.001, "is worse, and")],
)
def test_the_interval_of_the_difference_shows_which_model_is_better(page, low, high, words):
    shown = page(comparison=replace(COMPARISON, low=low, high=high, p=1e-5))
    assert words.replace("may be", "small enough to be") in shown.text
    assert "less than 0.1 %" in shown.text
    left, right = map(float, re.search(r"left: ([\d.]+)%; right: ([\d.]+)%", shown.html).groups())
    assert 0 < left < 100 - right < 100
    assert (left < 50 < 100 - right) == (low < 0 < high)


def test_with_few_images_the_words_agree_with_the_gate(page):
    shown = page(comparison=replace(COMPARISON, low=-0.08, high=-0.01, p=0.125))
    assert "small enough to be chance" in shown.text


def test_the_serving_benchmark_is_shown_beside_production_if_both_were_measured(page):
    text = page(serving_benchmark=BENCHMARK).text
    for words in ("38 ms", "56 ms", "71 images/s", "32.4 MB", "812.0 MB", "4.2 s", "7,014,000", "below 0.000001"):
        assert words in text
    assert "production: 37 ms" not in text
    other = replace(BENCHMARK, predictions_equal=False, largest_difference=0.25, production=PRODUCTION)
    text = page(serving_benchmark=other).text
    assert "production: 37 ms; this model takes 1.03 times as long" in text
    assert "production: 31.0 MB; this model is 1.04 times as large" in text
    assert (
        "does not make the same predictions as the model that was measured (largest difference of a probability: 0.25)"
        in text
    )


def test_the_report_counts_the_original_files_with_another_predicted_label(page):
    served = ServedPredictions(100, 3, 0.25)
    assert "predicts another label for" not in page(serving_benchmark=BENCHMARK).text
    text = page(serving_benchmark=replace(BENCHMARK, served=served)).text
    assert "predicts another label for 3 of 100 validation images" in text
    assert "a random sample" not in text  # the figures of this page are of fewer images
    assert "(largest difference of a probability: 0.25)" in text


def test_the_report_says_what_is_missing(page):
    text = page(history=HISTORY[:1], head=None, rejected=[], counts=[], seconds=[]).text
    for words in (
        "There is no production version to compare with.", "The benchmark was switched off.", "took one epoch",
        "have no validation images and were not measured: gone.", "No file was rejected",
        "numbers of images of each label were not recorded", "times of the steps were not recorded",
        "image not readable",
    ):  # fmt: skip
        assert words in text


def test_without_a_comparison_the_detectable_loss_is_based_on_an_assumption(page):
    text = page().text
    assert "A comparison on 6 images would show with a probability of 0 % that this model is significantly" in text
    assert "assume that exactly one of the two models is right on 7 %" in text


def test_near_duplicates_are_shown_in_pairs_with_both_labels(page):
    leaks = [Leak(KEYS[0], "mint/9.jpg", 0.973, EVIL, "mint", 0, 4)] * 30
    thumbnails = {number: np.full((12, 16, 3), 5 * number, np.uint8) for number in report.leak_keys(Leaks(leaks, 6))}
    assert len(thumbnails) == 48
    measured = content().measured
    measured = measured._replace(overall=measured.overall | {"leaks": 30, "accuracy_without_leaks": 0.25})
    shown = page(leaks=Leaks(leaks, 6), leak_thumbnails=thumbnails, measured=measured)
    for words in ("30 of 6 validation images have", "is 25.0 % instead of 66.7 %", "similarity 0.973", "6 more pairs"):
        assert words in shown.text
    names = [attrs["alt"] for tag, attrs in shown.tags if tag == "img" and "training image" in attrs.get("alt", "")]
    assert names == ["training image mint/9.jpg"] * 24


def test_the_report_says_why_there_are_no_near_duplicates(page):
    assert "BACKBONE=cnn" in page(leaks=None).text
    assert "None found: none of the 6 validation images" in page().text
    assert "too few training images" in page(leaks=Leaks([], 0)).text


def test_the_report_says_why_there_is_no_comparison(page):
    assert "All of them were trained on." in page(comparison_error="All of them were trained on.").text


def test_a_perfect_model_has_no_contact_sheet(page, drawn_names):
    perfect = metrics.measure(Predictions(np.eye(4)[TRUTH], TRUTH, LABELS, KEYS))
    changes = {"measured": perfect, "thumbnails": {}}
    assert "predicts the correct label for every validation image" in page(**changes).text
    names = drawn_names(**changes)
    assert "recall" in names and "mistakes" not in names


def test_likely_wrong_labels_are_shown_with_both_labels_and_what_to_do(page):
    shown = page()
    text = section(shown, "suspects")
    for words in (
        "each of 6 training and validation images", "For 70 of them", f"given {EVIL} 1.2 % likely mint 87.5 %",
        f"{EVIL}/47.jpg", "corrections.csv", "lists the first 60 of these images", "38 more",
    ):  # fmt: skip
        assert words in text
    assert f"{EVIL}/48.jpg" not in text


@pytest.mark.parametrize(
    ("suspects", "words"),
    [
        (None, "Not checked: BACKBONE=cnn stores no features"),
        (LabelSuspects([], 0, 6), "None found: for each of the 6 training and validation images"),
        (LabelSuspects([], 0, 0), "Not checked: at least two labels"),
    ],
)
def test_the_report_says_why_there_are_no_likely_wrong_labels(suspects, words, page, drawn_names):
    changes = {"suspects": suspects, "suspect_thumbnails": {}}
    assert words in section(page(**changes), "suspects")
    names = drawn_names(**changes)
    assert "recall" in names and "label_suspects" not in names


def test_rejected_files_are_counted_and_the_first_fifty_listed(page):
    shown = page()
    assert "60 files were rejected before balancing: 60 unreadable." in shown.text
    assert shown.text.count("broken") == 50
