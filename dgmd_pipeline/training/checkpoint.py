"""Checkpoint files, which hold the state of a training."""

import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training.config import Epoch, TrainingConfig

DAMAGED = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
)  # errors from reading a damaged checkpoint


class UnusableCheckpoint(PipelineError):
    """A checkpoint is damaged or belongs to another training. Delete the checkpoint to start again."""


class TrainingState(NamedTuple):
    """The state of a training after its last completed epoch. A checkpoint file holds this state."""

    seed: int
    history: list[Epoch]
    values: list[np.ndarray]  # values of the variables that `loop.run` saves; empty before the first epoch


def load_or_start(config: TrainingConfig, checkpoint: Path | None) -> TrainingState:
    """Return the state in `checkpoint`, or the initial state if this file does not exist.

    Raises UnusableCheckpoint if the file is damaged.
    """
    if checkpoint and checkpoint.exists():
        return _load(checkpoint)
    return TrainingState(secrets.randbits(31) if config.seed is None else config.seed, [], [])


def completed_epochs(checkpoint: Path) -> int:
    """Return the number of epochs in a checkpoint, without reading its weights; 0 if it is missing or damaged."""
    try:
        with np.load(checkpoint, allow_pickle=False) as file:
            return len(file["history"])
    except DAMAGED:  # the training logs the damage and starts again
        return 0


def _load(checkpoint: Path) -> TrainingState:
    try:
        with np.load(checkpoint, allow_pickle=False) as file:
            values = [file[name] for name in file.files if name.startswith("state")]
            history = [Epoch(int(epoch), *metrics) for epoch, *metrics in file["history"].tolist()]
            return TrainingState(int(file["seed"]), history, values)
    except DAMAGED as error:
        raise unusable_checkpoint(checkpoint, error) from error


def save_state(state: TrainingState, checkpoint: Path) -> None:
    """Write a checkpoint. The previous one is kept until the new one is complete."""
    arrays = {"seed": np.array(state.seed), "history": np.array(state.history)}
    arrays |= {f"state{number}": values for number, values in enumerate(state.values)}
    write_atomically(checkpoint, lambda file: np.savez(file, allow_pickle=False, **arrays))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace a file with what `write` writes. If `write` fails, the file is unchanged."""
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut after the rename can leave an empty file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def unusable_checkpoint(path: Path, error: Exception) -> UnusableCheckpoint:
    """Return the error for a file or folder that does not hold the state of this training."""
    return UnusableCheckpoint(
        f"{path} should hold the state of this training. It is damaged or belongs to another training "
        f"({type(error).__name__})."
    )
