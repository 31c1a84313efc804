"""Fits a head of a given kind with given settings to stored features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.training import features, linear, loop, networks, runtime
from dgmd_pipeline.training.checkpoint import TrainingState
from dgmd_pipeline.training.config import Epoch, OnEpoch, TrainedModel, TrainingConfig
from dgmd_pipeline.training.features import LabeledFeatures

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

CHUNK_ROWS = 4_096  # vectors that TensorFlow gets at a time: 34 MB at 2,048 dimensions


def fit_linear(
    data: LabeledFeatures,
    validation: LabeledFeatures,
    class_weights: np.ndarray,
    components: linear.Components,
    shrinkage: float,
    strength: float,
    seed: int,
) -> TrainedModel:
    """Fit a logistic regression (see `linear`) and measure it on `validation`. The history has one epoch."""
    vectors, labels = data
    penalty = linear.penalties(components, shrinkage) / strength
    kernel, bias = linear.unproject(linear.fit(vectors, labels, class_weights, components, penalty), components)
    loss, accuracy = linear.evaluate(vectors, labels, kernel, bias, class_weights)
    val_loss, val_accuracy = linear.evaluate(*validation, kernel, bias, None)
    row = Epoch(0, accuracy, loss, val_accuracy, val_loss, 0.0)
    return TrainedModel(networks.build_linear_head(kernel, bias), [row], seed)


class HiddenHead:
    """A head with hidden layers that can be fitted several times. TensorFlow traces it only once.

    Each fit starts from the same initial weights, unless it resumes a stopped fit.
    """

    def __init__(self, components: linear.Components, class_weights: np.ndarray, config: TrainingConfig) -> None:
        """Build a head that standardises vectors with the mean and the deviation of `components`.

        `class_weights` are float32 [classes]; `config` has a seed.
        """
        assert config.seed is not None  # noqa: S101
        runtime.set_seed(config.seed)
        mean, deviation = components.mean, components.deviation
        self._network = networks.build_head(len(mean), len(class_weights), config.dropout, mean, deviation)
        self._initial = loop.variable_values(loop.prepare(self._network, config))
        self._train, self._measure = _build_steps(self._network, class_weights)

    def fit(
        self,
        data: LabeledFeatures,
        held_out: LabeledFeatures,
        config: TrainingConfig,
        state: TrainingState,
        on_epoch: OnEpoch,
        checkpoint: Path | None = None,
    ) -> TrainedModel:
        """Train the head from `state` until `config.epochs` epochs are completed, including those in `state`.

        After each epoch, the head is measured on `held_out`. All fits share one network, so the next fit changes the
        weights of the returned model.
        """
        state = state if state.values else state._replace(values=self._initial)
        run_epoch = partial(self._run_epoch, data, held_out, config.batch_size, state.seed)
        return loop.run(self._network, run_epoch, config, state, on_epoch, checkpoint)

    def _run_epoch(
        self, data: LabeledFeatures, held_out: LabeledFeatures, batch_size: int, seed: int, epoch: int
    ) -> dict[str, float]:
        batches = features.divide_rows(np.arange(len(data.labels)), batch_size, (seed, epoch))
        loss, accuracy = _mean(self._train(*chunk) for chunk in _chunks(data, batches, batch_size))
        blocks = features.divide_rows(np.arange(len(held_out.labels)), CHUNK_ROWS)
        val_loss, val_accuracy = _mean(self._measure(*chunk) for chunk in _chunks(held_out, blocks, CHUNK_ROWS))
        return {"loss": loss, "accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}


def _chunks(
    data: LabeledFeatures, batches: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield chunks of one or more batches: vectors, labels, and the edges of the batches.

    Batch i has the rows edges[i] to edges[i + 1] - 1 of its chunk. A chunk of several batches has at most CHUNK_ROWS
    rows.
    """
    step = max(1, CHUNK_ROWS // batch_size)
    for first in range(0, len(batches), step):
        group = batches[first : first + step]
        rows = np.concatenate(group)
        yield data.vectors[rows], data.labels[rows], np.cumsum([0, *map(len, group)])


def _mean(totals: Iterable["tf.Tensor"]) -> tuple[float, float]:
    loss, correct, count = np.array([each.numpy() for each in totals], np.float64).sum(axis=0)
    return float(loss / count), float(correct / count)


def _build_steps(network: "keras.Model", class_weights: np.ndarray) -> tuple[Callable, Callable]:
    """Return two TensorFlow functions: the first trains on each batch of a chunk, the second only measures the chunk.

    They take a chunk that `_chunks` yields: vectors (float32 [n, d]), labels (int64 [n]) and edges (int64
    [batches + 1]). They return three numbers (float32 [3]): the sum of the losses, the number of correct predictions,
    and n. `class_weights` apply only to training.

    For a batch of 128 vectors of 1,280 values, Keras's `fit` needs 7 ms of CPU time. The first function needs 1.4 ms.
    """
    import keras
    import tensorflow as tf

    weights = tf.constant(class_weights)

    def predict(vectors: "tf.Tensor", labels: "tf.Tensor", training: bool) -> tuple["tf.Tensor", "tf.Tensor"]:
        probabilities = network(vectors, training=training)
        losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
        correct = tf.cast(tf.equal(tf.argmax(probabilities, axis=1), labels), tf.float32)
        return losses, correct

    def total(losses: "tf.Tensor", correct: "tf.Tensor") -> "tf.Tensor":
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(correct), tf.cast(tf.size(correct), tf.float32)])

    def train_batch(vectors: "tf.Tensor", labels: "tf.Tensor") -> "tf.Tensor":
        variables = network.trainable_variables
        with tf.GradientTape() as tape:
            losses, correct = predict(vectors, labels, training=True)
            losses *= tf.gather(weights, labels)
            gradients = tape.gradient(tf.reduce_mean(losses), variables)
        network.optimizer.apply(gradients, variables)
        return total(losses, correct)

    def train(vectors: "tf.Tensor", labels: "tf.Tensor", edges: "tf.Tensor") -> "tf.Tensor":
        def step(number: "tf.Tensor", sums: "tf.Tensor") -> tuple["tf.Tensor", "tf.Tensor"]:
            rows = slice(edges[number], edges[number + 1])
            return number + 1, sums + train_batch(vectors[rows], labels[rows])

        start = (tf.constant(0), tf.zeros(3))
        more = lambda number, _: number < tf.size(edges) - 1  # noqa: E731
        return tf.while_loop(more, step, start, parallel_iterations=1)[1]

    def measure(vectors: "tf.Tensor", labels: "tf.Tensor", edges: "tf.Tensor") -> "tf.Tensor":
        del edges
        return total(*predict(vectors, labels, training=False))

    vectors = tf.TensorSpec([None, network.input_shape[1]], tf.float32)
    signature = (vectors, tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64))
    train, measure = (tf.function(each, signature, autograph=False) for each in (train, measure))
    return runtime.one_executor_thread(train), runtime.one_executor_thread(measure)
