import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from support.training import RECIPE, Stopped, clouds, ignore, stripes, train, train_on_records

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import averaging, config, from_scratch, head, loop
from dgmd_pipeline.training import checkpoint as training_checkpoint


def datasets(*sides):
    import tensorflow as tf

    return [tf.data.Dataset.from_tensor_slices(side) for side in sides]


def stopped_after_every_epoch(train, checkpoint):
    """Train until it is done, interrupted after each epoch; return what came of it and the epochs that were run."""
    seen = []

    def stop(row):
        seen.append(row)
        raise Stopped

    for _ in range(20):
        try:
            return train(on_epoch=stop, checkpoint=checkpoint), seen
        except Stopped:
            pass
    raise AssertionError("it does not get on")


def assert_same(one, other, apart=1e-6):
    assert (one.seed, len(one.history)) == (other.seed, len(other.history))
    np.testing.assert_allclose(one.history, other.history, rtol=apart, atol=apart)
    for a, b in zip(one.model.get_weights(), other.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=apart)


def test_the_learning_rate_falls_with_the_epoch():
    assert [config.learning_rate_of(epoch, 0.01, 0.5) for epoch in range(3)] == [0.01, 0.01 / 1.5, 0.005]
    assert config.learning_rate_of(7, 0.01, 0) == 0.01


def test_a_head_learns_and_reports_every_epoch():
    seen = []
    trained = train(on_epoch=seen.append)
    assert seen == trained.history
    assert [row.epoch for row in seen] == [0, 1, 2, 3]
    np.testing.assert_allclose([row.learning_rate for row in seen], [0.01, 0.01 / 1.5, 0.005, 0.004])
    assert trained.history[-1].val_accuracy > 0.9
    assert seen[-1].loss < seen[0].loss


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_every_optimizer_learns_at_the_default_learning_rate(optimizer):
    trained = train(RECIPE._replace(optimizer=optimizer, epochs=10, weight_decay=0.001))
    assert trained.history[-1].val_accuracy > 0.9


def test_the_optimizer_uses_the_learning_rate_of_the_epoch():
    """At a decay so large that only the first epoch has a learning rate, more epochs change no kernel."""
    sides = (clouds(spread=2), clouds(spread=2))
    one, three, steady = (
        train(RECIPE._replace(epochs=epochs, decay_rate=decay_rate), sides)
        for epochs, decay_rate in ((1, 1e12), (3, 1e12), (3, 0.0))
    )
    kernels = [trained.model.layers[-1].kernel.numpy() for trained in (one, three, steady)]
    np.testing.assert_allclose(kernels[0], kernels[1], atol=1e-6)
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-3


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    one, again, other = train(), train(), train(RECIPE._replace(seed=2))
    for a, b in zip(one.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert one.seed == 1
    assert not np.allclose(one.model.get_weights()[-2], other.model.get_weights()[-2])


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_a_head_that_was_stopped_after_every_epoch_is_that_of_a_training_that_was_not(optimizer, tmp_path):
    recipe = RECIPE._replace(optimizer=optimizer, epochs=5, weight_decay=0.001)

    def train_it(**more):
        return train(recipe, (clouds(spread=4), clouds(60, seed=1, spread=4)), **more)

    whole = train_it()
    resumed, seen = stopped_after_every_epoch(train_it, tmp_path / "checkpoint.npz")
    assert_same(resumed, whole)
    assert seen == resumed.history
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_a_network_that_was_stopped_after_every_epoch_is_that_of_a_training_that_was_not(
    optimizer, folder_of_records, tmp_path
):
    def train_it(**more):
        return train_on_records(folder_of_records, RECIPE._replace(optimizer=optimizer), **more)

    resumed, seen = stopped_after_every_epoch(train_it, tmp_path / "checkpoint.npz")
    assert_same(resumed, train_it())
    assert [row.epoch for row in seen] == [0, 1, 2, 3]


@pytest.mark.slow
def test_killed_trainings_go_on_in_other_processes(folder_of_records, tmp_path):
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.training import train, train_on_records

def kill(row):
    if row.epoch == 1:
        os.kill(os.getpid(), {signal.SIGKILL:d})

train(on_epoch=kill, checkpoint=Path("head.npz"))
train_on_records(Path({str(folder_of_records)!r}), on_epoch=kill, checkpoint=Path("network.npz"))
"""
    for code_of_exit in (-signal.SIGKILL, -signal.SIGKILL, 0):  # in the head's training, in the network's, not at all
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code_of_exit, done.stderr
    assert_same(train(on_epoch=pytest.fail, checkpoint=tmp_path / "head.npz"), train())
    network = train_on_records(folder_of_records, on_epoch=pytest.fail, checkpoint=tmp_path / "network.npz")
    # Several threads add up a gradient in the order in which they are done: on a busy machine the validation loss of
    # two processes differed by 0.0009 of it.
    assert_same(network, train_on_records(folder_of_records), apart=0.01)


def test_a_training_without_a_seed_goes_on_with_the_one_it_began_with(tmp_path):
    def train_it(**more):
        return train(RECIPE._replace(seed=None), **more)

    resumed, _ = stopped_after_every_epoch(train_it, tmp_path / "checkpoint.npz")
    assert_same(resumed, train(RECIPE._replace(seed=resumed.seed)))


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path):
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
    assert_same(train(on_epoch=seen.append, checkpoint=checkpoint), train())
    assert [row.epoch for row in seen] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["empty", "cut off", "a bit", "no archive", "other features", "other optimizer"])
def test_a_checkpoint_that_cannot_be_used_is_named(damage, tmp_path):
    checkpoint = tmp_path / "checkpoint.npz"
    features, labels = clouds(dimensions=5 if damage == "other features" else 8)
    optimizer = "sgd" if damage == "other optimizer" else "adam"
    train(RECIPE._replace(epochs=1, optimizer=optimizer), ((features, labels),) * 2, checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    place = content.index(b"state2.npy") + 300  # among its numbers
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    others = {"empty": b"", "cut off": content[:place], "a bit": flipped, "no archive": b"epoch 3\n"}
    checkpoint.write_bytes(others.get(damage, content))
    with pytest.raises(PipelineError, match=r"\.npz should hold .*damaged, or of another"):
        train(checkpoint=checkpoint)


def test_without_a_seed_every_training_is_another_one_that_can_be_repeated():
    one, other = train(RECIPE._replace(seed=None)), train(RECIPE._replace(seed=None))
    assert one.seed != other.seed
    again = train(RECIPE._replace(seed=one.seed))
    np.testing.assert_allclose(one.model.get_weights()[-2], again.model.get_weights()[-2], atol=1e-6)
    assert not np.allclose(one.model.get_weights()[-2], other.model.get_weights()[-2])


def test_a_training_that_comes_to_what_is_no_number_stops_with_a_sentence():
    with pytest.raises(PipelineError, match=r"not numbers in epoch \d.*lower than 1e\+30: LEARNING_RATE"):
        train(RECIPE._replace(learning_rate=1e30))


def test_features_that_are_not_numbers_stop_with_a_sentence():
    features, labels = clouds()
    features[3, 3] = np.nan
    with pytest.raises(PipelineError, match="not all finite numbers.*BACKBONE_WEIGHTS"):
        train(sides=((features, labels), clouds(60, seed=1)))


def test_a_label_that_is_gone_from_the_data_stays_an_output():
    trained = train(classes=5, class_weights={0: 1.0, 1: 1.0, 2: 1.0})
    assert trained.model.output_shape == (None, 5)
    probabilities = trained.model.predict(clouds(60, seed=1)[0], verbose=0)
    assert set(probabilities.argmax(axis=1)) <= {0, 1, 2}


def test_class_weights_shift_what_is_predicted():
    features, labels = clouds(spread=6)
    one, other = (
        train(RECIPE._replace(epochs=8, patience=8), ((features, labels), (features, labels)), class_weights=weights)
        .model.predict(features, verbose=0)
        .mean(axis=0)
        for weights in ({0: 5.0, 1: 0.2, 2: 0.2}, {0: 0.2, 1: 5.0, 2: 5.0})
    )
    assert one[0] > other[0] + 0.3


def test_features_are_taken_from_a_file_mapped_into_memory(tmp_path):
    features, labels = clouds()
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    here, there = train(sides=((features, labels),) * 2), train(sides=((mapped, labels), (mapped, labels)))
    for a, b in zip(here.model.get_weights(), there.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_epoch_goes_through_every_feature_once_in_batches_of_even_size_and_another_order():
    features = np.arange(10, dtype=np.float32)[:, None]
    epochs = [[y.numpy() for _, y in head.batches(features, np.arange(10), 4, (0, epoch))] for epoch in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 3, 3]
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert any(set(a) != set(b) for a, b in zip(*epochs, strict=True))


def test_the_small_network_learns_from_pictures_and_comes_back_ready_to_serve():
    shuffled, rest = datasets(stripes(96), stripes(40))
    recipe = RECIPE._replace(epochs=5)
    one, again = (
        from_scratch.train_from_scratch(
            lambda seed, epoch: shuffled.shuffle(96, seed + epoch), rest, (16, 16), 2, {}, recipe, ignore
        )
        for _ in range(2)
    )
    pictures, labels = stripes(40)
    probabilities = one.model.predict(pictures, verbose=0)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.9
    np.testing.assert_allclose((probabilities.argmax(axis=1) == labels).mean(), one.history[-1].val_accuracy, atol=1e-6)
    assert one.model.inputs[0].dtype == "uint8"
    assert one.model.predict(np.zeros((1, 50, 30, 3), np.uint8), verbose=0).shape == (1, 2)
    for a, b in zip(one.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_callback_measures_the_moving_mean_of_the_weights_and_training_continues_from_the_weights(tmp_path):
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    network = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    data = tf.data.Dataset.from_tensor_slices(clouds()).batch(16)
    ends, measured, mean = [], [], averaging.mean_of_epochs(network)

    def note(row):
        ends.append(network.get_weights())
        measured.append(row.val_loss)

    recipe, start = RECIPE._replace(epochs=3), training_checkpoint.TrainingState(1, [], [])
    loop.fit(network, lambda epoch: data, data, np.ones(3, np.float32), recipe, start, note, None, mean)
    mean.use_mean()
    for value, first, second, third in zip(network.get_weights(), *ends, strict=True):
        np.testing.assert_allclose(value, (2 * first + 10 * second + 30 * third) / 42, atol=1e-6)
        assert not np.array_equal(first, third)
    np.testing.assert_allclose(network.evaluate(data, verbose=0)[0], measured[-1], rtol=1e-5)


def test_the_small_network_is_trained_on_augmented_images(folder_of_records):
    one, other = (
        train_on_records(folder_of_records, RECIPE._replace(epochs=1, augmentation=kind)) for kind in ("none", "shift")
    )
    assert one.history[0].loss != other.history[0].loss
