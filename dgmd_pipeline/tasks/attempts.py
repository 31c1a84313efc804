"""The MLflow run of an attempt, and the file in DATA_DIR that contains the id of the attempt.

An attempt is a training and the registration of its model. The file exists from the start of the training until the
version is registered. If the process is interrupted, a later process reads the file, and continues or ends the MLflow
run.
"""

import logging
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.tasks import lookup

if TYPE_CHECKING:
    from dgmd_pipeline.registry.live_run import LiveRun, Place

log = logging.getLogger(__name__)
FILE = ".mlflow-run"
RESUMED = "attempt"  # file in the folder of checkpoints; it names the attempt that wrote them


def begin(settings: Any, resume_dir: Path, run_name: str) -> "LiveRun | None":
    """Open the MLflow run of a training, or continue it. Return None if there is no MLflow store yet.

    If an earlier training was never registered, its MLflow run is ended.
    """
    from dgmd_pipeline.registry.live_run import LiveRun

    mine = _read(resume_dir / RESUMED)
    if current(settings.data_dir) != mine:
        end(settings, "KILLED", "The process of this training was killed. A later run began another training.")
    mine = mine or uuid.uuid4().hex
    (resume_dir / RESUMED).write_text(mine, "ascii")
    (settings.data_dir / FILE).write_text(mine, "ascii")
    place = _place(settings, mine)
    return LiveRun(place, run_name) if place else None


def current(data_dir: Path) -> str:
    """Return the id of the attempt whose version is not registered yet; "" if there is no such attempt."""
    return _read(data_dir / FILE)


def end(settings: Any, status: str, reason: str = "") -> None:
    """End the MLflow run of the current attempt, if there is one.

    `status` is FINISHED, FAILED or KILLED. `reason` becomes the description of the MLflow run.
    """
    attempt = current(settings.data_dir)
    if not attempt:
        return
    from dgmd_pipeline.registry import live_run

    try:
        if place := _place(settings, attempt):
            live_run.end(place, status, redact(reason))
    except PipelineError as error:
        log.debug("The MLflow run of the training is not ended: %s", error)


def registered(data_dir: Path) -> None:
    """End the current attempt, because its version is registered."""
    (data_dir / FILE).unlink(missing_ok=True)


def _place(settings: Any, attempt: str) -> "Place | None":
    from dgmd_pipeline.registry.live_run import Place

    store = lookup.store(settings)
    return Place(store, settings.mlflow_experiment_name or settings.model_name, attempt) if store else None


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):  # the file is missing; if DATA_DIR cannot be read, another check ends the run
        return ""
