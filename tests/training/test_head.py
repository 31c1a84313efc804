"""Choosing a head by cross-validation, fitting it, and resuming."""

import json

import numpy as np
import pytest
from support.training import CONFIG, Stopped, clouds, ignore

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import head, head_selection, linear, loop
from dgmd_pipeline.training.checkpoint import UnusableCheckpoint
from dgmd_pipeline.training.features import LabeledFeatures


def rings(count, seed=0):
    """Two labels that no plane separates: a ball and the shell around it."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    directions = random.normal(0, 1, (count, 4))
    radius = np.where(labels == 0, 1, 3) + random.normal(0, 0.3, count)
    vectors = directions / np.linalg.norm(directions, axis=1)[:, None] * radius[:, None]
    return LabeledFeatures(vectors.astype(np.float32), labels)


def train(
    data, validation=None, kind="auto", classes=3, groups=None, config=CONFIG, weights=None, on_epoch=ignore, **more
):
    groups = groups or [str(row) for row in range(len(data.labels))]
    return head.train_head(data, validation or data, groups, classes, weights or {}, config, kind, on_epoch, **more)


def accuracy(trained, split):
    return (trained.model.predict(split.vectors, verbose=0).argmax(axis=1) == split.labels).mean()


def test_a_logistic_regression_is_chosen_where_planes_separate_the_labels():
    trained = train(clouds(150, spread=2), clouds(60, seed=1, spread=2))
    assert trained.selection.chosen.kind == "linear"
    assert [option.kind for option in trained.selection.options] == ["linear", "hidden"]
    assert trained.selection.held_out == 150
    [row] = trained.history
    assert row.val_accuracy == pytest.approx(accuracy(trained, clouds(60, seed=1, spread=2)))
    assert row.val_accuracy > 0.8


def test_hidden_layers_are_chosen_where_no_plane_separates_the_labels():
    config = CONFIG._replace(epochs=20, dropout=0.0)
    trained = train(rings(300), rings(100, seed=1), classes=2, config=config)
    chosen = trained.selection.chosen
    assert chosen.kind == "hidden" and len(trained.history) == chosen.epochs <= 20
    assert accuracy(trained, rings(100, seed=1)) > 0.85


def test_a_fixed_kind_is_chosen():
    assert train(rings(60), classes=2, kind="linear").selection.options[0].kind == "linear"
    trained = train(clouds(60), kind="hidden", config=CONFIG._replace(epochs=1))
    assert trained.selection.chosen == trained.selection.options[1]
    assert (trained.selection.chosen.kind, trained.selection.chosen.epochs) == ("hidden", 1)


def test_near_duplicates_are_held_out_together():
    """Only a copy in the training rows tells a random label."""
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(0, 1, (40, 60)), 3, axis=0).astype(np.float32)
    data = LabeledFeatures(features, np.repeat(random.integers(0, 2, 40), 3))
    groups = [str(row // 3) for row in range(120)]
    apart = train(data, classes=2, kind="linear").selection.chosen.accuracy
    together = train(data, classes=2, kind="linear", groups=groups).selection.chosen.accuracy
    assert apart > 0.85 and together < 0.7


def test_a_label_with_one_group_can_be_trained():
    features, labels = clouds(60)
    labels = np.append(labels, [3, 3])
    features = np.concatenate([features, np.full((2, 8), 9, np.float32)])
    groups = [*map(str, range(60)), "pair", "pair"]
    trained = train(LabeledFeatures(features, labels), classes=5, kind="linear", groups=groups)
    assert trained.selection.held_out == 60
    assert trained.model.output_shape == (None, 5)


def test_the_default_is_used_where_too_few_images_can_be_held_out():
    trained = train(LabeledFeatures(clouds(2).vectors, np.array([0, 1])), classes=2)
    chosen = {"kind": "linear", "shrinkage": 1, "strength": 0.03}
    assert head_selection.to_json(trained.selection) == {"chosen": chosen, "options": [], "held_out": 0}


def test_a_selection_is_recorded_with_the_settings_of_its_kind():
    options = [head_selection.Option("linear", 0.5, 0.8, 0.9, 0.1), head_selection.Option("hidden", 0.4, 0.9, epochs=3)]
    assert head_selection.to_json(head_selection.Selection(options[1], options, 60, 1)) == {
        "chosen": {"kind": "hidden", "epochs": 3, "log_loss": 0.4, "accuracy": 0.9},
        "options": [
            {"kind": "linear", "shrinkage": 0.9, "strength": 0.1, "log_loss": 0.5, "accuracy": 0.8},
            {"kind": "hidden", "epochs": 3, "log_loss": 0.4, "accuracy": 0.9},
        ],
        "held_out": 60,
    }


def test_cross_validation_uses_at_most_selection_rows(monkeypatch):
    monkeypatch.setattr(head_selection, "SELECTION_ROWS", 60)
    monkeypatch.setattr(head_selection, "HELD_OUT_ROWS", 30)
    trained = train(clouds(300), kind="linear")
    assert trained.selection.held_out == 40  # two folds of twenty
    assert accuracy(trained, clouds(60, seed=1)) > 0.9


@pytest.mark.parametrize("position", [0, len(head_selection.STRENGTHS) - 1])
def test_the_best_strength_is_found_from_both_ends(monkeypatch, position):
    monkeypatch.setattr(head_selection, "FIRST_STRENGTH", position)
    data, config = clouds(150, spread=4), CONFIG._replace(seed=1)
    components = linear.principal_components(data.vectors)
    groups = [*map(str, range(150))]
    weights = np.ones(3, np.float32)
    selection = head_selection.select(data, groups, weights, config, "linear", components, hidden=pytest.fail)
    assert selection.chosen.strength == 0.1


def test_logistic_regressions_are_cross_validated_before_keras_is_needed(tmp_path):
    checkpoint, seen = tmp_path / "training.npz", []
    train(clouds(60), kind="linear", checkpoint=checkpoint, prepare=lambda: seen.extend(tmp_path.iterdir()))
    assert seen == [tmp_path / head_selection.FILE]


def test_class_weights_shift_the_predictions_of_a_linear_head():
    data = clouds(120, spread=6)
    one, other = (
        train(data, kind="linear", weights=weights).model.predict(data.vectors, verbose=0).mean(axis=0)
        for weights in ({0: 5.0, 1: 0.2, 2: 0.2}, {0: 0.2, 1: 5.0, 2: 5.0})
    )
    assert one[0] > other[0] + 0.3


def test_a_stopped_training_resumes_with_its_selection_and_has_the_weights_of_an_uninterrupted_one(tmp_path):
    checkpoint = tmp_path / "training.npz"
    config = CONFIG._replace(seed=None, epochs=2, batch_size=32)

    def stop(row):
        raise Stopped

    data = clouds(90)
    with pytest.raises(Stopped):
        train(data, kind="hidden", config=config, on_epoch=stop, checkpoint=checkpoint)
    chosen = json.loads((tmp_path / "selection.json").read_text())
    resumed = train(data, kind="hidden", config=config, checkpoint=checkpoint)
    uninterrupted = train(data, kind="hidden", config=config._replace(seed=resumed.seed))
    assert len(resumed.history) == 2
    assert chosen[3] == resumed.seed and uninterrupted.selection == resumed.selection
    for a, b in zip(resumed.model.get_weights(), uninterrupted.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    (tmp_path / "selection.json").write_text("[]")
    with pytest.raises(UnusableCheckpoint, match=r"selection\.json should hold"):
        train(data, kind="hidden", config=config, checkpoint=checkpoint)


def test_features_that_are_not_finite_are_refused():
    data = clouds()
    data.vectors[3, 3] = np.nan
    with pytest.raises(PipelineError, match="not all finite numbers.*BACKBONE_WEIGHTS"):
        train(data)


def test_a_logistic_regression_is_chosen_where_hidden_layers_diverge(caplog):
    config = CONFIG._replace(epochs=1, learning_rate=1e30)
    trained = train(clouds(60), config=config)
    assert [option.kind for option in trained.selection.options] == ["linear"]
    assert "The head with hidden layers cannot be used" in caplog.text
    with pytest.raises(loop.Diverged):
        train(clouds(60), kind="hidden", config=config)


def test_only_centred_features_are_evaluated_for_many_labels(monkeypatch):
    monkeypatch.setattr(head_selection, "MAX_PRODUCTS", 0)
    monkeypatch.setattr(head_selection, "SHRINKAGES", (1.0, 0.0))  # the second would divide by zero
    assert train(clouds(60), kind="linear").selection.chosen.shrinkage == 1


def test_a_shrinkage_after_one_that_is_not_better_is_not_evaluated(monkeypatch):
    data = clouds(60, spread=2)
    noise = np.random.default_rng(0).normal(0, 0.01, (len(data.labels), 40)).astype(np.float32)
    noisy = data._replace(vectors=np.hstack([data.vectors, noise]))  # whitening gives it as much weight as the rest
    monkeypatch.setattr(head_selection, "SHRINKAGES", (1.0, 1e-6, np.nan))  # the last would raise an error
    assert train(noisy, kind="linear").selection.chosen.shrinkage == 1
    monkeypatch.setattr(head_selection, "SHRINKAGES", (1.0, np.nan))
    with pytest.raises(PipelineError, match="finite"):
        train(noisy, kind="linear")
