"""The state of a training <-> a checkpoint file."""

import contextlib
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import runtime
from dgmd_pipeline.training.config import Epoch, TrainingConfig


class TrainingState(NamedTuple):
    """How far a training has come: what a checkpoint holds."""

    seed: int
    history: list[Epoch]
    state: list[np.ndarray]  # the variables of the network, of dropout's random numbers and of the optimizer


def begin(recipe: TrainingConfig, checkpoint: Path | None) -> TrainingState:
    """Return how far the training of `checkpoint` has come, or its beginning; set the seed of Keras."""
    if checkpoint and checkpoint.exists():
        progress = _read(checkpoint)
    else:
        progress = TrainingState(secrets.randbits(31) if recipe.seed is None else recipe.seed, [], [])
    runtime.set_seed(progress.seed)
    return progress


def _read(checkpoint: Path) -> TrainingState:
    with _readable(checkpoint) as file:
        state = [file[name] for name in file.files if name.startswith("state")]
        history = [Epoch(int(epoch), *rest) for epoch, *rest in file["history"].tolist()]
        return TrainingState(int(file["seed"]), history, state)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise unusable_checkpoint(path, error) from error


def save(progress: TrainingState, checkpoint: Path) -> None:
    """Write a checkpoint; the one before stays until the new one is complete."""
    arrays = {"seed": np.array(progress.seed), "history": np.array(progress.history)}
    _write(checkpoint, arrays | {f"state{number}": values for number, values in enumerate(progress.state)})


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class UnusableCheckpoint(PipelineError):
    """A checkpoint is damaged or of another training: delete it to start again."""


def unusable_checkpoint(checkpoint: Path, error: Exception) -> UnusableCheckpoint:
    """Return what to say of a file that should hold the state of this training and does not."""
    return UnusableCheckpoint(
        f"{checkpoint} should hold the state of this training. It is damaged, or of another training "
        f"({type(error).__name__})."
    )
