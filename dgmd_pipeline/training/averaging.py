"""A training's epochs -> the mean of their weights, in place whenever the network is measured."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

KEPT = 0.7  # of the mean at the end of an epoch, at most; the new weights make up the rest
WARM_UP = 5  # epochs: after so many the mean keeps half, before that less, as the first weights are soon outdated


def mean_of_epochs(network: "keras.Model") -> Any:
    """Return a Keras callback that measures a network in training with the moving mean of its weights.

    Once an epoch, before validation, the mean takes in the weights and the statistics of batch normalisation. It is
    that of stochastic weight averaging (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
    Generalization", 2018), but with exponentially falling parts. After validation, training continues from the weights
    themselves.

    The callback's `variables` hold the mean; together with the network's they are what a training continues from. Its
    `use_mean()` leaves the mean in the network.
    """
    import keras

    class MeanOfEpochs(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.epochs = keras.Variable(0, trainable=False, dtype="int32")
            self.mean = [keras.Variable(weight, trainable=False) for weight in network.weights]
            self.variables = [self.epochs, *self.mean]
            self.own: list[Any] = []

        def on_test_begin(self, logs: Any = None) -> None:
            del logs
            epochs = int(self.epochs.numpy())
            kept = min(KEPT, epochs / (epochs + WARM_UP))
            for mean, weight in zip(self.mean, network.weights, strict=True):
                mean.assign(kept * mean + (1 - kept) * weight)
            self.epochs.assign_add(1)
            self.own = network.get_weights()
            self.use_mean()

        def on_test_end(self, logs: Any = None) -> None:
            del logs
            network.set_weights(self.own)

        def use_mean(self) -> None:
            network.set_weights([mean.numpy() for mean in self.mean])

    return MeanOfEpochs()
