import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import picture
from support.predictions import compare_flags

from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import review, serving_benchmark
from dgmd_pipeline.evaluation.review import CandidateModel, Review, StoredFeatures
from dgmd_pipeline.evaluation.serving_benchmark import ProductionBenchmark, ServedPredictions, ServingBenchmark
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import dataset, networks

LABELS = ["anise", "cloves", "mint"]
BENCHMARK = ServingBenchmark(
    load_seconds=1.5, latency_p50_ms=20.5, latency_p95_ms=30, images_per_second=50, batch=32, bytes=10**6,
    peak_memory_bytes=10**9, parameters=1000, predictions_equal=True, largest_difference=1e-6,
)  # fmt: skip
COMPARISON = replace(compare_flags([True, False], [True, True]), run="abc", left_out=1)


@pytest.fixture
def images(tmp_path):
    """The records of twelve images."""
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


def probabilities(images, labels, wrong=()):
    """Probabilities of a model that is right except for some paths."""
    found = np.full((len(images.examples), len(labels)), 0.01, np.float32)
    for row, example in enumerate(images.examples):
        right = labels.index(example.label) if example.label in labels else 0
        found[row, (right + (example.path in wrong)) % len(labels)] = 0.9
    return found


def model(images, labels=LABELS, wrong=(), trained_on=(), version=None):
    answers = review.answers([probabilities(images, labels, wrong)])
    return CandidateModel(None, labels, frozenset(trained_on), frozenset(labels), version, answers)


def test_images_are_in_the_order_of_their_records(images):
    assert [row.path for row in images.examples] == dataset.keys(images.records)
    truth = [int(index) for _, index in dataset.read(images.records).as_numpy_iterator()]
    assert [row.class_index for row in images.examples] == truth


def test_images_that_one_of_the_models_was_trained_on_are_left_out(images):
    wrong = ["anise/0.png", "mint/1.png"]
    seen = next(row.sha256 for row in images.examples if row.path == "anise/0.png")
    found = review.compare(model(images, wrong=wrong), model(images, trained_on=[seen], version=3), images)
    assert (found.version, found.left_out, found.images) == (3, 1, 11)
    assert (found.lost, found.gained) == (1, 0)


def test_models_with_other_labels_are_compared_on_the_labels_that_both_models_have(images):
    other = model(images, labels=["mint", "pepper", "anise"], version=1)
    found = review.compare(model(images), other, images)
    assert found.images == 8 and found.accuracy == found.production_accuracy == 1
    assert (found.labels_only_candidate, found.labels_only_production) == (["cloves"], ["pepper"])


def test_a_label_without_training_images_is_lost_or_emptied_unless_it_was_before(images):
    candidate = model(images, labels=["anise", "cloves", "mint", "sage"])
    candidate = candidate._replace(trained_labels=frozenset(["anise", "mint"]))
    found = review.label_changes(candidate, frozenset(["anise", "cloves", "pepper"]))
    assert found == review.LabelChanges(lost=["pepper"], emptied=["cloves"], new=["mint"])


def test_a_comparison_without_images_is_refused(images):
    trained_on = [row.sha256 for row in images.examples]
    message = "with version 3, because .* were trained on 12 of 12 validation images"
    with pytest.raises(PipelineError, match=message):
        review.compare(model(images), model(images, trained_on=trained_on, version=3), images)


def test_only_the_head_runs_where_the_stored_features_are_those_of_its_network(models, images):
    network = networks.load(models / "model.keras")
    backbone, production = (
        network.get_layer("backbone"),
        model(images)._replace(path=models / "model.keras", answers=None),
    )
    vectors = np.random.default_rng(0).random((12, backbone.output_shape[-1]), np.float32)  # not of these images
    of_head = network.get_layer("head").predict(vectors, verbose=0)
    of_images = review.predict(production, images).first
    assert np.array_equal(
        review.predict(production, images._replace(features=StoredFeatures(vectors, backbone))).first, of_head
    )
    backbone.trainable_weights[0].assign_add(np.ones(backbone.trainable_weights[0].shape))
    other = images._replace(features=StoredFeatures(vectors, backbone))
    assert np.array_equal(review.predict(production, other).first, of_images)


def test_a_production_version_may_have_another_structure(models, images, tmp_path):
    import keras

    network = networks.load(models / "model.keras")
    probabilities = keras.layers.Rescaling(1.0)(network.output)
    keras.Model(network.input, probabilities).save(tmp_path / "other.keras")
    production = model(images)._replace(path=tmp_path / "other.keras", answers=None)
    features = StoredFeatures(np.zeros((12, 1), np.float32), network.get_layer("backbone"))
    answers = review.predict(production, images._replace(features=features))
    assert np.array_equal(answers.predicted, review.predict(production, images).predicted)


@pytest.fixture
def process():
    """The process of a serving benchmark."""
    with serving_benchmark.start_process() as process:
        yield process


@pytest.fixture
def ended():
    """A process that ends at once: for tests of the comparison, which needs no benchmark."""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with serving_benchmark.Process([sys.executable, "-c", ""], **pipes) as process:
        process.wait()
        yield process


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a usable model, one that reads larger images than the records hold, and one that is no model."""
    folder = tmp_path_factory.mktemp("models")
    for name, width in (("model", 16), ("wide", 17)):
        backbone = networks.build_cnn(16, width)
        head = networks.build_head(backbone.output_shape[-1], 3, 0.1)
        networks.assemble(backbone, head, "stretch").save(folder / f"{name}.keras")
    (folder / "broken.keras").write_bytes(b"no model")
    return folder


def reviewed(candidate, production, images, tmp_path, process, best=None, **options):
    return review.review(candidate, review.Rivals(production, best), images, tmp_path, process, **options)


def test_a_candidate_is_compared_and_benchmarked_beside_production(models, images, process, tmp_path):
    candidate = CandidateModel(models / "model.keras", LABELS, frozenset(), frozenset(LABELS))
    best = model(images, version=2)  # it has no file, because only production is timed
    seen = []
    known = images._replace(raw=tmp_path / "raw")
    found = reviewed(candidate, candidate._replace(version=4), known, tmp_path, process, best, meanwhile=seen.append)
    assert (found.comparison.version, found.comparison_error, found.comparison.difference) == (4, "", 0)
    assert seen == [found.comparison]
    assert found.best.version == 2
    assert found.benchmark_error == ""
    benchmark = found.serving_benchmark
    assert (benchmark.batch, benchmark.predictions_equal) == (12, True)
    assert benchmark.production.size_ratio == 1
    assert (benchmark.served.images, benchmark.served.other_labels) == (12, 0)


def test_a_model_that_cannot_be_compared_is_benchmarked_beside_production(models, images, process, tmp_path):
    candidate = CandidateModel(models / "model.keras", LABELS, frozenset(), frozenset(LABELS))
    trained_on = frozenset(row.sha256 for row in images.examples)
    found = reviewed(candidate, candidate._replace(trained_on=trained_on, version=4), images, tmp_path, process)
    assert found.comparison is None and "with version 4" in found.comparison_error
    assert found.serving_benchmark.production.size_ratio == 1
    assert found.serving_benchmark.served is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"Version 5 is damaged in the registry \(broken.keras: .*[^.]\)[.] Train a new version"),
        ("wide", "Version 5 cannot be used: The model expects images of 17 x 16"),
    ],
)
def test_an_unusable_production_is_neither_compared_nor_timed(name, message, models, images, process, tmp_path):
    candidate = model(images)._replace(path=models / "model.keras")
    production = CandidateModel(models / f"{name}.keras", LABELS, frozenset(), frozenset(LABELS), 5)
    found = reviewed(candidate, production, images, tmp_path, process)
    assert found.comparison is None and re.match(message, found.comparison_error)
    assert found.serving_benchmark is not None and found.serving_benchmark.production is None


def test_a_candidate_that_cannot_be_used_has_a_benchmark_error(models, images, process, tmp_path):
    found = reviewed(model(images)._replace(path=models / "broken.keras"), None, images, tmp_path, process)
    assert found == Review(None, "", None, found.benchmark_error)
    assert "The model could not be used in a clean process" in found.benchmark_error


def test_a_candidate_is_also_compared_with_the_best_former_version(models, images, ended, tmp_path):
    candidate = model(images, wrong=["mint/0.png"])._replace(path=models / "model.keras")
    production = model(images, wrong=["mint/1.png"], version=4)._replace(path=models / "model.keras")
    best = model(images, version=2)
    found = reviewed(candidate, production, images, tmp_path, ended, best)
    assert (found.comparison.version, found.comparison.difference) == (4, 0)
    assert (found.best.version, found.best.images, found.best.lost) == (2, 12, 1)


def test_a_best_former_version_that_cannot_be_used_is_logged(models, images, ended, tmp_path, caplog):
    candidate = model(images)._replace(path=models / "model.keras")
    unusable = model(images, version=2)._replace(path=models / "broken.keras", answers=None)
    assert reviewed(candidate, None, images, tmp_path, ended, unusable).best is None
    assert "No comparison with the best former production version: Version 2 is damaged in the registry" in caplog.text


def test_the_labels_are_compared_even_if_no_image_can_be(models, images, ended, tmp_path):
    candidate = model(images)._replace(path=models / "model.keras", trained_labels=frozenset(LABELS[1:]))
    production = CandidateModel(models / "broken.keras", LABELS, frozenset(), frozenset(LABELS[:2]), 5)
    found = reviewed(candidate, production, images, tmp_path, ended)
    assert found.comparison is None and found.comparison_error
    assert found.label_changes == review.LabelChanges([], ["anise"], ["mint"])


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
def test_a_model_is_only_compared_on_records_that_hold_the_pixels_it_would_see(size, fit, refused, images):
    if refused:
        with pytest.raises(PipelineError, match=f"IMAGE_WIDTH={size[1]} IMAGE_HEIGHT={size[0]} IMAGE_FIT={fit}"):
            review._check_comparable(size, fit, images.records)
    else:
        review._check_comparable(size, fit, images.records)


@pytest.mark.parametrize("size, refused", [((8, 8), False), ((8, 12), True)])
def test_cropped_records_may_be_resized_but_not_cropped_again(size, refused, images, tmp_path):
    (tmp_path / "cropped").mkdir()
    shards.write(images.examples[:2], tmp_path / "raw", tmp_path / "cropped", "validation", 1, 16, 16, "crop")
    if refused:
        with pytest.raises(PipelineError, match="have 16 x 16 pixels with IMAGE_FIT=crop"):
            review._check_comparable(size, "crop", tmp_path / "cropped")
    else:
        review._check_comparable(size, "crop", tmp_path / "cropped")


@pytest.mark.parametrize(
    "found",
    [
        Review(COMPARISON, "", BENCHMARK, ""),
        Review(COMPARISON, "", BENCHMARK, "", best=replace(COMPARISON, version=2)),
        Review(None, "No images are left.", None, "It died."),
        Review(None, "", replace(BENCHMARK, production=ProductionBenchmark(20.5, 1, 10, 0.5)), ""),
        Review(None, "", replace(BENCHMARK, served=ServedPredictions(7, 2, 0.5)), ""),
    ],
)
def test_a_written_review_is_read_again(found, tmp_path):
    review.write(found, tmp_path)
    assert review.read(tmp_path) == found
    assert json.loads((tmp_path / review.COMPARISON).read_text())


def test_an_edited_review_is_refused(tmp_path):
    review.write(Review(COMPARISON, "", BENCHMARK, ""), tmp_path)
    (tmp_path / review.SERVING_BENCHMARK).write_text('{"bytes": 5}')
    with pytest.raises(PipelineError, match="assessment.json: .* It was changed after it was written"):
        review.read(tmp_path)
