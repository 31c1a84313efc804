"""The Keras networks: frozen backbones, `cnn`, heads, and the servable model."""

import json
import math
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import changed_file_error
from dgmd_pipeline.training import backbones, features, runtime

if TYPE_CHECKING:
    import keras
    import numpy as np

    from dgmd_pipeline.manifest import Fit

HEAD_UNITS = (124, 64)
CNN_MAP_SIZE = 16  # maximum width and height of the feature map after the strided convolutions of `cnn`
# Numbers of filters in the convolutions of `cnn`. The first convolution has 24 filters. Each later convolution has
# twice as many filters as the previous one, up to a maximum of 96. For the last convolution, the maximum is 192.
CNN_FILTERS = (24, 96, 192)
BN_MOMENTUM = 0.9  # with Keras's default of 0.99, the statistics do not converge in the few steps of a small data set
RANDOM_WEIGHTS_SEED = 20_230_917  # fixed seed, so that `weights="none"` gives the same weights in every process


def build_backbone(backbone: str, weights: str, height: int, width: int, keras_home: Path) -> "keras.Model":
    """Build a frozen network: images [batch, height, width, 3] of 0..255 -> vectors (float32 [batch, d]).

    The network scales the pixels. Batch normalisation uses the statistics of the loaded weights. `weights="none"` sets
    Keras's random seed, so every process builds the same network.
    Raises PipelineError if the weights are missing or belong to another network, or if the images are too small.
    """
    import keras

    known = backbones.FROZEN[backbone]
    if min(height, width) < known.min_size:
        raise PipelineError(
            f"{backbone} needs images of at least {known.min_size} x {known.min_size} pixels; "
            f"found IMAGE_WIDTH={width} and IMAGE_HEIGHT={height}. Raise them or choose BACKBONE=cnn."
        )
    path = backbones.weights_file(backbone, weights, keras_home)
    if path is None:
        keras.utils.set_random_seed(RANDOM_WEIGHTS_SEED)
    pixels = keras.Input((height, width, 3), name="pixels")
    scaled = pixels if known.scaling is None else keras.layers.Rescaling(*known.scaling, name="scaling")(pixels)
    build = getattr(keras.applications, known.function)
    vector = build(include_top=False, weights=None, input_tensor=scaled, pooling="avg").output
    # The name is not passed to `build`, because EfficientNetV2 chooses layers by the name of the network.
    network = keras.Model(pixels, vector, name="backbone")
    if path is not None:
        _load_weights(network, path, backbone)
    network.trainable = False
    return network


def _load_weights(network: "keras.Model", path: Path, name: str) -> None:
    import numpy as np

    # If the file lacks a layer, Keras only warns and does not change the layer's weights. So all weights are set to NaN
    # first. Weights that are still NaN after loading are missing from the file.
    network.set_weights([np.full_like(values, np.nan) for values in network.get_weights()])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            network.load_weights(path)
        missing = sum(bool(np.isnan(values).any()) for values in network.get_weights())
        if missing:
            raise ValueError(f"{missing} of the network's {len(network.weights)} arrays are missing or contain NaN")
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise PipelineError(
            f"The weights in {path} are not those of {name} without its top layers ({reason}). "
            "Choose the BACKBONE that they were saved from, or another BACKBONE_WEIGHTS."
        ) from error


def build_cnn(height: int, width: int) -> "keras.Model":
    """Build a small trainable network: images [batch, height, width, 3] of 0..255 -> vectors (float32 [batch, d]).

    Strided convolutions reduce the image to a map of at most 16 x 16. Three more convolutions follow. Max pooling
    halves the map before the second and the third of them. The vector holds the largest value of each channel. Keras's
    random seed determines the initial weights. docs/measurements/cnn.md compares this network with others.
    """
    import keras
    from keras import layers

    pixels = keras.Input((height, width, 3), name="pixels")
    x = layers.Rescaling(1 / 255, name="scaling")(pixels)
    halvings = max(0, math.ceil(math.log2(max(height, width) / CNN_MAP_SIZE)))
    first, most, most_at_end = CNN_FILTERS
    for number in range(halvings + 3):
        if number > halvings:
            x = layers.MaxPooling2D(padding="same")(x)
        filters = min(first << number, most if number < halvings + 2 else most_at_end)
        strides = 2 if number < halvings else 1
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=BN_MOMENTUM)(x)
        x = layers.ReLU()(x)
    return keras.Model(pixels, layers.GlobalMaxPooling2D()(x), name="backbone")


def build_head(
    features: int, classes: int, dropout: float, mean: "np.ndarray | None" = None, deviation: float = 1.0
) -> "keras.Model":
    """Build a head with two hidden layers.

    It turns vectors (float32 [batch, features]) into probabilities (float32 [batch, classes]). If `mean` (float
    [features]) is given, the head first subtracts it from the vectors, and divides the differences by `deviation`.
    """
    import keras
    from keras import layers

    vector = keras.Input((features,), name="features")
    x = vector
    if mean is not None:
        x = layers.Rescaling(1 / deviation, (-mean / deviation).tolist(), name="centring")(vector)
    for units in HEAD_UNITS:
        x = layers.Dense(units, use_bias=False)(x)
        x = layers.BatchNormalization(momentum=BN_MOMENTUM)(x)
        x = layers.ReLU()(x)
        x = layers.Dropout(dropout)(x)
    x = layers.Dense(classes, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(vector, x, name="head")


def build_linear_head(kernel: "np.ndarray", bias: "np.ndarray") -> "keras.Model":
    """Build a logistic regression from its kernel (float32 [features, classes]) and bias (float32 [classes])."""
    import keras
    from keras import layers

    vector = keras.Input((len(kernel),), name="features")
    layer = layers.Dense(len(bias), activation="softmax", dtype="float32", name="probabilities")
    head = keras.Model(vector, layer(vector), name="head")
    layer.set_weights([kernel, bias])
    return head


def load(path: Path) -> "keras.Model":
    """Load a saved network. Raises PipelineError if the file is missing or was changed."""
    import keras

    try:
        return keras.models.load_model(path, compile=False)
    # Keras raises TypeError if another version of Keras saved the file.
    except (ValueError, TypeError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise changed_file_error(path, error) from error


def has_backbone(network: "keras.Model", backbone: "keras.Model") -> bool:
    """Return whether a servable network consists of this backbone, with the same weights, and a head.

    Only the names of the backbone's layers may differ.
    """
    import numpy as np

    if [layer.name for layer in network.layers[-2:]] != ["backbone", "head"]:
        return False
    found = network.layers[-2]
    return _kinds(found) == _kinds(backbone) and all(map(np.array_equal, found.get_weights(), backbone.get_weights()))


def _kinds(network: "keras.Model") -> list[tuple[type, str]]:
    """Return the type and the configuration of each layer, without its name."""
    # A loaded layer has lists where a built layer has tuples. As JSON, a list and a tuple are equal.
    return [(type(each), json.dumps(each.get_config() | {"name": ""}, default=str)) for each in network.layers]


def check_file(path: Path) -> None:
    """Raise PipelineError if the file of a network is missing or was changed. The network is not loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
    except (OSError, zipfile.BadZipFile) as error:
        raise changed_file_error(path, error) from error


def estimate_bytes(network: "keras.Model") -> int:
    """Return the approximate size of a saved network in bytes: its float32 weights and 200 kB for its structure."""
    return 4 * network.count_params() + 200_000


def assemble(backbone: "keras.Model", head: "keras.Model", fit: "Fit") -> "keras.Model":
    """Build the servable model: images (uint8 [batch, height, width, 3]) -> probabilities (float32 [batch, classes]).

    Images of any size are fitted to the backbone's input size. The weights are shared, not copied. All layers are
    Keras's own, so `keras.models.load_model` needs nothing from this package. The optimizer does not become a part of
    the model.
    """
    import keras

    for part in (backbone, head):
        part.compiled = False  # otherwise Keras saves the name of the optimizer's class, which this package defines
    _, height, width, _ = backbone.input_shape
    images = keras.Input((None, None, 3), dtype="uint8", name="pictures")  # the name is public: clients may use it
    return keras.Model(images, head(backbone(fit_images(images, height, width, fit))), name="classifier")


def fit_images(images: "keras.KerasTensor", height: int, width: int, fit: "Fit") -> "keras.KerasTensor":
    """Resize images (uint8 [batch, any, any, 3]) as for the records. Return float32 [batch, height, width, 3].

    The interpolation is bilinear and antialiased. Values are rounded to whole numbers, as in the records. Without
    rounding, one prediction in 150 differed from the prediction for the record (docs/measurements/records.md).
    """
    import keras
    from keras import layers

    x = layers.Rescaling(1.0, name="float")(images)  # for uint8 input, Resizing truncates fractions
    x = layers.Resizing(
        height,
        width,
        interpolation="bilinear",
        antialias=True,
        crop_to_aspect_ratio=fit == "crop",
        pad_to_aspect_ratio=fit == "letterbox",
        name="resizing",
    )(x)
    return keras.ops.round(x)


def build_frozen(
    backbone: str, weights: str, height: int, width: int, keras_home: Path, extracts: bool
) -> "keras.Model":
    """Import TensorFlow and build a frozen network.

    If `extracts` is true, also trace the graph that extracts features.
    """
    runtime.start_tensorflow()
    network = build_backbone(backbone, weights, height, width, keras_home)
    if extracts:
        features.freeze(network)
    return network
