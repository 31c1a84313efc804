import json
import os

import numpy as np
import pytest
from conftest import picture

from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import review
from dgmd_pipeline.evaluation.review import CandidateModel, Review
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import dataset, networks

LABELS = ["anise", "cloves", "mint"]


@pytest.fixture
def known(tmp_path):
    """The records of twelve pictures."""
    rows = []
    for index, label in enumerate(LABELS):
        (tmp_path / "raw" / label).mkdir(parents=True)
        for number in range(4):
            path = f"{label}/{number}.png"
            (tmp_path / "raw" / path).write_bytes(picture(label, number))
            rows.append(Example(path, label, index, f"{index}{number}" * 32, ""))
    (tmp_path / "records").mkdir()
    shards.write(rows, tmp_path / "raw", tmp_path / "records", "validation", 2, 16, 16, "stretch")
    return review.validation_images(tmp_path / "records", rows[::-1])


def naming(known, labels, wrong=()):
    """Probabilities of a model that is right but for some paths."""
    found = np.full((len(known.examples), len(labels)), 0.01, np.float32)
    for row, example in enumerate(known.examples):
        right = labels.index(example.label) if example.label in labels else 0
        found[row, (right + (example.path in wrong)) % len(labels)] = 0.9
    return found


def contender(known, labels=LABELS, wrong=(), trained_on=(), version=None):
    return CandidateModel(None, labels, frozenset(trained_on), version, naming(known, labels, wrong))


def test_pictures_come_in_the_order_of_the_records(known):
    assert [row.path for row in known.examples] == dataset.keys(known.records)
    truth = [int(index) for _, index in dataset.read(known.records).as_numpy_iterator()]
    assert [row.class_index for row in known.examples] == truth


def test_what_one_of_the_two_was_trained_on_is_left_out(known):
    wrong = ["anise/0.png", "mint/1.png"]
    seen = next(row.sha256 for row in known.examples if row.path == "anise/0.png")
    found = review.compare(contender(known, wrong=wrong), contender(known, trained_on=[seen], version=3), known)
    assert (found["version"], found["left_out"], found["images"]) == (3, 1, 11)
    assert (found["lost"], found["gained"]) == (1, 0)


def test_models_of_other_labels_are_compared_on_those_that_both_know(known):
    other = contender(known, labels=["mint", "pepper", "anise"], version=1)
    found = review.compare(contender(known), other, known)
    assert found["images"] == 8 and found["accuracy"] == found["production_accuracy"] == 1
    assert (found["labels_only_here"], found["labels_only_there"]) == (["cloves"], ["pepper"])


def test_where_no_picture_is_left_it_is_said(known):
    trained_on = [row.sha256 for row in known.examples]
    with pytest.raises(PipelineError, match="with version 3: of 12 validation images 12 were trained on"):
        review.compare(contender(known), contender(known, trained_on=trained_on, version=3), known)


def test_a_model_is_tried_even_where_it_cannot_be_compared(known, tmp_path):
    backbone = networks.build_cnn(16, 16)
    networks.assemble(backbone, networks.build_head(backbone.output_shape[-1], 3, 0.1), "stretch").save(
        tmp_path / "model.keras"
    )
    candidate = CandidateModel(tmp_path / "model.keras", LABELS, frozenset())
    trained_on = frozenset(row.sha256 for row in known.examples)
    production = CandidateModel(tmp_path / "model.keras", LABELS, trained_on, 4)
    found = review.review(candidate, production, known, tmp_path, os.environ)
    assert found.comparison is None and "with version 4" in found.missing
    assert found.assessment["predictions_equal"] and found.assessment["latency_ratio"] > 0
    (tmp_path / "other.keras").write_bytes(b"no model")
    unusable = CandidateModel(tmp_path / "other.keras", LABELS, frozenset(), 5)
    found = review.review(candidate, unusable, known, tmp_path, os.environ)
    assert found.comparison is None and "Version 5 cannot be used here" in found.missing
    assert found.assessment["predictions_equal"] and "latency_ratio" not in found.assessment
    wide = networks.build_cnn(16, 17)
    networks.assemble(wide, networks.build_head(wide.output_shape[-1], 3, 0.1), "stretch").save(tmp_path / "wide.keras")
    larger = CandidateModel(tmp_path / "wide.keras", LABELS, frozenset(), 6)
    found = review.review(candidate, larger, known, tmp_path, os.environ)
    assert found.comparison is None and "Version 6 cannot be used here: It reads images of 17 x 16" in found.missing
    (tmp_path / "model.keras").write_bytes(b"no model")
    broken = review.review(contender(known)._replace(path=tmp_path / "model.keras"), None, known, tmp_path, os.environ)
    assert broken.assessment is None and "could not use the model" in broken.untried
    assert (broken.comparison, broken.missing) == (None, "")


@pytest.mark.parametrize(
    "size, fit, refused",
    [
        ((16, 16), "stretch", False),
        ((8, 12), "stretch", False),  # stretching twice is stretching
        ((16, 16), "crop", True),
        ((16, 16), "letterbox", True),
        ((17, 16), "stretch", True),
    ],
)
def test_a_model_is_only_judged_by_records_that_hold_what_it_would_make_of_the_originals(size, fit, refused, known):
    if refused:
        with pytest.raises(PipelineError, match=f"IMAGE_WIDTH={size[1]} IMAGE_HEIGHT={size[0]} IMAGE_FIT={fit}"):
            review._check_comparable(size, fit, known.records)
    else:
        review._check_comparable(size, fit, known.records)


@pytest.mark.parametrize("size, refused", [((8, 8), False), ((8, 12), True)])
def test_what_was_cropped_may_be_made_smaller_but_not_cropped_again(size, refused, known, tmp_path):
    (tmp_path / "cropped").mkdir()
    shards.write(known.examples[:2], tmp_path / "raw", tmp_path / "cropped", "validation", 1, 16, 16, "crop")
    if refused:
        with pytest.raises(PipelineError, match="hold 16 x 16 with IMAGE_FIT=crop"):
            review._check_comparable(size, "crop", tmp_path / "cropped")
    else:
        review._check_comparable(size, "crop", tmp_path / "cropped")


@pytest.mark.parametrize(
    "found",
    [
        Review({"version": 1, "difference": 0.1}, "", {"bytes": 5}, ""),
        Review(None, "Nothing left.", None, "It died."),
        Review(None, "", {"bytes": 5}, ""),
    ],
)
def test_what_is_written_is_read_again(found, tmp_path):
    review.write(found, tmp_path)
    assert review.read(tmp_path) == found
    assert json.loads((tmp_path / review.COMPARISON).read_text())
