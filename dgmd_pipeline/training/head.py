"""Trains a head on stored features. Cross-validation chooses its kind, regularisation and epochs.

Cross-validation uses the training split only. The model is measured on the validation split, which does not affect the
training.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dgmd_pipeline.formatting import counted
from dgmd_pipeline.training import head_selection, linear, loop, runtime
from dgmd_pipeline.training.checkpoint import load_or_start
from dgmd_pipeline.training.config import OnEpoch, TrainedModel, TrainingConfig, weights_by_class
from dgmd_pipeline.training.features import LabeledFeatures
from dgmd_pipeline.training.head_fitting import HiddenHead, fit_linear
from dgmd_pipeline.training.runtime import one_blas_thread

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)


@one_blas_thread
def train_head(
    data: LabeledFeatures,
    validation: LabeledFeatures,
    groups: Sequence[str],
    classes: int,
    class_weights: Mapping[int, float],
    config: TrainingConfig,
    kind: str,
    on_epoch: OnEpoch,
    checkpoint: Path | None = None,
    prepare: Callable[[], object] = runtime.start_tensorflow,
) -> TrainedModel:
    """Choose a head by cross-validation on the training split `data`. Then fit it to the whole split (the final fit).

    Labels are from 0 to `classes` - 1; a class may be missing from the data. `groups` are the near-duplicate groups of
    the training images; a group is held out as a whole. `kind` is one of `head_selection.HEADS`. `class_weights`
    (class index -> weight; a missing weight is 1) weigh the training loss. `on_epoch` is called after each epoch of the
    final fit; a linear head has one epoch. After each epoch, the head is measured on `validation`.

    The result of the cross-validation is written to `selection.json` in the folder of `checkpoint` (.npz). The state of
    a head with hidden layers is written to `checkpoint` after each epoch. If these files exist, the training resumes
    from them. On a CPU, the resulting weights are the same as without an interruption. The files must be from a
    training with the same data and settings. The caller deletes them.

    `prepare` is called before the first use of Keras. It may take a while, for example because it waits for a thread
    that imports TensorFlow. So logistic regressions, which need no Keras, are cross-validated before it is called.

    Raises PipelineError if features, a loss or weights are not finite, and UnusableCheckpoint if a file is damaged.
    """
    weights = weights_by_class(classes, class_weights)
    selection_file = checkpoint.with_name(head_selection.FILE) if checkpoint else None
    selection = head_selection.load(selection_file) if selection_file and selection_file.exists() else None
    state = load_or_start(config._replace(seed=selection.seed) if selection else config, checkpoint)
    config = config._replace(seed=state.seed)
    components = linear.principal_components(data.vectors)

    @cache
    def hidden() -> HiddenHead:
        prepare()
        return HiddenHead(components, weights, config)

    if selection is None:
        selection = head_selection.select(data, groups, weights, config, kind, components, hidden)
        if selection_file:
            head_selection.save(selection, selection_file)
    head_selection.log_selection(selection)
    chosen = selection.chosen
    if chosen.kind == "hidden":
        log.info(
            "  fitting the head to all %s training images for %s", f"{len(groups):,}", counted(chosen.epochs, "epoch")
        )
        log_epochs = loop.log_epochs(on_epoch, chosen.epochs)
        final = config._replace(epochs=chosen.epochs)
        trained = hidden().fit(data, validation, final, state, log_epochs, checkpoint)
    else:
        prepare()
        trained = fit_linear(data, validation, weights, components, chosen.shrinkage, chosen.strength, state.seed)
        on_epoch(trained.history[0])
    return trained._replace(selection=selection)


@one_blas_thread
def refit(
    data: LabeledFeatures, chosen: head_selection.Option, class_weights: np.ndarray, config: TrainingConfig
) -> "keras.Model":
    """Fit a new head with the settings `chosen` to `data`, for example to a part of the training split.

    `class_weights` are float32 [classes]; `config` has a seed.
    """
    assert config.seed is not None  # noqa: S101
    components = linear.principal_components(data.vectors)
    if chosen.kind == "linear":
        return fit_linear(data, data, class_weights, components, chosen.shrinkage, chosen.strength, config.seed).model
    config = config._replace(epochs=chosen.epochs)
    hidden = HiddenHead(components, class_weights, config)
    return hidden.fit(data, data, config, load_or_start(config, None), lambda _: None).model
