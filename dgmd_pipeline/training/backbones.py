"""The backbones: their networks in `keras.applications` and the files of their weights. Does not import Keras.

`python -m dgmd_pipeline.training.backbones NAME FOLDER` downloads the ImageNet weights of a backbone into a folder. The
build of the container image runs this command.
"""

import hashlib
import http.client
import os
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

from dgmd_pipeline.errors import PipelineError

DOWNLOAD_TIMEOUT = 20  # a download fails after this number of seconds without a byte
INSTALLED = Path(sys.prefix, "share", "dgmd_pipeline")  # folder with the weights in the container image
_MINUS_ONE_TO_ONE = (1 / 127.5, -1.0)
# Pixels are scaled to 0..1, then standardised with ImageNet's mean and deviation of each channel. Keras calls this mode
# "torch".
_TORCH = (
    (1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225),
    (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
)


class Backbone(NamedTuple):
    """A network of `keras.applications` and the location of its ImageNet weights without the top layers."""

    function: str  # name of the function in `keras.applications` that builds the network
    url: str  # address of the file of weights, relative to WEIGHTS_URL
    md5: str | None  # checksum of the file, from the sources of Keras; None for MobileNetV2, which has none there
    scaling: tuple | None = None  # scale and offset for pixels of 0..255; None: the network scales them itself
    min_size: int = 32  # the smallest width and height in pixels that Keras accepts


WEIGHTS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/"
_KERNELS = "weights_tf_dim_ordering_tf_kernels"
# Files and checksums are from the sources of Keras 3 (keras/src/applications). This module downloads the files, because
# Keras would download a different file of MobileNetV2 for each image size.
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
BACKBONES = (*FROZEN, "cnn")  # values of BACKBONE; `cnn` is a small network that is trained from scratch


def is_frozen(backbone: str) -> bool:
    """Return whether the backbone's output for an image is fixed and can be stored: True for all but `cnn`."""
    return backbone in FROZEN


def weights_fingerprint(weights: str) -> str:
    """Return the fingerprint of BACKBONE_WEIGHTS: `imagenet`, `none`, or the SHA-256 of the file."""
    if weights in ("imagenet", "none"):
        return weights
    with _readable(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(name: str, weights: str, keras_home: Path) -> Path | None:
    """Return the file of weights (HDF5) of a backbone, or None for `cnn` and for the weights `none`.

    `weights` is `imagenet`, `none` or a file; `keras_home` is the folder of Keras's downloads (the setting
    `KERAS_HOME`). If the ImageNet weights are neither in this folder nor in INSTALLED, they are downloaded.
    Raises PipelineError if the file `weights` cannot be used, or if the ImageNet weights cannot be downloaded.
    """
    if not is_frozen(name) or weights == "none":
        return None
    return _imagenet_file(name, FROZEN[name], keras_home) if weights == "imagenet" else _readable(weights)


def _readable(weights: str) -> Path:
    path = Path(weights)
    if path.suffix != ".h5":  # the other formats of Keras can contain code
        raise PipelineError(
            f"BACKBONE_WEIGHTS={weights}: expected imagenet, none, or a file of weights. The file must be a "
            "*.weights.h5 that Keras's save_weights has written, or a *_notop.h5 of keras.applications."
        )
    if not path.is_file() or not os.access(path, os.R_OK):
        raise PipelineError(
            f"BACKBONE_WEIGHTS={weights}: there is no readable file {path.absolute()}. Set BACKBONE_WEIGHTS to "
            "the path of a readable file, to imagenet, or to none."
        )
    return path


def _imagenet_file(name: str, backbone: Backbone, keras_home: Path) -> Path:
    url = WEIGHTS_URL + backbone.url
    paths = [folder / "models" / Path(backbone.url).name for folder in (keras_home, INSTALLED)]
    for path in paths:
        if path.is_file() and backbone.md5 in (None, _md5(path)):
            return path
    path = paths[0]
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response, draft.open("wb") as file:  # noqa: S310
            shutil.copyfileobj(response, file)
        if backbone.md5 not in (None, _md5(draft)):
            raise OSError("the checksum of the download differs from the checksum in Keras")
        draft.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise PipelineError(
            f"The ImageNet weights of {name} are not in {path} and cannot be downloaded from {url} ({error}). "
            "Download the file on a machine with internet access and copy it to this path; "
            "or set BACKBONE_WEIGHTS to a file of weights, or to none; or set BACKBONE=cnn, which needs no weights."
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


if __name__ == "__main__":
    if sys.argv[1] not in FROZEN:
        sys.exit(f"{sys.argv[1]}: expected one of {', '.join(FROZEN)}.")
    try:
        print(weights_file(sys.argv[1], "imagenet", Path(sys.argv[2])))  # noqa: T201
    except PipelineError as error:
        print(error, "The container image is built without these weights.", sep="\n")  # noqa: T201
