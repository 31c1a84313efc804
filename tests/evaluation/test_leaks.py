import csv

import numpy as np
import pytest

from dgmd_pipeline.evaluation import leaks
from dgmd_pipeline.evaluation.leaks import Leak, Leaks

DIMENSIONS = 64


def found(training, validation):
    names = [
        [f"{split}/{number}.jpg" for number in range(len(rows))] for split, rows in (("t", training), ("v", validation))
    ]
    labels = [["mint"] * len(training), ["anise"] * len(validation)]
    return leaks.find(training.astype(np.float32), validation.astype(np.float32), names, labels)


def images(count, seed, similar=0.0):
    """Features of distinct images whose pairwise cosine is about `similar` squared."""
    random = np.random.default_rng(seed)
    own = random.normal(size=(count, DIMENSIONS))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    common = np.ones(DIMENSIONS) / DIMENSIONS**0.5
    return similar * common + (1 - similar**2) ** 0.5 * own


def changed(features, by, seed=1):
    """Features of changed versions of the images, at `by` of the distance between two images."""
    other = images(len(features), seed)
    return features + by * other


@pytest.mark.parametrize("similar", [0.0, 0.7, 0.99])
def test_near_duplicates_are_found_in_data_sets_of_any_similarity(similar):
    training, validation = images(400, 0, similar), images(100, 2, similar)
    scale = (1 - similar**2) ** 0.5
    for copies in (1, 4):  # in training
        for number in range(copies):
            training[10 * number + np.arange(10)] = changed(validation[:10], 0.3 * scale, number)
        result = found(training, validation)
        assert sorted(leak.position for leak in result.pairs) == list(range(10))
        assert all(leak.training_position % 10 == leak.position for leak in result.pairs)
        assert result.compared == 100


@pytest.mark.parametrize("similar", [0.0, 0.9, 0.999])
def test_look_alike_images_are_not_reported_though_their_similarity_is_high(similar):
    training, validation = images(2000, 0, similar), images(500, 2, similar)
    assert found(training, validation).pairs == []
    assert (training @ validation.T).max() > similar**2


def test_a_few_nearest_neighbours_in_a_dense_group_are_not_reported():
    """Cells of one module are more similar than cells of two; no single pair stands out."""
    training, validation = images(400, 0), images(100, 2)
    training[:40] = changed(np.repeat(images(1, 5), 40, 0), 0.2, 6)
    validation[:10] = changed(np.repeat(images(1, 5), 10, 0), 0.2, 7)
    assert found(training, validation).pairs == []


def test_leaks_are_found_where_every_validation_image_leaks():
    validation = images(50, 0)
    training = np.concatenate([changed(validation, 0.3, number) for number in range(3)])
    assert len(found(training, validation).pairs) == 50


def test_blocks_change_nothing_and_a_sample_only_which_images_are_compared(monkeypatch):
    training, validation = images(90, 0), images(40, 2)
    training[50:60] = changed(validation[:10], 0.2)
    whole = found(training, validation)
    monkeypatch.setattr(leaks, "BLOCK", 7)
    by_blocks = found(training, validation)
    assert [leak[:2] for leak in by_blocks.pairs] == [leak[:2] for leak in whole.pairs]
    assert len(whole.pairs) == 10
    monkeypatch.setattr(leaks, "MAX_PAIRS", 90 * 20)
    sample = found(training, validation)
    assert sample.compared == 20
    assert {leak.position for leak in sample.pairs} == {0, 2, 4, 6, 8}


def test_the_most_similar_pair_comes_first_and_the_similarity_is_the_cosine():
    training, validation = images(100, 0), images(20, 2)
    training[7], training[3] = 5 * validation[4], changed(validation[9:10], 0.2)[0]
    first, second = found(training, validation).pairs
    assert (first.key, first.training_key, first.label, first.training_label) == ("v/4.jpg", "t/7.jpg", "anise", "mint")
    assert first.similarity == pytest.approx(1, abs=1e-5)
    cosine = training[3] @ validation[9] / np.linalg.norm(training[3]) / np.linalg.norm(validation[9])
    assert second.similarity == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(("training", "validation"), [(4, 5), (100, 0)])
def test_too_few_images_are_not_compared(training, validation):
    assert found(images(training, 0), images(validation, 2)) == Leaks([], 0)


def test_identical_or_zero_features_are_no_leaks():
    vector = np.random.default_rng(0).normal(size=DIMENSIONS).astype(np.float32)
    for value in (0, 1, vector):
        same = np.full((20, DIMENSIONS), value)
        assert found(same, same).pairs == []


def test_a_name_that_looks_like_a_formula_is_text_in_the_table(tmp_path):
    leak = Leak("=evil/1.jpg", "mint/2.jpg", 0.98, "=evil", "mint", 0, 1)
    leaks.write(Leaks([leak], 1), tmp_path)
    with (tmp_path / "leaks.csv").open(newline="") as file:
        header, row = csv.reader(file)
    assert header == ["validation key", "training key", "similarity", "validation label", "training label"]
    assert row == ["'=evil/1.jpg", "mint/2.jpg", "0.98", "'=evil", "mint"]
