"""The moving mean of a network's weights over the epochs of a training."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import keras
    import numpy as np

# The new mean is decay * previous mean + (1 - decay) * current weights. The decay starts at 0, because the first
# weights are soon outdated. It is 0.5 after WARM_UP epochs, and rises to MAX_DECAY.
MAX_DECAY = 0.7
WARM_UP = 5


class AveragingCallback(Protocol):
    """A Keras callback that averages weights."""

    variables: list["keras.Variable"]  # the state of the mean; checkpoints contain it

    def use_mean(self) -> None:
        """Set the network's weights to the mean."""


def build_averaging_callback(network: "keras.Model") -> AveragingCallback:
    """Return a Keras callback that makes each validation use the moving mean of the network's weights.

    Before each validation, the mean is updated with the network's weights, which include the statistics of batch
    normalisation. After validation, training continues from the network's own weights.

    In stochastic weight averaging (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
    Generalization", 2018), all epochs have the same share in the mean. Here, later epochs have larger shares.
    """
    import keras

    class MeanOfEpochs(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.epochs = keras.Variable(0, trainable=False, dtype="int32")
            self.mean = [keras.Variable(weight, trainable=False) for weight in network.weights]
            self.variables = [self.epochs, *self.mean]
            self.own_weights: list[np.ndarray] = []

        def on_test_begin(self, logs: object = None) -> None:
            del logs
            epochs = int(self.epochs.numpy())
            decay = min(MAX_DECAY, epochs / (epochs + WARM_UP))
            for mean, weight in zip(self.mean, network.weights, strict=True):
                mean.assign(decay * mean + (1 - decay) * weight)
            self.epochs.assign_add(1)
            self.own_weights = network.get_weights()
            self.use_mean()

        def on_test_end(self, logs: object = None) -> None:
            del logs
            network.set_weights(self.own_weights)

        def use_mean(self) -> None:
            network.set_weights([mean.numpy() for mean in self.mean])

    return MeanOfEpochs()
