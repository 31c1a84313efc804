import csv

import numpy as np
import pytest

from dgmd_pipeline.evaluation import leaks

DIMENSIONS = 64


def found(training, validation):
    names = [
        [f"{side}/{number}.jpg" for number in range(len(rows))] for side, rows in (("t", training), ("v", validation))
    ]
    labels = [["mint"] * len(training), ["anise"] * len(validation)]
    return leaks.find(training.astype(np.float32), validation.astype(np.float32), names, labels)


def images(count, seed, alike=0.0):
    """Features of distinct images, which have the share `alike` of their length in common."""
    random = np.random.default_rng(seed)
    own = random.normal(size=(count, DIMENSIONS))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    common = np.ones(DIMENSIONS) / DIMENSIONS**0.5
    return alike * common + (1 - alike**2) ** 0.5 * own


def changed(features, by, seed=1):
    """Features of other versions of the same images, `by` of the distance between two images away."""
    other = images(len(features), seed)
    return features + by * other


@pytest.mark.parametrize("alike", [0.0, 0.7, 0.99])
def test_near_duplicates_are_found_however_alike_the_images_of_a_data_set_are(alike):
    training, validation = images(400, 0, alike), images(100, 2, alike)
    scale = (1 - alike**2) ** 0.5
    for copies in (1, 4):  # in training
        for number in range(copies):
            training[10 * number + np.arange(10)] = changed(validation[:10], 0.3 * scale, number)
        result = found(training, validation)
        assert sorted(leak.position for leak in result.leaks) == list(range(10))
        assert all(leak.training_position % 10 == leak.position for leak in result.leaks)
        assert result.compared == 100


@pytest.mark.parametrize("alike", [0.0, 0.9, 0.999])
def test_look_alike_images_are_not_reported_though_their_similarity_is_high(alike):
    training, validation = images(2000, 0, alike), images(500, 2, alike)
    assert found(training, validation).leaks == []
    assert (training @ validation.T).max() > alike**2


def test_a_few_nearest_neighbours_in_a_dense_group_are_not_reported():
    """Cells of one module are more alike than cells of two; no single pair stands out."""
    training, validation = images(400, 0), images(100, 2)
    training[:40] = changed(np.repeat(images(1, 5), 40, 0), 0.2, 6)
    validation[:10] = changed(np.repeat(images(1, 5), 10, 0), 0.2, 7)
    assert found(training, validation).leaks == []


def test_leaks_are_found_where_every_validation_image_leaks():
    validation = images(50, 0)
    training = np.concatenate([changed(validation, 0.3, number) for number in range(3)])
    assert len(found(training, validation).leaks) == 50


def test_blocks_and_samples_change_nothing_but_what_is_compared(monkeypatch):
    training, validation = images(90, 0), images(40, 2)
    training[50:60] = changed(validation[:10], 0.2)
    whole = found(training, validation)
    monkeypatch.setattr(leaks, "BLOCK", 7)
    by_blocks = found(training, validation)
    assert [leak[:2] for leak in by_blocks.leaks] == [leak[:2] for leak in whole.leaks]
    assert len(whole.leaks) == 10
    monkeypatch.setattr(leaks, "MOST_PAIRS", 90 * 20)
    sample = found(training, validation)
    assert sample.compared == 20
    assert {leak.position for leak in sample.leaks} == {0, 2, 4, 6, 8}


def test_the_most_similar_pair_comes_first_and_the_similarity_is_the_cosine():
    training, validation = images(100, 0), images(20, 2)
    training[7], training[3] = 5 * validation[4], changed(validation[9:10], 0.2)[0]
    first, second = found(training, validation).leaks
    assert (first.key, first.training_key, first.label, first.training_label) == ("v/4.jpg", "t/7.jpg", "anise", "mint")
    assert first.similarity == pytest.approx(1, abs=1e-5)
    cosine = training[3] @ validation[9] / np.linalg.norm(training[3]) / np.linalg.norm(validation[9])
    assert second.similarity == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(("training", "validation"), [(4, 5), (100, 0)])
def test_of_too_few_images_nothing_is_said(training, validation):
    assert found(images(training, 0), images(validation, 2)) == leaks.Found([], 0)


def test_features_that_are_all_the_same_or_zero_are_no_leaks():
    vector = np.random.default_rng(0).normal(size=DIMENSIONS).astype(np.float32)
    for value in (0, 1, vector):
        same = np.full((20, DIMENSIONS), value)
        assert found(same, same).leaks == []


def test_a_name_that_looks_like_a_formula_is_text_in_the_table(tmp_path):
    leaks.write(tmp_path, [leaks.Leak("=evil/1.jpg", "mint/2.jpg", 0.98, "=evil", "mint", 0, 1)])
    with (tmp_path / "leaks.csv").open(newline="") as file:
        header, row = csv.reader(file)
    assert header == ["validation key", "training key", "similarity", "validation label", "training label"]
    assert row == ["'=evil/1.jpg", "mint/2.jpg", "0.98", "'=evil", "mint"]
