"""The training loop: learning, checkpoints, resuming, and the training of `cnn`."""

import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from support.training import CONFIG, Stopped, clouds, stripes, train, train_on_records, write_stripe_records

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import averaging, loop
from dgmd_pipeline.training.checkpoint import TrainingState, UnusableCheckpoint
from dgmd_pipeline.training.config import OPTIMIZERS, learning_rate_of
from dgmd_pipeline.training.features import LabeledFeatures


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_stripe_records(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def trained():
    """A head that was trained without interruption, and the epochs that were reported."""
    seen = []
    return train(on_epoch=seen.append), seen


def train_interrupted(train, checkpoint):
    """Train to the end, interrupted after each epoch; return the result and the epochs that were run."""
    seen = []

    def stop(row):
        seen.append(row)
        raise Stopped

    for _ in range(20):
        try:
            return train(on_epoch=stop, checkpoint=checkpoint), seen
        except Stopped:
            pass
    raise AssertionError("the training does not progress")


def assert_same(one, other, apart=1e-6):
    assert (one.seed, len(one.history)) == (other.seed, len(other.history))
    np.testing.assert_allclose(one.history, other.history, rtol=apart, atol=apart)
    for a, b in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=apart)


def test_the_learning_rate_decreases_with_the_epoch():
    assert [learning_rate_of(epoch, 0.01, 0.5) for epoch in range(3)] == [0.01, 0.01 / 1.5, 0.005]
    assert learning_rate_of(7, 0.01, 0) == 0.01


def test_a_head_learns_and_reports_every_epoch(trained):
    model, seen = trained
    assert seen == model.history
    assert [row.epoch for row in seen] == [0, 1, 2, 3]
    np.testing.assert_allclose([row.learning_rate for row in seen], [0.01, 0.01 / 1.5, 0.005, 0.004])
    assert seen[-1].val_accuracy > 0.9
    assert seen[-1].loss < seen[0].loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_at_the_default_learning_rate(optimizer):
    trained = train(CONFIG._replace(optimizer=optimizer, epochs=10, weight_decay=0.001))
    assert trained.history[-1].val_accuracy > 0.9


def test_the_optimizer_uses_the_learning_rate_of_the_epoch():
    """With a decay so high that the learning rate is 0 after the first epoch, more epochs change no kernel."""
    splits = (clouds(spread=2), clouds(spread=2))
    one, three, steady = (
        train(CONFIG._replace(epochs=epochs, decay_rate=decay_rate), splits)
        for epochs, decay_rate in ((1, 1e12), (3, 1e12), (3, 0.0))
    )
    kernels = [trained.model.layers[-1].kernel.numpy() for trained in (one, three, steady)]
    np.testing.assert_allclose(kernels[0], kernels[1], atol=1e-6)
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-3


def test_the_same_seed_gives_the_same_weights_and_another_seed_gives_others(trained):
    (one, _), again, other = trained, train(), train(CONFIG._replace(seed=2, epochs=1))
    for a, b in zip(one.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert one.seed == 1
    assert not np.allclose(one.model.get_weights()[-2], other.model.get_weights()[-2])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_head_training_that_is_stopped_after_every_epoch_has_the_same_weights(optimizer, tmp_path):
    config = CONFIG._replace(optimizer=optimizer, epochs=3, weight_decay=0.001)

    def train_it(**more):
        return train(config, (clouds(spread=4), clouds(60, seed=1, spread=4)), **more)

    uninterrupted = train_it()
    resumed, seen = train_interrupted(train_it, tmp_path / "checkpoint.npz")
    assert_same(resumed, uninterrupted)
    assert seen == resumed.history
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]


def test_a_cnn_training_that_is_stopped_after_every_epoch_has_the_same_weights(records, tmp_path):
    """The test above has the other optimizers: `loop.prepare` returns the variables of all of them."""

    def train_it(**more):
        return train_on_records(records, CONFIG._replace(optimizer="adamw", epochs=3), **more)

    resumed, seen = train_interrupted(train_it, tmp_path / "checkpoint.npz")
    assert_same(resumed, train_it())
    assert [row.epoch for row in seen] == [0, 1, 2]


@pytest.mark.slow
def test_killed_trainings_resume_in_other_processes(records, trained, tmp_path):
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.training import train, train_on_records

def kill(row):
    if row.epoch == 1:
        os.kill(os.getpid(), {signal.SIGKILL:d})

train(on_epoch=kill, checkpoint=Path("head.npz"))
train_on_records(Path({str(records)!r}), on_epoch=kill, checkpoint=Path("network.npz"))
"""
    for _ in ("in the training of the head", "in that of the network"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert_same(train(on_epoch=pytest.fail, checkpoint=tmp_path / "head.npz"), trained[0])
    seen = []
    network = train_on_records(records, on_epoch=seen.append, checkpoint=tmp_path / "network.npz")
    assert [row.epoch for row in seen] == [2, 3]
    # Threads sum a gradient in the order in which they finish. On a busy machine the validation losses of two processes
    # differed by 0.09 %.
    assert_same(network, train_on_records(records), apart=0.01)


def test_a_training_without_a_seed_resumes_with_its_random_seed(tmp_path):
    def train_it(**more):
        return train(CONFIG._replace(seed=None, epochs=2), **more)

    resumed, _ = train_interrupted(train_it, tmp_path / "checkpoint.npz")
    assert_same(resumed, train(CONFIG._replace(seed=resumed.seed, epochs=2)))


def test_a_failed_write_keeps_the_previous_checkpoint(trained, tmp_path):
    checkpoint = tmp_path / "checkpoint.npz"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(row):
        resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 2, limits[1]))

    try:
        with pytest.raises(OSError, match="File too large"):
            train(on_epoch=fill_the_disk, checkpoint=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [checkpoint]
    seen = []
    assert_same(train(on_epoch=seen.append, checkpoint=checkpoint), trained[0])
    assert [row.epoch for row in seen] == [1, 2, 3]


@pytest.fixture(scope="module")
def checkpoint_content(tmp_path_factory):
    """The content of a checkpoint after one epoch."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "checkpoint.npz"
    train(CONFIG._replace(epochs=1), checkpoint=checkpoint)
    return checkpoint.read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut off", "a bit", "no archive"])
def test_a_damaged_checkpoint_is_named(damage, checkpoint_content, tmp_path):
    place = checkpoint_content.index(b"state2.npy") + 300  # among its numbers
    flipped = bytes([checkpoint_content[place] ^ 1])
    damaged = {
        "empty": b"",
        "cut off": checkpoint_content[:place],
        "a bit": checkpoint_content[:place] + flipped + checkpoint_content[place + 1 :],
        "no archive": b"epoch 3\n",
    }
    (tmp_path / "checkpoint.npz").write_bytes(damaged[damage])
    with pytest.raises(UnusableCheckpoint, match=r"\.npz should hold .*damaged or belongs to another"):
        train(checkpoint=tmp_path / "checkpoint.npz")


@pytest.mark.parametrize("other", ["features", "optimizer"])
def test_a_checkpoint_of_another_training_is_named(other, checkpoint_content, tmp_path):
    (tmp_path / "checkpoint.npz").write_bytes(checkpoint_content)
    data = clouds(dimensions=5 if other == "features" else 8)
    config = CONFIG._replace(optimizer="sgd" if other == "optimizer" else "adam")
    with pytest.raises(UnusableCheckpoint, match=r"\.npz should hold .*damaged or belongs to another"):
        train(config, (data, data), checkpoint=tmp_path / "checkpoint.npz")


def test_each_training_without_a_seed_has_another_one():
    one, other = (train(CONFIG._replace(seed=None, epochs=1)) for _ in range(2))
    assert one.seed != other.seed
    assert not np.allclose(one.model.get_weights()[-2], other.model.get_weights()[-2])


def test_a_training_that_diverges_is_stopped():
    with pytest.raises(loop.Diverged, match=r"not finite numbers after epoch \d.*lower than 1e\+30: LEARNING_RATE"):
        train(CONFIG._replace(learning_rate=1e30))


def test_features_that_are_not_finite_are_refused():
    data = clouds()
    data.vectors[3, 3] = np.nan
    with pytest.raises(PipelineError, match="not all finite numbers.*BACKBONE_WEIGHTS"):
        train(splits=(data, clouds(60, seed=1)))


def test_a_label_that_is_missing_from_the_data_stays_an_output():
    trained = train(CONFIG._replace(epochs=2), classes=5, class_weights={0: 1.0, 1: 1.0, 2: 1.0})
    assert trained.model.output_shape == (None, 5)
    probabilities = trained.model.predict(clouds(60, seed=1).vectors, verbose=0)
    assert set(probabilities.argmax(axis=1)) <= {0, 1, 2}


def test_class_weights_shift_the_predictions():
    data = clouds(spread=6)
    one, other = (
        train(CONFIG._replace(epochs=8, patience=8), (data, data), class_weights=weights)
        .model.predict(data.vectors, verbose=0)
        .mean(axis=0)
        for weights in ({0: 5.0, 1: 0.2, 2: 0.2}, {0: 0.2, 1: 5.0, 2: 5.0})
    )
    assert one[0] > other[0] + 0.3


def test_features_may_be_mapped_from_a_file(trained, tmp_path):
    features, labels = clouds()
    np.save(tmp_path / "features.npy", features)
    mapped = LabeledFeatures(np.load(tmp_path / "features.npy", mmap_mode="r"), labels)
    for a, b in zip(
        train(splits=(mapped, clouds(60, seed=1))).model.get_weights(), trained[0].model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_cnn_learns_from_images_and_is_ready_to_serve(records):
    trained = train_on_records(records, CONFIG._replace(epochs=5))
    images, labels = stripes(40)
    predicted = trained.model.predict(images, verbose=0).argmax(axis=1)
    assert (predicted == labels).mean() > 0.9
    np.testing.assert_allclose((predicted == labels).mean(), trained.history[-1].val_accuracy, atol=1e-6)
    assert trained.model.inputs[0].dtype == "uint8"
    assert trained.model.predict(np.zeros((1, 50, 30, 3), np.uint8), verbose=0).shape == (1, 2)


def test_the_moving_mean_is_validated_and_training_continues_from_the_weights():
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    data = tf.data.Dataset.from_tensor_slices(tuple(clouds())).batch(16)
    ends, measured, mean = [], [], averaging.build_averaging_callback(network)

    def record(row):
        ends.append(network.get_weights())
        measured.append(row.val_loss)

    config, start = CONFIG._replace(epochs=3), TrainingState(1, [], [])
    loop.fit(network, lambda epoch: data, data, np.ones(3, np.float32), config, start, record, None, mean)
    mean.use_mean()
    for value, first, second, third in zip(network.get_weights(), *ends, strict=True):
        np.testing.assert_allclose(value, (2 * first + 10 * second + 30 * third) / 42, atol=1e-6)
        assert not np.array_equal(first, third)
    np.testing.assert_allclose(network.evaluate(data, verbose=0)[0], measured[-1], rtol=1e-5)


def test_the_cnn_is_trained_on_augmented_images(records):
    one, other = (train_on_records(records, CONFIG._replace(epochs=1, augmentation=kind)) for kind in ("none", "shift"))
    assert one.history[0].loss != other.history[0].loss
