"""Cuts a backbone between two blocks into a bottom and a top."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

TOP_SHARE = (0.25, 0.75)  # minimum and maximum share of the backbone's parameters that the top contains


def cut_backbone(network: "keras.Model") -> tuple["keras.Model", "keras.Model"]:
    """Return the bottom and the top of a backbone, two networks that share its layers: top(bottom(x)) == network(x).

    The cut is at a tensor that meets three conditions: every path from the input to the output passes through the
    tensor, the tensor is not the output of a convolution, and the top has a share of the parameters within TOP_SHARE.
    Fine-tuning stores the values of the tensor for each image, so the smallest tensor is chosen, or the first of
    several smallest ones. This tensor lies between two blocks, because networks are narrow between blocks and wide
    within blocks.
    """
    import keras

    total = above = network.count_params()
    cut_points = {id(operation) for operation in _find_cut_points(network)}
    candidates = []
    for operation in network.operations:
        above -= sum(int(np.prod(weight.shape)) for weight in getattr(operation, "weights", ()))
        # A cut after a convolution would separate the convolution from its batch normalisation.
        is_convolution = "Conv" in type(operation).__name__
        if id(operation) in cut_points and not is_convolution and TOP_SHARE[0] <= above / total <= TOP_SHARE[1]:
            candidates.append(operation.output)
    cut = min(candidates, key=lambda tensor: np.prod(tensor.shape[1:]))
    return keras.Model(network.input, cut), keras.Model(cut, network.output)


def _find_cut_points(network: "keras.Model") -> list["keras.Operation"]:
    """Return the operations that lie on every path from the network's input to its output."""
    import keras

    produced_at: dict[int, int] = {}  # id of a tensor -> position of the operation that computes it
    last_use = [0] * len(network.operations)
    for position, operation in enumerate(network.operations):  # in topological order
        if not isinstance(operation, keras.layers.InputLayer):
            for tensor in keras.tree.flatten(operation.input):
                last_use[produced_at[id(tensor)]] = position
        produced_at |= {id(tensor): position for tensor in keras.tree.flatten(operation.output)}
    found, reach = [], 0  # reach: position of the last operation that uses an output of a previous operation
    for position, operation in enumerate(network.operations):
        if reach <= position < last_use[position]:
            found.append(operation)
        reach = max(reach, last_use[position])
    return found
