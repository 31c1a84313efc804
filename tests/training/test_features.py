"""Feature vectors: extraction, and the batches of a training."""

import numpy as np
import pytest

from dgmd_pipeline.training import features, networks
from dgmd_pipeline.workflow import executors


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return networks.build_backbone("MobileNetV3-Small", "none", 32, 48, tmp_path_factory.mktemp("keras-home"))


def batches(count, size):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), np.uint8)
    return images, [images[start : start + size] for start in range(0, count, size)]


def test_features_are_the_outputs_of_the_backbone_in_order(backbone):
    images, parts = batches(10, 4)
    blocks = list(features.extract(parts, backbone))
    assert [len(block) for block in blocks] == [4, 4, 2]
    vectors = np.concatenate(blocks)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, backbone.predict(images, verbose=0), rtol=1e-3, atol=1e-5)
    assert vectors.std(axis=0).max() > 0


def test_a_tensorflow_dataset_gives_the_same_features_as_arrays(backbone):
    import tensorflow as tf

    images, parts = batches(5, 2)
    dataset = tf.data.Dataset.from_tensor_slices(images).batch(2)
    found = [np.concatenate(list(features.extract(each, backbone))) for each in (dataset, parts)]
    np.testing.assert_array_equal(*found)


def test_the_head_on_features_predicts_what_the_assembled_model_predicts_on_images(backbone):
    images, parts = batches(6, 4)
    vectors = np.concatenate(list(features.extract(parts, backbone)))
    head = networks.build_head(backbone.output_shape[-1], 7, 0.2)
    on_images = networks.assemble(backbone, head, "stretch").predict(images, verbose=0)
    np.testing.assert_allclose(on_images, head.predict(vectors, verbose=0), atol=1e-5)


def test_threads_compute_the_same_features_in_the_same_order(backbone):
    _, parts = batches(40, 3)
    one, threads = (list(features.extract(parts, backbone, map_)) for map_ in (map, executors.in_threads))
    assert [len(block) for block in threads] == [3] * 13 + [1]
    np.testing.assert_array_equal(np.concatenate(one), np.concatenate(threads))


def test_each_epoch_reads_every_feature_once_in_batches_of_even_size_and_another_order():
    data = features.LabeledFeatures(np.arange(10, dtype=np.float32)[:, None], np.arange(10))
    epochs = [[y.numpy() for _, y in features.read_batches(data, 4, (0, epoch))] for epoch in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 3, 3]
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert any(set(a) != set(b) for a, b in zip(*epochs, strict=True))
