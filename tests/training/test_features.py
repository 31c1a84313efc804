"""Feature vectors: extraction, and the batches of a training."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.images import put_image

from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import extraction, feature_store, features, networks
from dgmd_pipeline.workflow import executors


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return networks.build_backbone("MobileNetV3-Small", "none", 32, 48, tmp_path_factory.mktemp("keras-home"))


def batches(count, size):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), np.uint8)
    return images, [images[start : start + size] for start in range(0, count, size)]


@pytest.mark.parametrize("few", [False, True])
def test_features_are_the_outputs_of_the_backbone_in_order(backbone, few):
    images, parts = batches(10, 4)
    blocks = list(features.extract(parts, backbone, few=few))
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


def test_few_images_have_the_features_that_they_have_among_many_ones_and_nothing_is_traced_for_them(backbone):
    _, parts = batches(5, 2)
    features.freeze.cache_clear()
    few = np.concatenate(list(features.extract(parts, backbone, few=True)))
    assert features.freeze.cache_info().misses == 0
    np.testing.assert_allclose(few, np.concatenate(list(features.extract(parts, backbone))), atol=1e-5)


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


def test_a_piece_that_two_workers_extract_at_the_same_time_has_the_vectors_of_a_local_run(backbone, tmp_path):
    raw = tmp_path / "raw"
    rows = [put_image(raw, f"mint/{number}.png", 0) for number in range(20)]
    for name in ("records", "local", "workers"):
        (tmp_path / name).mkdir()
    records, origin = tmp_path / "records", {"weights": "none"}
    shards.write(rows, raw, records, "training", 2, 48, 32, "stretch")
    reuse = feature_store.find_reusable(records, (), origin)
    network = extraction.Network("MobileNetV3-Small", "none", 32, 48, tmp_path)
    local, pieces = (
        extraction.divide(records, reuse, tmp_path / name, origin, network) for name in ("local", "workers")
    )
    assert sum(extraction.extract_pieces(local, backbone, executors.in_threads)) == 20
    extraction._network(network, "none")  # once, and not in both threads
    with ThreadPoolExecutor(2) as pool:
        for piece in pieces:
            assert [*pool.map(extraction.extract_piece, 2 * [piece])] == 2 * [len(piece.positions)]
    for one, other in zip(local, pieces, strict=True):
        vectors = [np.load(piece.target / extraction.VECTORS) for piece in (one, other)]
        np.testing.assert_allclose(*vectors, rtol=0, atol=1e-5)
        assert (one.target / "images.npy").read_bytes() == (other.target / "images.npy").read_bytes()
    assert len(list((tmp_path / "workers").iterdir())) == len(pieces)


def test_a_worker_with_other_weights_than_the_run_is_an_error(tmp_path):
    network = extraction.Network("MobileNetV3-Small", "none", 32, 48, tmp_path)
    piece = extraction.Piece(tmp_path / "piece", tmp_path, np.arange(3), {"weights": "imagenet"}, network)
    with pytest.raises(PipelineError, match=r"BACKBONE_WEIGHTS=none: expected .* imagenet, found none\. Provide"):
        extraction.extract_piece(piece)
    assert list(tmp_path.iterdir()) == []
