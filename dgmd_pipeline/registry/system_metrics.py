"""MLflow's system metrics: the load of this machine, measured when an epoch ends.

MLflow itself measures the load in a thread, and waits for the thread at the end of a training. If the server cannot be
reached, the thread repeats its requests for minutes. So this module does not start the thread. The pipeline logs the
load in the same request as the metrics of an epoch.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)
PREFIX = "system/"  # MLflow shows metrics with such names on a separate page
INTERVAL = 10.0  # seconds between two samples, as in MLflow; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it


class SystemMetrics:
    """Measures CPU, memory, disk, network and GPUs, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is true."""

    def __init__(self, uri: str) -> None:
        """Begin to measure. `uri` is the URI of the MLflow store."""
        self._monitor: SystemMetricsMonitor | None = None
        with self._disabled_on_failure():
            self._monitor = _monitor(uri)
        self._sampled = time.monotonic()

    def sample(self) -> dict[str, float]:
        """Return the metrics: name -> value.

        They are the CPU load since the last sample, and the present values of the other metrics.

        Returns an empty dict if the sampling interval has not passed since the last sample.
        """
        if self._monitor is None or time.monotonic() - self._sampled < self._monitor.sampling_interval:
            return {}
        self._sampled = time.monotonic()
        with self._disabled_on_failure():
            return {PREFIX + name: value for name, value in _measure(self._monitor).items()}
        return {}

    @contextlib.contextmanager
    def _disabled_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - what psutil and the libraries of GPUs raise depends on the platform
            log.warning("MLflow does not show the load of this machine: %s: %s", type(error).__name__, error)
            self._monitor = None


def _monitor(uri: str) -> "SystemMetricsMonitor | None":
    """Return MLflow's monitor, without its thread; None if system metrics are turned off."""
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    monitor = SystemMetricsMonitor("", INTERVAL, tracking_uri=uri)
    _measure(monitor)  # psutil measures the CPU load since its last call; its first call returns 0, which is discarded
    return monitor


def _measure(monitor: "SystemMetricsMonitor") -> dict[str, float]:
    monitor.collect_metrics()
    measured = monitor.aggregate_metrics()
    for each in monitor.monitors:
        each.clear_metrics()
    return measured
