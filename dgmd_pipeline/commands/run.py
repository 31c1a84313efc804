"""Settings -> one run: the plan, the graph, what is shown meanwhile and what is told afterwards."""

import dataclasses
import logging
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgmd_pipeline import formatting, tasks
from dgmd_pipeline.commands import notify, status
from dgmd_pipeline.errors import Busy, PipelineError
from dgmd_pipeline.formatting import redact
from dgmd_pipeline.settings import Settings, mlflow_login
from dgmd_pipeline.workflow import disk, executors, folders, planning, provenance, signals, step, timing

log = logging.getLogger(__name__)


def run(values: Settings, force: Sequence[str], until: str | None, verbose: bool, start: float) -> int:
    """Do what is not done yet, tell what it came to, and return the exit code.

    `force` names steps that are done again in any case, `until` the last one; `start` is when the command began, by
    `time.monotonic`. Raises PipelineError where it is left undone for a reason that its reader can do something about.
    """
    job = step.Job(values, executors.Pool(), signals.check_stopped)
    code, message = 1, "a fault of the pipeline's own; the log has the traceback"
    try:
        with disk.disk_errors_explained(values.data_dir), folders.lock(values.data_dir):
            code, message = _finish(values, job, force, until, verbose)
    except PipelineError as error:
        code, message = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, message = 128 + signals.received[0], signals.stop_message(signals.received[0])
        raise
    finally:
        if code != Busy.exit_code:  # what is known there is of the run that goes on
            publish_status(values, job, code, message, time.monotonic() - start)
    if not code:
        _show_times(job, time.monotonic() - start)
    return code


def plan(values: Settings, force: Sequence[str], until: str | None) -> list[planning.StepPlan]:
    """Return what `run` would do."""
    with disk.disk_errors_explained(values.data_dir):
        return planning.plan(*_final_steps(step.Job(values), force, until))


def _finish(values: Settings, job: step.Job, force: Sequence[str], until: str | None, verbose: bool) -> tuple[int, str]:
    """Do what is not done yet; return the exit code and what there is to say."""
    folders.recover(values.data_dir, tasks.FOLDERS)
    last = _final_steps(job, force, until)
    outlooks = planning.plan(*last)
    folders.sweep(values.data_dir, [outlook.step for outlook in outlooks if outlook.state == "done"])
    raw = values.data_dir / tasks.DownloadImages.name
    before, pictures = provenance.read_record(last[-1].path), _fingerprint(raw)
    idle = all(each.complete() for each in last)
    if not idle:
        show_plan(outlooks, values.data_dir)
        _check_registry_and_weights(values, job)
        tasks.start_early(job)
        try:
            code = _build(last, verbose)
        finally:
            job.pool.close()
        if code:
            return code, f"{job.failed} failed by a fault of the pipeline's own; the log has the traceback"
    record = provenance.read_record(last[-1].path)
    message = f"{last[-1].folder}: {last[-1].summary(record.counts)}" if record else ""
    if record == before:
        message = _unchanged_message(
            values, last[-1].folder, record.counts if record else {}, idle, _fingerprint(raw) == pictures
        )
        log.info("%s", message)
    return 0, message


def publish_status(values: Settings, job: step.Job | None, code: int, message: str, seconds: float) -> None:
    """Leave what a run came to for the health check, and send it to NOTIFY_URL."""
    changed = job is None or bool(job.records)
    outcome = status.outcome(code, changed)
    known = tasks.registered(job) if job and code == 0 else {}
    failed = job.failed if job and outcome == status.FAILED else None
    text = redact(message)
    told = status.Status(
        outcome, code, text, formatting.utc_now(), round(seconds, 1), values.model_name, **known, step=failed
    )
    try:
        status.write(told, values.data_dir)
    except OSError as error:
        log.debug("%s is not written: %s", status.NAME, error)  # the run has failed by that already, or will
    if values.notify_url:
        text = f"{values.model_name}: {outcome}. {text}"
        notify.post(values.notify_url.get_secret_value(), {"text": text, **dataclasses.asdict(told)})


def _final_steps(job: step.Job, force: Sequence[str], until: str | None) -> list[step.Step]:
    """Return the steps that the run ends with, and note in `job` those that are done again in any case."""
    last: list[step.Step] = [tasks.RegisterModel(job=job)]
    if until:
        last = planning.select_steps(planning.upstream_steps(*last), until)
    for word in force:
        for each in planning.select_steps(planning.upstream_steps(*last), word):
            job.forced[each.folder] = f"--force {word}"
    return last


def _fingerprint(folder: Path) -> str | None:
    record = provenance.read_record(folder)
    return record.identity if record else None


def _unchanged_message(values: Settings, last: str, counts: Mapping[str, Any], idle: bool, no_news: bool) -> str:
    """Say that the outcome of the step `last` is what it was, by its counts.

    `idle`: nothing was done; `no_news`: the pictures are the same.
    """
    nothing = "Nothing to do" if idle else "As before"
    if values.refresh and no_news:
        nothing = f"Nothing new in s3://{values.aws_data_bucket}/{values.aws_data_path}"
        return f"{nothing}: keeping version {counts['version']}." if "version" in counts else f"{nothing}."
    if "version" in counts:
        return f"{nothing}: {counts['name']} version {counts['version']} is registered."
    return f"{nothing}: {last} is done."


def _check_registry_and_weights(values: Settings, job: step.Job) -> None:
    """Look for what would only fail at the end, before the first step."""
    from dgmd_pipeline import tasks
    from dgmd_pipeline.registry import store
    from dgmd_pipeline.training import backbones

    learning = {tasks.TrainModel.name, *(f"{tasks.ExtractFeatures.name}_{side}" for side in tasks.SIDES)}
    if any(job.outlooks[name].state != "done" for name in learning & job.outlooks.keys()):
        backbones.weights_file(values.backbone, values.backbone_weights, values.keras_home)
    if values.mlflow_tracking_uri and tasks.RegisterModel.name in job.outlooks:
        warning = store.check_server(values.mlflow_tracking_uri, mlflow_login())
        if warning:
            log.warning("%s", warning)


def _build(last: list[step.Step], verbose: bool) -> int:
    """Let Luigi run what is not complete. Its own verdict is not the truth: the last task knows."""
    import luigi

    for name in ("luigi", "luigi-interface"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL + 1)
    luigi.configuration.get_config().set("core", "no_configure_logging", "true")
    luigi.build(last, local_scheduler=True)
    signals.check_stopped()
    failure = last[0].job.failure
    if isinstance(failure, PipelineError):
        raise failure
    if failure is not None:
        log.error("%s", "".join(traceback.format_exception(failure)))
        log.error("A step failed by a fault of the pipeline's own; please report the lines above.")
        return PipelineError.exit_code
    if missing := [each.folder for each in last if not each.complete()]:
        raise PipelineError(f"Luigi ended without an error and without {missing[0]}; --verbose shows its log.")
    return 0


def show_plan(outlooks: Sequence[planning.StepPlan], data_dir: Path) -> None:
    """Print a table: what will become of each step, and why."""
    log.info("Plan for %s", data_dir)
    # A log's lines stay whole, for those who search it; on a terminal what does not fit stays in its column.
    width = shutil.get_terminal_size().columns - 48 if sys.stdout.isatty() else 10_000
    log.info("  %-19s %-5s %9s %8s  %s", "step", "state", "images", "size", "why")
    for each in outlooks:
        images = "" if each.images is None else f"{each.images:,}"
        size = "" if each.bytes is None else formatting.format_bytes(each.bytes)
        why = textwrap.wrap(each.reason, max(20, width)) or [""]
        row = f"  {each.step:19} {each.state:5} {images:>9} {size:>8}  " + f"\n{48 * ' '}".join(why)
        log.info("%s", row.rstrip())


def _show_times(job: step.Job, seconds: float) -> None:
    if job.records:
        log.info("Where the time went")
        for line in timing.table_lines(timing.table_rows(job.records, seconds)):
            log.info("%s", line)
