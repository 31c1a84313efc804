"""Finds the epoch with the lowest held-out loss, and ends a training that no longer improves."""

from collections.abc import Sequence

from dgmd_pipeline.training.config import Epoch, OnEpoch


class StopEarly(Exception):
    """Ends a training."""


def best_epoch(history: Sequence[Epoch]) -> Epoch:
    """Return the epoch with the lowest held-out loss, or the first of several such epochs."""
    return min(history, key=lambda row: row.val_loss)


def after(patience: int, history: list[Epoch]) -> OnEpoch:
    """Return a callback that appends each epoch to `history` and raises StopEarly when the training should end.

    It should end when the last `patience` epochs have not lowered the held-out loss.
    """

    def on_epoch(row: Epoch) -> None:
        history.append(row)
        if row.epoch - best_epoch(history).epoch >= patience:
            raise StopEarly

    return on_epoch
