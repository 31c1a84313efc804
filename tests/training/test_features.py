"""Stored features: extraction, damage, and the batches of a training."""

import numpy as np
import pytest

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import features, networks
from dgmd_pipeline.workflow import executors


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return networks.build_backbone("MobileNetV3-Small", "none", 32, 48, tmp_path_factory.mktemp("keras-home"))


def batches(count, size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 48, 3), np.uint8)
    labels = rng.integers(0, 7, count)
    return images, labels, [(images[i : i + size], labels[i : i + size]) for i in range(0, count, size)]


def test_stored_features_are_the_outputs_of_the_backbone_in_the_order_of_the_records(backbone, tmp_path):
    images, labels, parts = batches(10, 4)
    assert list(features.extract(parts, 10, backbone, tmp_path)) == [4, 4, 2]
    stored, stored_labels = features.load(tmp_path)
    assert stored.dtype == np.float32
    assert stored.shape == (10, backbone.output_shape[-1])
    assert stored_labels.dtype == np.int64
    np.testing.assert_array_equal(stored_labels, labels)
    np.testing.assert_allclose(stored, backbone.predict(images, verbose=0), rtol=1e-3, atol=1e-5)
    assert stored.std(axis=0).max() > 0


def test_a_tensorflow_dataset_gives_the_same_features_as_arrays(backbone, tmp_path):
    import tensorflow as tf

    images, labels, parts = batches(5, 2)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(2)
    for _ in features.extract(dataset, 5, backbone, tmp_path):
        pass
    (tmp_path / "arrays").mkdir()
    for _ in features.extract(parts, 5, backbone, tmp_path / "arrays"):
        pass
    np.testing.assert_array_equal(features.load(tmp_path)[0], features.load(tmp_path / "arrays")[0])


def test_the_head_on_stored_features_predicts_what_the_assembled_model_predicts_on_images(backbone, tmp_path):
    images, _, parts = batches(6, 4)
    for _ in features.extract(parts, 6, backbone, tmp_path):
        pass
    head = networks.build_head(backbone.output_shape[-1], 7, 0.2)
    on_features = head.predict(features.load(tmp_path)[0], verbose=0)
    on_images = networks.assemble(backbone, head, "stretch").predict(images, verbose=0)
    np.testing.assert_allclose(on_images, on_features, atol=1e-5)


@pytest.mark.parametrize("count", [5, 7])
def test_another_number_of_images_than_expected_is_an_error(backbone, tmp_path, count):
    _, _, parts = batches(6, 3)
    with pytest.raises(ValueError, match=f"expected {count} images, the records held 6"):
        list(features.extract(parts, count, backbone, tmp_path))


@pytest.mark.parametrize("file", [features.FEATURES, features.LABELS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_a_missing_or_damaged_file_is_named(file, damage, tmp_path):
    np.save(tmp_path / features.FEATURES, np.ones((5, 3), np.float32))
    np.save(tmp_path / features.LABELS, np.ones(5, np.int64))
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: 0 if damage == "empty" else -9])
    if damage == "missing":
        (tmp_path / file).unlink()
    with pytest.raises(PipelineError, match=f"{file}.* was changed after it was written: delete the folder"):
        features.load(tmp_path)


def test_features_are_read_from_disk_as_they_are_needed(backbone, tmp_path):
    _, _, parts = batches(3, 3)
    list(features.extract(parts, 3, backbone, tmp_path))
    assert isinstance(features.load(tmp_path)[0], np.memmap)


def test_threads_compute_the_same_features_in_the_same_order(backbone, tmp_path):
    _, _, parts = batches(40, 3)
    for name, map_ in (("one", map), ("threads", executors.in_threads)):
        (tmp_path / name).mkdir()
        assert list(features.extract(parts, 40, backbone, tmp_path / name, map_)) == [3] * 13 + [1]
    one, threads = (features.load(tmp_path / name) for name in ("one", "threads"))
    np.testing.assert_array_equal(one[0], threads[0])
    np.testing.assert_array_equal(one[1], threads[1])


def test_each_epoch_reads_every_feature_once_in_batches_of_even_size_and_another_order():
    data = features.LabeledFeatures(np.arange(10, dtype=np.float32)[:, None], np.arange(10))
    epochs = [[y.numpy() for _, y in features.read_batches(data, 4, (0, epoch))] for epoch in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 3, 3]
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert any(set(a) != set(b) for a, b in zip(*epochs, strict=True))
