"""Runs steps with Luigi, one after another in this process."""

import logging
from collections.abc import Sequence

import luigi
from luigi import scheduler, worker

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.workflow.scheduler_page import ReportingScheduler
from dgmd_pipeline.workflow.step import Step


class _Factory:
    """Creates Luigi's worker and scheduler with the options that this pipeline needs."""

    def __init__(self, scheduler_url: str | None) -> None:
        self._url = scheduler_url

    def create_local_scheduler(self) -> scheduler.Scheduler | ReportingScheduler:
        local = scheduler.Scheduler(prune_on_get_work=True, record_task_history=False)
        return ReportingScheduler(local, self._url) if self._url else local

    def create_worker(
        self, scheduler: scheduler.Scheduler, worker_processes: int, assistant: bool = False
    ) -> worker.Worker:
        del worker_processes, assistant
        return worker.Worker(scheduler=scheduler, worker_processes=1, no_install_shutdown_handler=True)


def run_steps(last: Sequence[Step], scheduler_url: str | None = None, verbose: bool = False) -> None:
    """Run the steps that are not complete, up to `last`.

    With a `scheduler_url`, the run reports to that Luigi scheduler, which only shows the run. The run's result has the
    exception of a failed step. Raises PipelineError if Luigi ends without an error, but the last step is not complete.
    """
    for name in ("luigi", "luigi-interface", "luigi.scheduler"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL + 1)
    luigi.build(list(last), worker_scheduler_factory=_Factory(scheduler_url), local_scheduler=True)
    if last[0].context.result.failure is None:
        last[0].context.check_stopped()
        if missing := [step.folder for step in last if not step.complete()]:
            raise PipelineError(
                f"Luigi ended without an error, but {missing[0]} is not complete; --verbose shows Luigi's log."
            )
