"""Logs the epochs of a training to an MLflow run while the model is trained. The registration completes this run.

Each attempt to train and register a model has an id, which is also a tag of the run. With this tag, the pipeline finds
the run again, even if MLflow's answer to the creation of the run was lost, or if the process was killed. The training
does not depend on MLflow. After the first failure, nothing more is logged.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.registry import logged_run, once, registration
from dgmd_pipeline.registry.store import ATTEMPT, Store, errors_explained
from dgmd_pipeline.registry.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
TIMEOUT = "10"  # seconds for a request; the training waits for the answer
END_TIMEOUT = "5"  # seconds for a request of `end`; Docker kills a container ten seconds after the order to stop
ANSWER = "did not answer as expected: {}."


class Place(NamedTuple):
    """Where the run of an attempt is."""

    store: Store
    experiment: str
    attempt: str  # unique id


class LiveRun:
    """The MLflow run of a training in progress."""

    def __init__(self, place: Place, name: str) -> None:
        """Create a run called `name`, or continue the run that an earlier process created for the attempt."""
        self._place, self._run_id, self._last = place, "", 0
        self._system: SystemMetrics | None = None
        with self._disabled_on_failure():
            self._run_id = _open(place, name)
            self._system = SystemMetrics(place.store.uri)

    def log_epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an epoch, counted from 1.

        Fine-tuning counts its epochs from 1 again. So if `number` is not greater than the previous number, fine-tuning
        has begun, and nothing more is logged. The registration logs the epochs of fine-tuning that are part of the
        model.
        """
        if number <= self._last:
            self._run_id = ""
        if self._run_id:
            self._last = number
            system = self._system.sample() if self._system else {}
            with self._disabled_on_failure():
                logged_run.log_epoch(_client(self._place), self._run_id, number, {**metrics, **system})

    @contextlib.contextmanager
    def _disabled_on_failure(self) -> Iterator[None]:
        try:
            with errors_explained(self._place.store, ANSWER), _timeout(TIMEOUT):
                yield
        except PipelineError as error:
            log.warning("MLflow does not show this training while it runs: %s", error)
            self._run_id = ""


def end(place: Place, status: str, reason: str = "") -> None:
    """End the run of an attempt if it is still running. `status` is FINISHED, FAILED or KILLED.

    `reason` becomes the description of the run. If a later process continues the run, it deletes the description.

    Raises PipelineError if MLflow cannot be reached or refuses.
    """
    with errors_explained(place.store, ANSWER), _timeout(END_TIMEOUT):
        client = _client(place)
        found = client.get_experiment_by_name(place.experiment)
        run = logged_run.of_attempt(client, found.experiment_id, place.attempt) if found else None
        if run and run.info.status == "RUNNING":
            if reason:
                client.set_tag(run.info.run_id, registration.NOTE, reason)
            client.set_terminated(run.info.run_id, status)


def _open(place: Place, name: str) -> str:
    """Create or continue the run of an attempt, and return its id."""
    from mlflow.tracking.context import registry

    client = _client(place)
    experiment_id = registration.experiment_id(client, place.experiment, place.store.artifacts)

    def find() -> "Run | None":
        return logged_run.of_attempt(client, experiment_id, place.attempt)

    tags = registry.resolve_tags({ATTEMPT: place.attempt})
    run = find() or once.create(lambda: client.create_run(experiment_id, tags=tags, run_name=name), find)
    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, "RUNNING")
        if registration.NOTE in run.data.tags:
            client.delete_tag(run.info.run_id, registration.NOTE)
    return run.info.run_id


def _client(place: Place) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(place.store.uri)


@contextlib.contextmanager
def _timeout(seconds: str) -> Iterator[None]:
    """Within the block, a request fails after `seconds` and is not repeated."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    before = MLFLOW_HTTP_REQUEST_TIMEOUT.get_raw()
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(seconds)
    try:
        with once.without_repetition():
            yield
    finally:
        if before is None:
            MLFLOW_HTTP_REQUEST_TIMEOUT.unset()
        else:
            MLFLOW_HTTP_REQUEST_TIMEOUT.set(before)
