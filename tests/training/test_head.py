import json

import numpy as np
import pytest
from support.training import RECIPE, clouds, ignore

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import checkpoint as training_checkpoint
from dgmd_pipeline.training import head, loop


def rings(count, seed=0):
    """Two labels that no plane separates: a ball and the shell around it."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    directions = random.normal(0, 1, (count, 4))
    radius = np.where(labels == 0, 1, 3) + random.normal(0, 0.3, count)
    return (directions / np.linalg.norm(directions, axis=1)[:, None] * radius[:, None]).astype(np.float32), labels


def train(data, validation=None, kind="auto", classes=3, groups=None, recipe=RECIPE, weights=None, **more):
    groups = groups or [str(row) for row in range(len(data[1]))]
    return head.train_head(data, validation or data, groups, classes, weights or {}, recipe, kind, ignore, **more)


def accuracy(trained, split):
    return (trained.model.predict(split[0], verbose=0).argmax(axis=1) == split[1]).mean()


def test_where_planes_separate_the_labels_a_logistic_regression_is_chosen():
    trained = train(clouds(150, spread=2), clouds(60, seed=1, spread=2))
    assert trained.selection["chosen"]["kind"] == "linear"
    assert [option["kind"] for option in trained.selection["options"]] == ["linear", "hidden"]
    assert trained.selection["held_out"] == 150
    [row] = trained.history
    assert row.val_accuracy == pytest.approx(accuracy(trained, clouds(60, seed=1, spread=2)))
    assert row.val_accuracy > 0.8


def test_where_no_plane_separates_them_hidden_layers_are_chosen():
    recipe = RECIPE._replace(epochs=20, dropout=0.0)
    trained = train(rings(300), rings(100, seed=1), classes=2, recipe=recipe)
    chosen = trained.selection["chosen"]
    assert chosen["kind"] == "hidden" and len(trained.history) == chosen["epochs"] <= 20
    assert accuracy(trained, rings(100, seed=1)) > 0.85


def test_a_fixed_kind_is_what_comes_back():
    assert train(rings(60), classes=2, kind="linear").selection["options"][0]["kind"] == "linear"
    trained = train(clouds(60), kind="hidden", recipe=RECIPE._replace(epochs=1))
    assert trained.selection["chosen"] == {**trained.selection["options"][1], "epochs": 1}


def test_near_duplicates_are_held_out_together():
    """Random labels can be told only by having seen a copy."""
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(0, 1, (40, 60)), 3, axis=0).astype(np.float32)
    labels = np.repeat(random.integers(0, 2, 40), 3)
    groups = [str(row // 3) for row in range(120)]
    apart = train((features, labels), classes=2, kind="linear").selection["chosen"]["accuracy"]
    together = train((features, labels), classes=2, kind="linear", groups=groups).selection["chosen"]["accuracy"]
    assert apart > 0.85 and together < 0.7


def test_a_label_of_one_group_does_not_stop_the_choice():
    features, labels = clouds(60)
    labels = np.append(labels, [3, 3])
    features = np.concatenate([features, np.full((2, 8), 9, np.float32)])
    groups = [*map(str, range(60)), "pair", "pair"]
    trained = train((features, labels), classes=5, kind="linear", groups=groups)
    assert trained.selection["held_out"] == 60
    assert trained.model.output_shape == (None, 5)


def test_with_too_few_images_to_hold_out_a_default_is_taken():
    data = clouds(2)[0], np.array([0, 1])
    trained = train(data, classes=2)
    chosen = {"kind": "linear", "shrinkage": 1, "strength": 0.03}
    assert trained.selection == {"chosen": chosen, "options": [], "held_out": 0}


def test_at_most_so_many_images_take_part_in_the_choice(monkeypatch):
    monkeypatch.setattr(head, "SELECTION_ROWS", 60)
    monkeypatch.setattr(head, "HELD_OUT_ROWS", 30)
    trained = train(clouds(300), kind="linear")
    assert trained.selection["held_out"] == 40  # two folds of twenty
    assert accuracy(trained, clouds(60, seed=1)) > 0.9


def test_class_weights_shift_what_a_linear_head_predicts():
    data = clouds(120, spread=6)
    one, other = (
        train(data, kind="linear", weights=weights).model.predict(data[0], verbose=0).mean(axis=0)
        for weights in ({0: 5.0, 1: 0.2, 2: 0.2}, {0: 0.2, 1: 5.0, 2: 5.0})
    )
    assert one[0] > other[0] + 0.3


def test_a_training_that_was_stopped_resumes_with_its_choice_and_comes_to_the_same_weights(tmp_path):
    checkpoint = tmp_path / "training.npz"
    recipe = RECIPE._replace(seed=None, epochs=3)

    class Stopped(Exception):
        pass

    def stop(row):
        raise Stopped

    data, groups = clouds(90), [str(row) for row in range(90)]
    with pytest.raises(Stopped):
        head.train_head(data, data, groups, 3, {}, recipe, "hidden", stop, checkpoint)
    chosen = json.loads((tmp_path / "selection.json").read_text())
    resumed = train(data, kind="hidden", recipe=recipe, checkpoint=checkpoint)
    whole = train(data, kind="hidden", recipe=recipe._replace(seed=resumed.seed))
    assert chosen[3] == resumed.seed and whole.selection == resumed.selection
    for a, b in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    (tmp_path / "selection.json").write_text("[]")
    with pytest.raises(training_checkpoint.UnusableCheckpoint, match=r"selection\.json should hold"):
        train(data, kind="hidden", recipe=recipe, checkpoint=checkpoint)


def test_features_that_are_not_finite_stop_with_a_sentence():
    features, labels = clouds()
    features[3, 3] = np.nan
    with pytest.raises(PipelineError, match="not all finite numbers.*BACKBONE_WEIGHTS"):
        train((features, labels))


def test_a_hidden_head_that_diverges_leaves_the_logistic_regression(caplog):
    recipe = RECIPE._replace(epochs=1, learning_rate=1e30)
    trained = train(clouds(60), recipe=recipe)
    assert [option["kind"] for option in trained.selection["options"]] == ["linear"]
    assert "The head with hidden layers cannot be used" in caplog.text
    with pytest.raises(loop.Diverged):
        train(clouds(60), kind="hidden", recipe=recipe)


def test_for_many_labels_only_centred_features_are_tried(monkeypatch):
    monkeypatch.setattr(head, "MOST_PRODUCTS", 0)
    monkeypatch.setattr(head, "SHRINKAGES", (1.0, 0.0))  # the second would divide by nothing
    assert train(clouds(60), kind="linear").selection["chosen"]["shrinkage"] == 1
