"""Fine-tuning: the cut of the backbone, the layers that are trained, the trial, and resuming."""

from functools import partial

import numpy as np
import pytest
from support.training import Stopped, ignore, store_features, write_stripe_records

from dgmd_pipeline.training import dataset, fine_tuning, fine_tuning_data, networks, train
from dgmd_pipeline.training.backbone_cut import cut_backbone
from dgmd_pipeline.training.config import TrainingConfig
from dgmd_pipeline.training.fine_tuning import Trial
from dgmd_pipeline.training.fine_tuning_data import LabeledImages

CONFIG = TrainingConfig(
    batch_size=16, epochs=2, learning_rate=0.01, decay_rate=0, patience=1,
    optimizer="adam", dropout=0, weight_decay=0, seed=1,
)  # fmt: skip
KINDS = ("top", "all")


@pytest.fixture(scope="module")
def backbone():
    """A small frozen network with random weights and the blocks of MobileNetV2."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    pixels = keras.Input((16, 16, 3), name="pixels")
    x = layers.Rescaling(1 / 127.5, -1)(pixels)
    for strides in (2, 2, 1):
        wide = layers.Conv2D(32, 3, strides=strides, padding="same", use_bias=False)(x)
        wide = layers.ReLU()(layers.BatchNormalization()(wide))
        narrow = layers.BatchNormalization()(layers.Conv2D(8, 1, use_bias=False)(wide))
        x = narrow if strides == 2 else layers.Add()([x, narrow])
    network = keras.Model(pixels, layers.GlobalAveragePooling2D()(x), name="backbone")
    network.trainable = False
    return network


def new_head(rows=None):
    import keras

    del rows
    keras.utils.set_random_seed(0)
    return networks.build_linear_head(np.zeros((8, 2), np.float32), np.zeros(2, np.float32))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_stripe_records(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def splits(records):
    def split(name):
        read = partial(dataset.read, records / name)
        return LabeledImages(np.array([int(label) for _, label in read()]), read)

    return split("training"), split("validation")


def tune(backbone, splits, resume_dir, kind="top", config=CONFIG, on_epoch=ignore, groups=None):
    groups = groups or [str(row) for row in range(len(splits[0].labels))]
    weights = np.ones(2, np.float32)
    return fine_tuning.fine_tune(
        kind, backbone, new_head(), new_head, *splits, groups, weights, config, on_epoch, resume_dir
    )


def weights_of(tuned):
    return [*tuned.backbone.get_weights(), *tuned.head.get_weights()]


def assert_same(one, other):
    for a, b in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def tuned(backbone, splits, tmp_path_factory):
    before = backbone.get_weights()
    found = {kind: tune(backbone, splits, tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    for a, b in zip(before, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)  # other steps use the backbone
    return found


def test_a_backbone_is_cut_between_two_blocks(backbone):
    bottom, top = cut_backbone(backbone)
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 16, 16, 3)).astype(np.float32)
    whole = backbone.predict(pixels, verbose=0)
    np.testing.assert_allclose(top.predict(bottom.predict(pixels, verbose=0), verbose=0), whole, atol=1e-4)
    assert bottom.output_shape == (None, 4, 4, 8)  # narrow, at the lower resolution
    assert 0.25 < top.count_params() / backbone.count_params() < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_learns_what_the_head_alone_cannot(kind, tuned):
    trial, history = tuned[kind].trial, tuned[kind].history
    assert trial.better
    assert trial.log_loss < trial.log_loss_head == pytest.approx(np.log(2))
    assert trial.held_out == 18
    assert [row.epoch for row in history] == [0, 1]
    np.testing.assert_allclose([row.learning_rate for row in history], [0.01, 0.005])


def test_top_trains_the_layers_above_the_cut_all_trains_every_layer_and_neither_trains_batch_normalisation(
    tuned, backbone
):
    import keras

    changed = {}
    for kind in KINDS:
        pairs = zip(backbone.layers, tuned[kind].backbone.layers, strict=True)
        changed[kind] = {
            old.name
            for old, new in pairs
            if any(not np.array_equal(a, b) for a, b in zip(old.get_weights(), new.get_weights(), strict=True))
        }
    with_weights = [layer for layer in backbone.layers if layer.weights]
    convolutions = [layer.name for layer in with_weights if not isinstance(layer, keras.layers.BatchNormalization)]
    assert changed["all"] == set(convolutions)
    assert changed["top"] == set(convolutions[-2:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tuning_that_is_stopped_in_the_trial_and_in_the_final_fit_has_the_same_weights(
    kind, tuned, backbone, splits, tmp_path
):
    seen = []

    def stop(row):
        seen.append(row)
        if row.epoch == 0:
            raise Stopped

    for _ in ("trial", "final fit"):
        with pytest.raises(Stopped):
            tune(backbone, splits, tmp_path, kind, on_epoch=stop)
    resumed = tune(backbone, splits, tmp_path, kind, on_epoch=stop)
    assert_same(resumed, tuned[kind])
    assert [row.epoch for row in seen] == [0, 1, 0, 1]  # no epoch was repeated
    assert seen[2:] == resumed.history


def test_a_worse_model_is_not_kept(backbone, splits, tmp_path):
    seen = []
    config = CONFIG._replace(learning_rate=30.0, epochs=1)  # leads to probabilities of 0
    tuned = tune(backbone, splits, tmp_path, config=config, on_epoch=seen.append)
    assert not tuned.trial.better
    assert tuned[:3] == (None, None, [])
    assert len(seen) == 1  # there was no final fit


def test_the_lower_log_loss_is_better_regardless_of_accuracy():
    assert Trial(100, 0.5, 0.4, 0.9, 0.8, 1).better
    assert not Trial(100, 0.5, 0.5, 0.8, 0.9, 1).better


def test_groups_are_held_out_as_a_whole_and_a_trial_uses_at_most_trial_rows(monkeypatch):
    labels = np.arange(600) % 3
    groups = [str(row // 4) for row in range(600)]
    fitted, held_out = fine_tuning_data.hold_out(labels, groups, 0)
    assert len(held_out) == pytest.approx(120, abs=8)
    assert sorted([*fitted, *held_out]) == list(range(600))
    assert not {groups[row] for row in fitted} & {groups[row] for row in held_out}
    monkeypatch.setattr(fine_tuning_data, "TRIAL_ROWS", 100)
    fitted, held_out = fine_tuning_data.hold_out(labels, groups, 0)
    assert len(fitted) + len(held_out) == 100


def test_nothing_is_fine_tuned_where_all_images_are_near_duplicates(backbone, splits, tmp_path):
    tuned = tune(backbone, splits, tmp_path, groups=["one"] * len(splits[0].labels))
    assert tuned == (None, None, [], None)


def test_the_fine_tuned_model_is_loaded_by_keras_alone(tuned, splits, tmp_path):
    import keras

    whole = networks.assemble(tuned["top"].backbone, tuned["top"].head, "stretch")
    whole.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    images = np.stack([image for image, _ in splits[1].read()])
    np.testing.assert_allclose(loaded.predict(images, verbose=0), whole.predict(images, verbose=0), atol=1e-6)


def test_fine_tuning_starts_again_where_its_stored_activations_are_damaged(backbone, records, splits, tmp_path, caplog):
    stored = [tmp_path / name for name in ("training", "validation")]
    for folder, images in zip(stored, ("training", "validation"), strict=True):
        store_features(folder, records / images, backbone)
    groups = [str(row) for row in range(len(splits[0].labels))]
    folders = [records / "training", records / "validation"]
    data = train.TrainingData(*stored, groups, 2, {}, folders)
    options = train.TrainingOptions(CONFIG, "linear", (16, 16), "stretch", "top", 1, 0.01)
    resume_dir = tmp_path / "resume"
    resume_dir.mkdir()
    epochs = []

    def stop_in_trial(row):
        epochs.append(row)
        if len(epochs) == 2:  # the first is that of the linear head
            raise Stopped

    with pytest.raises(Stopped):
        train.train(data, options, lambda: backbone, resume_dir, stop_in_trial)
    with (resume_dir / "activations_training" / fine_tuning_data.VALUES).open("r+b") as file:
        file.truncate(1000)
    trained = train.train(data, options, lambda: backbone, resume_dir, ignore)
    assert "activations.npy should hold the state of this training" in caplog.text
    assert "Fine-tuning starts again." in caplog.text
    assert trained.fine_tuning["held_out"] == 18
    assert len(np.load(resume_dir / "activations_training" / fine_tuning_data.VALUES)) == 90
