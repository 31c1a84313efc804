"""Layers: backbones by name, the head, the servable whole."""

import hashlib
import http.client
import math
import os
import shutil
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import changed

if TYPE_CHECKING:
    import keras
    import numpy as np

HEAD_UNITS = (124, 64)
CNN_MAP = 16  # pixels: width or height, where `cnn` stops halving by strides
CNN_FILTERS = (24, 96)  # of its first convolution, doubled up to the second number
BN_MOMENTUM = 0.9  # Keras's 0.99 needs more steps to arrive than a small data set has
SEED_OF_NONE = 20_230_917  # `weights="none"` gives the same numbers in every process
FETCH_TIMEOUT = 20  # seconds without a byte

_MINUS_ONE_TO_ONE = (1 / 127.5, -1.0)
# Scaled to 0..1, then ImageNet's mean and standard deviation for each channel: what Keras calls "torch" mode.
_TORCH = (
    (1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225),
    (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
)


class Backbone(NamedTuple):
    """A network of `keras.applications`, and where its ImageNet weights without the top layers are."""

    function: str  # its name in `keras.applications`
    url: str  # below WEIGHTS_URL
    md5: str | None  # as Keras states it; it states none for MobileNetV2
    scaling: tuple | None = None  # scale and offset for pixels of 0..255; None: the network has its own layers for it
    min_size: int = 32  # the smallest width and height in pixels that Keras takes


WEIGHTS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/"
_KERNELS = "weights_tf_dim_ordering_tf_kernels"

# Files and checksums as in the sources of Keras 3 (keras/src/applications). They are loaded here and not by Keras,
# whose MobileNetV2 would pick another file for each picture size.
FROZEN = {
    "EfficientNetV2-B0": Backbone(
        "EfficientNetV2B0", "efficientnet_v2/efficientnetv2-b0_notop.h5", "893217f2bb855e2983157299931e43ff"
    ),
    "EfficientNetV2-B1": Backbone(
        "EfficientNetV2B1", "efficientnet_v2/efficientnetv2-b1_notop.h5", "0e80663031ca32d657f9caa404b6ec37"
    ),
    "EfficientNetV2-B2": Backbone(
        "EfficientNetV2B2", "efficientnet_v2/efficientnetv2-b2_notop.h5", "1dfe2e7a5d45b6632553a8961ea609eb"
    ),
    "EfficientNetV2-B3": Backbone(
        "EfficientNetV2B3", "efficientnet_v2/efficientnetv2-b3_notop.h5", "f6abf7b5849ac99a89b50dd3fd532856"
    ),
    "EfficientNetV2-S": Backbone(
        "EfficientNetV2S", "efficientnet_v2/efficientnetv2-s_notop.h5", "af0682fb74e8c54910f2d4393339c070"
    ),
    "MobileNetV2": Backbone(
        "MobileNetV2", f"mobilenet_v2/mobilenet_v2_{_KERNELS}_1.0_224_no_top.h5", None, _MINUS_ONE_TO_ONE
    ),
    "MobileNetV3-Small": Backbone(
        "MobileNetV3Small",
        "mobilenet_v3/weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
        "d3e8ec802a04aa4fc771ee12a9a9b836",
    ),
    "MobileNetV3-Large": Backbone(
        "MobileNetV3Large",
        "mobilenet_v3/weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
        "07fb09a5933dd0c8eaafa16978110389",
    ),
    "DenseNet121": Backbone(
        "DenseNet121", f"densenet/densenet121_{_KERNELS}_notop.h5", "30ee3e1110167f948a6b9946edeeb738", _TORCH
    ),
    "ResNet50V2": Backbone(
        "ResNet50V2", f"resnet/resnet50v2_{_KERNELS}_notop.h5", "fac2f116257151a9d068a22e544a4917", _MINUS_ONE_TO_ONE
    ),
    "Xception": Backbone(
        "Xception", f"xception/xception_{_KERNELS}_notop.h5", "b0042744bf5b25fce3cb969f33bebb97", _MINUS_ONE_TO_ONE, 71
    ),
    "InceptionV3": Backbone(
        "InceptionV3",
        f"inception_v3/inception_v3_{_KERNELS}_notop.h5",
        "bcbd6486424b2319ff4ef7d526e38f63",
        _MINUS_ONE_TO_ONE,
        75,
    ),
}
BACKBONES = (*FROZEN, "cnn")  # what BACKBONE may be; `cnn` is small, trained from scratch, and has no weights to load


def start_tensorflow() -> None:
    """Import TensorFlow without what its libraries write to the process's standard error while they load."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        import tensorflow  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def is_frozen(backbone: str) -> bool:
    """Whether its output for a picture never changes, so that it can be stored: all but `cnn`."""
    return backbone in FROZEN


def check_weights(backbone: str, weights: str, keras_home: Path) -> None:
    """See to it that the weights can be loaded later, without importing Keras: hours of work may lie in between.

    `weights` is `imagenet`, `none` or a file, `keras_home` the folder where Keras keeps what it downloads
    (`KERAS_HOME`, `~/.keras`). ImageNet weights that are not there yet are fetched now, as they are needed anyway.
    Raises PipelineError where there is no such file, or where it cannot be fetched.
    """
    _weights_file(backbone, weights, keras_home)


def weights_identity(weights: str) -> str:
    """Return what tells these weights from others: the word itself, or a file's SHA-256 (its name does not matter)."""
    if weights in ("imagenet", "none"):
        return weights
    with _readable(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_file(name: str, weights: str, keras_home: Path) -> Path | None:
    if not is_frozen(name) or weights == "none":
        return None
    return _imagenet(name, FROZEN[name], keras_home) if weights == "imagenet" else _readable(weights)


def _readable(weights: str) -> Path:
    path = Path(weights)
    if path.suffix != ".h5":  # what else Keras loads can hold code
        raise PipelineError(
            f"BACKBONE_WEIGHTS={weights}: expected imagenet, none, or a file of weights: *.weights.h5 as Keras's "
            "save_weights writes it, or *_notop.h5 of keras.applications."
        )
    if not path.is_file() or not os.access(path, os.R_OK):
        raise PipelineError(
            f"BACKBONE_WEIGHTS={weights}: there is no readable file {path.absolute()}. Give the path of one, "
            "or imagenet, or none."
        )
    return path


def _imagenet(name: str, backbone: Backbone, keras_home: Path) -> Path:
    url = WEIGHTS_URL + backbone.url
    path = keras_home / "models" / Path(backbone.url).name
    if path.is_file() and backbone.md5 in (None, _md5(path)):
        return path
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT) as answer, draft.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(answer, file)
        if backbone.md5 not in (None, _md5(draft)):
            raise OSError("what came has another checksum than Keras states")
        draft.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise PipelineError(
            f"The ImageNet weights of {name} are not in {path} and cannot be fetched from {url} ({error}). "
            "On a machine that has a route, download that file and copy it to that path; "
            "or set BACKBONE_WEIGHTS to a file of weights, or to none; or set BACKBONE=cnn, which needs none."
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def build_backbone(backbone: str, weights: str, height: int, width: int, keras_home: Path) -> "keras.Model":
    """Build a frozen network that turns pictures [batch, height, width, 3] of 0..255 into vectors (float32 [batch, d]).

    Scaling is inside, batch normalisation uses the statistics that came with the weights. `weights="none"` sets Keras's
    random seed, so that two processes build the same network.
    Raises PipelineError for weights that are missing or another network's, and for pictures too small for the network.
    """
    import keras

    known = FROZEN[backbone]
    if min(height, width) < known.min_size:
        raise PipelineError(
            f"{backbone} needs pictures of at least {known.min_size} x {known.min_size} pixels, "
            f"IMAGE_WIDTH={width} and IMAGE_HEIGHT={height} are smaller; raise them or choose BACKBONE=cnn."
        )
    path = _weights_file(backbone, weights, keras_home)
    if path is None:
        keras.utils.set_random_seed(SEED_OF_NONE)
    pixels = keras.Input((height, width, 3), name="pixels")
    scaled = pixels if known.scaling is None else keras.layers.Rescaling(*known.scaling, name="scaling")(pixels)
    build = getattr(keras.applications, known.function)
    vector = build(include_top=False, weights=None, input_tensor=scaled, pooling="avg").output
    network = keras.Model(pixels, vector, name="backbone")  # EfficientNetV2 looks up its layers by the name given to it
    if path is not None:
        _load_weights(network, path, backbone)
    network.trainable = False
    return network


def _load_weights(network: "keras.Model", path: Path, name: str) -> None:
    import numpy as np

    # Keras warns about a layer that the file does not have and leaves it as it was: so it must not be a number before.
    network.set_weights([np.full_like(values, np.nan) for values in network.get_weights()])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            network.load_weights(path)
        missing = sum(bool(np.isnan(values).any()) for values in network.get_weights())
        if missing:
            raise ValueError(f"{missing} of its {len(network.weights)} arrays are missing or hold no numbers")
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise PipelineError(
            f"The weights in {path} are not those of {name} without its top layers ({reason}). "
            "Choose the BACKBONE that they were saved from, or another BACKBONE_WEIGHTS."
        ) from error


def build_cnn(height: int, width: int) -> "keras.Model":
    """Build a small trainable network: pictures [batch, height, width, 3] of 0..255 -> vectors (float32 [batch, d]).

    Strided convolutions down to a map of at most 16 x 16, a convolution there, one on half of it, then each channel's
    largest value. Its first weights come from Keras's random numbers. Chosen by measurement: docs/measurements.md.
    """
    import keras
    from keras import layers

    pixels = keras.Input((height, width, 3), name="pixels")
    x = layers.Rescaling(1 / 255, name="scaling")(pixels)
    halvings = max(0, math.ceil(math.log2(max(height, width) / CNN_MAP)))
    for number in range(halvings + 2):
        if number == halvings + 1:
            x = layers.MaxPooling2D(padding="same")(x)
        filters = min(CNN_FILTERS[0] << number, CNN_FILTERS[1])
        strides = 2 if number < halvings else 1
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=BN_MOMENTUM)(x)
        x = layers.ReLU()(x)
    return keras.Model(pixels, layers.GlobalMaxPooling2D()(x), name="backbone")


def build_head(
    features: int, classes: int, dropout: float, whitening: "tuple[np.ndarray, np.ndarray] | None" = None
) -> "keras.Model":
    """Build what turns feature vectors (float32 [batch, features]) into probabilities (float32 [batch, classes]).

    `whitening` is a kernel (float32 [features, k]) and a bias (float32 [k]): what the vectors are multiplied by first,
    and what is then added. Training leaves both as they are.
    """
    import keras
    from keras import layers

    vector = keras.Input((features,), name="features")
    x = vector
    if whitening is not None:
        fixed = layers.Dense(len(whitening[1]), trainable=False, name="whitening")
        x = fixed(vector)
        fixed.set_weights(whitening)
    for units in HEAD_UNITS:
        x = layers.Dense(units, use_bias=False)(x)
        x = layers.BatchNormalization(momentum=BN_MOMENTUM)(x)
        x = layers.ReLU()(x)
        x = layers.Dropout(dropout)(x)
    x = layers.Dense(classes, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(vector, x, name="head")


def load(path: Path) -> "keras.Model":
    """Load a saved network. Raises PipelineError where the file is gone or was changed."""
    import keras

    try:
        return keras.models.load_model(path, compile=False)
    except (ValueError, TypeError, OSError, KeyError, zipfile.BadZipFile) as error:  # another Keras's: TypeError
        raise changed(path, error) from error


def bytes_of(network: "keras.Model") -> int:
    """Return about how many bytes a saved network takes: its float32 weights, and a little for the rest."""
    return 4 * network.count_params() + 200_000


def assemble(backbone: "keras.Model", head: "keras.Model") -> "keras.Model":
    """Make the servable whole: pictures (uint8 [batch, height, width, 3]) -> probabilities (float32 [batch, classes]).

    Pictures of any size are stretched to the backbone's, bilinear and antialiased. The weights are shared, not copied.
    There are only layers that Keras itself knows, so `keras.models.load_model` needs nothing of this package.
    """
    import keras
    from keras import layers

    _, height, width, _ = backbone.input_shape
    pictures = keras.Input((None, None, 3), dtype="uint8", name="pictures")
    x = layers.Rescaling(1.0, name="float")(pictures)  # Resizing would cut what it makes of uint8 down to whole levels
    x = layers.Resizing(height, width, interpolation="bilinear", antialias=True, name="resizing")(x)
    return keras.Model(pictures, head(backbone(x)), name="classifier")
