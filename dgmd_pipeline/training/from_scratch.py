"""Records -> a trained `cnn`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dgmd_pipeline.training import averaging, config, loop, networks
from dgmd_pipeline.training import checkpoint as training_checkpoint
from dgmd_pipeline.training.augmentation import augmented
from dgmd_pipeline.training.config import Epoch, TrainedModel, TrainingConfig

if TYPE_CHECKING:
    import tensorflow as tf

    from dgmd_pipeline.manifest import Fit

MIN_STEPS = (
    50  # of an epoch of `cnn`, at least: with 12 it stayed 5 points behind on 1,500 photographs of 32 x 32 pixels
)
MIN_BATCH_SIZE = 16  # images; batch normalisation needs some


def train_from_scratch(
    training: Callable[[int, int], "tf.data.Dataset"],
    validation: "tf.data.Dataset",
    size: tuple[int, int],
    classes: int,
    class_weights: dict[int, float],
    recipe: TrainingConfig,
    on_epoch: Callable[[Epoch], None],
    checkpoint: Path | None = None,
    image_fit: "Fit" = "stretch",
) -> TrainedModel:
    """Train the small network together with its head, from scratch, on pictures.

    A side is a dataset of (picture uint8 [height, width, 3], label int64 []) that knows its length. `training` is
    called with the seed and the epoch for one in an order that depends on these alone: TensorFlow mixes the seed that
    is set here into a dataset's own, so one that was opened earlier would depend on what the process did before. `size`
    is (height, width), `image_fit` how the model that comes back fits other sizes to it.
    The rest is as in `head.train_head`, but the model that comes back is the one to be served (`model.assemble`).
    """
    import keras
    import tensorflow as tf

    progress = training_checkpoint.begin(recipe, checkpoint)
    network = networks.build_cnn(*size)
    head = networks.build_head(network.output_shape[-1], classes, recipe.dropout)
    together = keras.Sequential([network, head])  # without the resizing: the records hold pictures of this size
    rest = validation.batch(recipe.batch_size).prefetch(tf.data.AUTOTUNE)

    def shuffled(epoch: int) -> "tf.data.Dataset":
        # A last batch of a few pictures would spoil batch normalisation's statistics just before they are used: batches
        # are made equal, and the few pictures that are then left over are others in each epoch.
        pictures = training(progress.seed, epoch)
        size = min(recipe.batch_size, max(len(pictures) // MIN_STEPS, MIN_BATCH_SIZE))
        even = len(pictures) // -(-len(pictures) // size)
        batches = pictures.batch(even, drop_remainder=True)
        return augmented(batches, recipe.augmentation, (progress.seed, epoch)).prefetch(tf.data.AUTOTUNE)

    weights = config.weights_by_class(classes, class_weights)
    show = loop.log_epochs(on_epoch, recipe.epochs)
    mean = averaging.mean_of_epochs(together)
    trained = loop.fit(together, shuffled, rest, weights, recipe, progress, show, checkpoint, mean)
    mean.use_mean()
    return trained._replace(model=networks.assemble(network, head, image_fit))
