"""Networks: backbones and their weights, `cnn`, and the servable model."""

import hashlib
import importlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.training import CONFIG

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.serving import inputs
from dgmd_pipeline.training import backbones, loop, networks
from dgmd_pipeline.training.backbone_cut import cut_backbone

SMALL = "MobileNetV3-Small"
NETWORK_OF_NONE = f"""
import hashlib
from dgmd_pipeline.training import networks
network = networks.build_backbone({SMALL!r}, "none", 32, 32, None)
print(hashlib.sha256(b"".join(w.tobytes() for w in network.get_weights())).hexdigest())
"""
LOAD_AND_PREDICT = """
import sys
sys.modules["dgmd_pipeline"] = None  # importing it is an error from here on
import keras, numpy
images = numpy.load("images.npy")
numpy.save("probabilities.npy", keras.models.load_model("model.keras").predict(images, verbose=0))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("keras-home")


@pytest.fixture(scope="module")
def small(home):
    return networks.build_backbone(SMALL, "none", 32, 32, home)


@pytest.fixture(scope="module")
def classifier(small):
    head = networks.build_head(small.output_shape[-1], 5, 0.2)
    loop.prepare(head, CONFIG)  # as a training leaves it
    return networks.assemble(small, head, "stretch")


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_as_keras_applications_do(network, path):
    import h5py
    from keras.src.legacy.saving import legacy_h5_format

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, network)


def assert_same_weights(one, other):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_model_accepts_uint8_images_of_any_size(classifier):
    assert classifier.input_shape == (None, None, None, 3)
    assert classifier.inputs[0].dtype == "uint8"
    for shape in ((3, 32, 32, 3), (1, 50, 20, 3), (2, 8, 100, 3)):
        probabilities = classifier.predict(random_images(*shape), verbose=0)
        assert probabilities.shape == (shape[0], 5)
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_the_assembled_model_is_the_head_on_the_backbone_for_images_of_the_target_size(classifier, small):
    batch = random_images(4, 32, 32, 3)
    expected = classifier.get_layer("head").predict(small.predict(batch, verbose=0), verbose=0)
    np.testing.assert_allclose(classifier.predict(batch, verbose=0), expected, atol=1e-6)


def test_images_of_the_target_size_are_not_changed_by_resizing(classifier):
    import keras

    resizing = keras.Model(classifier.input, classifier.get_layer("resizing").output)
    batch = random_images(2, 32, 32, 3)
    np.testing.assert_array_equal(resizing.predict(batch, verbose=0), batch)


def test_resizing_is_bilinear_and_antialiased_as_pillow_does_it(classifier):
    import keras

    resizing = keras.Model(classifier.input, classifier.get_layer("resizing").output)
    image = Image.effect_mandelbrot((200, 90), (-2, -1, 1, 1), 50).convert("RGB")
    ours = resizing.predict(np.asarray(image)[None], verbose=0)[0]
    pillow = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(ours - pillow).max() < 1.5  # Pillow rounds twice


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_a_saved_model_has_its_size_and_fit(fit, tmp_path):
    cnn = networks.build_cnn(32, 32)
    networks.assemble(cnn, networks.build_head(cnn.output_shape[-1], 5, 0.2), fit).save(tmp_path / "model.keras")
    loaded = networks.load(tmp_path / "model.keras")
    assert (inputs.input_size(loaded), inputs.input_fit(loaded)) == ((32, 32), fit)


def test_a_backbone_is_found_in_a_loaded_model(tmp_path):
    import keras

    pixels = keras.Input((8, 8, 3))
    scaled = keras.layers.Rescaling((0.1, 0.2, 0.3), (0.0, 0.5, 1.0))(pixels)  # as in DenseNet121
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Dense(4)(scaled))
    backbone = keras.Model(pixels, outputs, name="backbone")
    networks.assemble(backbone, networks.build_head(4, 2, 0.1), "stretch").save(tmp_path / "model.keras")
    loaded = networks.load(tmp_path / "model.keras")
    assert networks.has_backbone(loaded, backbone)
    backbone.set_weights([values + 1 for values in backbone.get_weights()])
    assert not networks.has_backbone(loaded, backbone)


def test_a_file_that_was_changed_is_noticed_without_loading_it(tmp_path):
    path, cnn = tmp_path / "model.keras", networks.build_cnn(32, 32)
    cnn.save(path)
    networks.check_file(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for broken in (bytes(content), bytes(content[:99]), None):
        path.write_bytes(broken) if broken else path.unlink()
        with pytest.raises(PipelineError, match=f"{path}: .*It was changed after it was written: delete the folder"):
            networks.check_file(path)


def test_the_saved_model_loads_and_predicts_without_this_package(classifier, tmp_path):
    batch = random_images(2, 40, 60, 3)
    classifier.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", batch)
    subprocess.run([sys.executable, "-c", LOAD_AND_PREDICT], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), classifier.predict(batch, verbose=0), atol=1e-6)


def test_random_weights_are_the_same_in_every_process(small):
    expected = hashlib.sha256(b"".join(weights.tobytes() for weights in small.get_weights())).hexdigest()
    done = subprocess.run([sys.executable, "-c", NETWORK_OF_NONE], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == expected


def test_a_backbone_is_frozen(small):
    assert not small.trainable_weights
    batch = random_images(2, 32, 32, 3)
    np.testing.assert_array_equal(small(batch, training=True), small(batch, training=False))


def test_a_weights_file_is_loaded(small, tmp_path, home):
    rng = np.random.default_rng(1)
    ours = [rng.random(weights.shape, np.float32) for weights in small.get_weights()]
    path = tmp_path / "mine.weights.h5"
    before = small.get_weights()
    try:
        small.set_weights(ours)
        small.save_weights(path)
        assert_same_weights(networks.build_backbone(SMALL, str(path), 48, 64, home), small)
    finally:
        small.set_weights(before)


@pytest.mark.parametrize("name", ["MobileNetV2", SMALL])  # scaled by a layer of ours, and by the network itself
def test_weights_of_a_keras_application_are_loaded(name, tmp_path, home):
    import keras

    plain = getattr(keras.applications, backbones.FROZEN[name].function)(
        include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg"
    )
    path = tmp_path / "plain_notop.h5"
    write_as_keras_applications_do(plain, path)
    assert_same_weights(networks.build_backbone(name, str(path), 64, 32, home), plain)


def test_imagenet_weights_are_taken_from_the_cache_of_keras(tmp_path):
    made = networks.build_backbone("MobileNetV2", "none", 32, 32, tmp_path)
    made.set_weights([weights + 1 for weights in made.get_weights()])
    name = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
    write_as_keras_applications_do(made, tmp_path / "models" / name)
    assert backbones.weights_file("MobileNetV2", "imagenet", tmp_path)
    assert_same_weights(networks.build_backbone("MobileNetV2", "imagenet", 32, 32, tmp_path), made)


def test_weights_of_another_network_are_refused(small, tmp_path, home):
    path = tmp_path / "small.weights.h5"
    small.save_weights(path)
    with pytest.raises(PipelineError, match=r"small\.weights\.h5 are not those of MobileNetV2"):
        networks.build_backbone("MobileNetV2", str(path), 32, 32, home)
    legacy = tmp_path / "small_notop.h5"
    write_as_keras_applications_do(small, legacy)
    with pytest.raises(PipelineError, match=r"small_notop\.h5 are not those of MobileNetV2"):
        networks.build_backbone("MobileNetV2", str(legacy), 32, 32, home)


def test_a_file_without_weights_is_refused(tmp_path, home):
    path = tmp_path / "no.weights.h5"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(PipelineError, match=r"no\.weights\.h5 are not those of"):
        networks.build_backbone(SMALL, str(path), 32, 32, home)


def test_images_too_small_for_a_backbone_are_refused(home):
    with pytest.raises(PipelineError, match="Xception needs images of at least 71 x 71"):
        networks.build_backbone("Xception", "none", 70, 200, home)


def keras_preprocessing(name):
    """Return the function that Keras keeps beside a network for the pixels that its weights expect."""
    folder = backbones.FROZEN[name].url.split("/")[0]
    module = importlib.import_module(f"keras.applications.{'resnet_v2' if folder == 'resnet' else folder}")
    return module.preprocess_input


@pytest.mark.parametrize("name", backbones.FROZEN)
def test_every_backbone_scales_pixels_as_keras_does(name):
    import keras

    scaling = backbones.FROZEN[name].scaling
    images = random_images(2, 33, 34, 3).astype(np.float32)
    scaled = images if scaling is None else np.asarray(keras.layers.Rescaling(*scaling)(images))
    np.testing.assert_allclose(scaled, keras_preprocessing(name)(images.copy()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(backbones.FROZEN) - {f"EfficientNetV2-B{size}" for size in (0, 2, 3)}))
def test_every_backbone_can_be_cut_for_fine_tuning(name, home):
    """B1 stands for B0 to B3."""
    size = max(backbones.FROZEN[name].min_size, 33)
    network = networks.build_backbone(name, "none", size, size + 1, home)
    bottom, top = cut_backbone(network)
    images = random_images(1, size, size + 1, 3).astype(np.float32)
    np.testing.assert_allclose(top(bottom(images)), network(images), rtol=1e-4, atol=1e-4)
    assert 0.25 <= top.count_params() / network.count_params() <= 0.75


@pytest.mark.parametrize("name", [SMALL, "MobileNetV2", "DenseNet121"])  # one for each kind of scaling
def test_a_backbone_computes_what_keras_computes_from_preprocessed_images(name, home):
    import keras

    ours = networks.build_backbone(name, "none", 33, 34, home)
    function = getattr(keras.applications, backbones.FROZEN[name].function)
    plain = function(include_top=False, weights=None, input_shape=(33, 34, 3), pooling="avg")
    plain.set_weights(ours.get_weights())
    images = random_images(2, 33, 34, 3).astype(np.float32)
    np.testing.assert_allclose(ours(images), plain(keras_preprocessing(name)(images.copy())), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("height, width", [(8, 8), (32, 32), (192, 256), (300, 9)])
def test_the_cnn_accepts_any_size(height, width):
    network = networks.build_cnn(height, width)
    assert network(random_images(1, height, width, 3)).shape == (1, network.output_shape[-1])
    assert network.count_params() < 600_000
