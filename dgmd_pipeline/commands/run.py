"""The commands `run` and `plan`. A run publishes its status."""

import dataclasses
import json
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgmd_pipeline.commands import notify, status
from dgmd_pipeline.errors import Busy, PipelineError
from dgmd_pipeline.evaluation.summary import WORSE
from dgmd_pipeline.formatting import format_bytes, redact, utc_now
from dgmd_pipeline.settings import TEMPORARY, Settings, mlflow_variables
from dgmd_pipeline.tasks import LAST, attempts, lookup, names, resources
from dgmd_pipeline.workflow import disk, folders, lock, planning, runner, signals, timing
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.run_context import RunContext, RunResult, activate
from dgmd_pipeline.workflow.step import Step
from dgmd_pipeline.workflow.success_file import read_record

log = logging.getLogger(__name__)


class _Ending(NamedTuple):
    """How a run ended."""

    code: int  # exit code
    message: str  # sentences, for `status.json` and NOTIFY_URL
    shown: list[str]  # the last lines of the log
    failure: str = ""  # what failed after the last step, for the log


def run(
    values: Settings,
    force: Sequence[str],
    until: str | None,
    verbose: bool,
    start: float,
    scheduler_url: str | None = None,
) -> int:
    """Run the steps that are not done yet, publish the outcome, and return the exit code.

    `force` has the names of the steps to repeat. `until` is the name of the last step. `start` is the value of
    `time.monotonic()` when the command started. The run reports to the Luigi scheduler at `scheduler_url`. Raises
    PipelineError if the run stops for a reason that an operator can fix.
    """
    forced = _forced(values, force, until)  # before `try`: an error about an unknown step must not change the status
    result = RunResult()
    ending = _Ending(1, "a bug of the pipeline; the log has the traceback", [])
    try:
        with disk.disk_errors_explained(values.data_dir), lock.hold(values.data_dir) as holder:
            # If a run does not end soon after a signal, `signals` calls the functions in `before_end` and ends the
            # process. The functions have too little time to send a message to NOTIFY_URL.
            quiet = values.model_copy(update={"notify_url": None})
            signals.before_end.append(
                lambda number: publish_status(
                    quiet, result, 128 + number, signals.stop_message(number), time.monotonic() - start, until
                )
            )
            signals.before_end.append(
                lambda number: _end_attempt(values, result, 128 + number, signals.stop_message(number))
            )
            context = RunContext(
                values, resources.executor(values), signals.check_stopped, holder.tell, forced, values.model_name,
                result=result,
            )  # fmt: skip
            ending = _finish(values, context, until, scheduler_url, verbose)
    except PipelineError as error:
        ending = _Ending(error.exit_code, str(error), [])
        raise
    except KeyboardInterrupt:
        ending = _Ending(128 + signals.received[0], signals.stop_message(signals.received[0]), [])
        raise
    finally:
        if ending.code != Busy.exit_code:  # status.json belongs to the run that holds DATA_DIR
            publish_status(values, result, ending.code, ending.message, time.monotonic() - start, until)
            _end_attempt(values, result, ending.code, ending.message)
    _show_end(ending, result, time.monotonic() - start)
    return ending.code


def _end_attempt(values: Settings, result: RunResult, code: int, message: str) -> None:
    """End the MLflow run of a training whose model is not registered.

    The model is not registered if a step failed, if the pipeline was stopped, or if --until excludes the registration.
    """
    if code:
        attempts.end(values, "KILLED" if code > 128 else "FAILED", message)
    elif names.TRAINED_MODEL in result.summaries:
        attempts.end(values, "FINISHED")


def plan(values: Settings, force: Sequence[str], until: str | None, as_json: bool) -> None:
    """Show what `run` would do, and why."""
    context = RunContext(values, name=values.model_name, forced=_forced(values, force, until))
    with disk.disk_errors_explained(values.data_dir), activate(context):
        plans = planning.plan(*_last_steps(until), with_reuse=True)
    if as_json:
        print(json.dumps({"data_dir": str(values.data_dir), "steps": [each.as_json() for each in plans]}, indent=1))
    else:
        show_plan(plans, values.data_dir)


def _last_steps(until: str | None) -> list[Step]:
    """Return the steps of the current run that no other step of the run depends on."""
    return planning.select_steps(planning.upstream_steps(LAST()), until) if until else [LAST()]


def _forced(values: Settings, force: Sequence[str], until: str | None) -> dict[str, str]:
    """Return a dictionary that maps the folder of each forced step to the reason."""
    with activate(RunContext(values)):
        steps = planning.upstream_steps(*_last_steps(until))
        return {step.folder: f"--force {word}" for word in force for step in planning.select_steps(steps, word)}


def _finish(values: Settings, context: RunContext, until: str | None, url: str | None, verbose: bool) -> _Ending:
    """Run the steps that are not done yet."""
    result = context.result
    folders.recover(values.data_dir, names.ALL)
    disk.prepare_temporary_folder(values.data_dir / TEMPORARY)
    with activate(context):
        last = _last_steps(until)
        plans = planning.plan(*last)
        folders.sweep(values.data_dir, [plan.step for plan in plans if plan.state == "done"])
        raw, name = values.data_dir / names.RAW, last[-1].folder
        before, images = read_record(last[-1].path), _fingerprint(raw)
        idle = all(step.complete() for step in last)
        if not idle:
            show_plan(plans, values.data_dir)
            try:
                resources.start_serving_if_idle(context, plans)
                _check_what_is_needed_later(values, plans)
                resources.connect_early(context, plans)
                result.dashboard = context.executor.dashboard
                resources.start_network_early(context, plans)
                runner.run_steps(last, url, verbose)
            finally:
                resources.close(context)
                context.executor.close()
                result.usage = context.executor.usage()
        if result.failure is not None:
            return _Ending(PipelineError.exit_code, _explain_failure(result), [])
        record = read_record(last[-1].path)
        if record and record != before:
            return _ending(values, name, result.summaries[name], record.counts)
        message = _unchanged_message(values, name, record.counts if record else {}, idle, _fingerprint(raw) == images)
        return _Ending(0, message, [message])


def _ending(values: Settings, last: str, summary: str, counts: Mapping[str, Any]) -> _Ending:
    """Return the ending of a run that wrote the folder of the step `last`.

    If PROMOTE_IF_BETTER is set, this function promotes the version of the run if it is better than production.
    """
    if last != names.REGISTERED_MODEL:
        return _Ending(0, f"{last}: {summary}", [])  # the step has logged this
    lines = [f"{summary}.", *lookup.summary(values.data_dir, None if values.promote_if_better else counts["version"])]
    if not values.promote_if_better:
        return _Ending(0, " ".join(lines), lines)
    from dgmd_pipeline.commands import promotion

    try:
        lines.insert(-1, promotion.promote_if_better(values, counts["version"]))
    except PipelineError as error:
        failure = (
            f"Version {counts['version']} is registered, but PROMOTE_IF_BETTER failed: {error} `models` shows which "
            f"version is production. Later runs do not try again: use `promote {counts['version']}`."
        )
        return _Ending(PipelineError.exit_code, " ".join([*lines[:-1], failure, lines[-1]]), lines, failure)
    return _Ending(0, " ".join(lines), lines)


def _explain_failure(result: RunResult) -> str:
    """Raise the failure if it is a PipelineError; otherwise log it and return a message."""
    assert result.failure is not None  # noqa: S101
    signals.check_stopped()
    if isinstance(result.failure, PipelineError):
        raise result.failure
    log.error("%s", "".join(traceback.format_exception(result.failure)))
    log.error("A step failed because of a bug of the pipeline; please report the lines above.")
    return f"{result.failed_step} failed because of a bug of the pipeline; the log has the traceback"


def publish_status(
    values: Settings, result: RunResult | None, code: int, message: str, seconds: float, until: str | None = None
) -> None:
    """Write the outcome of a run to `status.json`, for the health check, and send it to NOTIFY_URL.

    A run with --until does not replace the status of a run without --until.
    """
    changed = result is None or bool(result.records)
    registered = result is not None and names.REGISTERED_MODEL in result.summaries
    known = lookup.registered(values.data_dir, result) if result and (code == 0 or registered) else {}
    outcome = status.outcome(code, changed, worse=registered and known.get("verdict") == WORSE)
    failed = result.failed_step if result and outcome == status.FAILED else None
    dashboard = result.dashboard if result else None
    text = redact(message)
    published = status.Status(
        outcome,
        code,
        text,
        utc_now(),
        round(seconds, 1),
        values.model_name,
        **known,
        step=failed,
        until=until,
        dashboard=dashboard,
    )
    try:
        before = status.read(values.data_dir)
        success = published.ended if code == 0 else before.last_success if before else None
        published = dataclasses.replace(published, last_success=success)
        if not until or before is None or before.until:
            status.write(published, values.data_dir)
    except OSError as error:
        log.debug("%s is not written: %s", status.NAME, error)  # the run itself fails with the same error
    notify.tell(values, published)


def _fingerprint(folder: Path) -> str | None:
    record = read_record(folder)
    return record.identity if record else None


def _unchanged_message(values: Settings, last: str, counts: Mapping[str, Any], idle: bool, same_images: bool) -> str:
    """Return the message of a run that did not write the folder of the step `last`.

    `counts` are from the record of this step. `idle` is True if no step ran. `same_images` is True if the run did not
    change the images in `raw`.
    """
    nothing = "Nothing to do" if idle else "As before"
    nothing_new = values.refresh and same_images
    if nothing_new:
        nothing = f"Nothing new in s3://{values.aws_data_bucket}/{values.aws_data_path}"
    if "version" not in counts:
        return f"{nothing}." if nothing_new else f"{nothing}: {last} is done."
    version = counts["version"]
    text = f"keeping version {version}" if nothing_new else f"{counts['name']} version {version} is registered"
    # This version may already be production. So `lookup.summary` gets None, and does not suggest a promotion.
    return " ".join([f"{nothing}: {text}.", *lookup.summary(values.data_dir, None)])


def _check_what_is_needed_later(values: Settings, plans: Sequence[StepPlan]) -> None:
    """Check the weights and the registry before the first step, because the run could otherwise fail hours later."""
    from dgmd_pipeline.registry import preflight
    from dgmd_pipeline.training import backbones

    learning = {names.TRAINED_MODEL, *(f"{names.FEATURES}_{split}" for split in names.SPLITS)}
    if any(plan.state != "done" for plan in plans if plan.step in learning):
        backbones.weights_file(values.backbone, values.backbone_weights, values.keras_home)
    if any(plan.step == names.REGISTERED_MODEL for plan in plans) and (store := lookup.store(values)):
        experiment = values.mlflow_experiment_name or values.model_name
        if warning := preflight.check(store, experiment, mlflow_variables()):
            log.warning("%s", warning)


def show_plan(plans: Sequence[StepPlan], data_dir: Path) -> None:
    """Log a table: the state of each step, and why."""
    log.info("Plan for %s", data_dir)
    log.info("  %-19s %-5s %9s %8s  %s", "step", "state", "images", "size", "why", extra={"table": 48})
    for each in plans:
        images = "" if each.images is None else f"{each.images:,}"
        size = "" if each.bytes is None else format_bytes(each.bytes)
        row = f"  {each.step:19} {each.state:5} {images:>9} {size:>8}  {each.explanation}"
        log.info("%s", row.rstrip(), extra={"table": 48})
    unused = [name for name in names.STEPS if name not in {each.step for each in plans} and (data_dir / name).exists()]
    if unused and plans[-1].step == names.REGISTERED_MODEL:
        log.info("  Folders that these settings do not use: %s. You may delete them.", ", ".join(unused))


def _show_end(ending: _Ending, result: RunResult, seconds: float) -> None:
    """Log the last lines of a run. If all its steps have succeeded, first log the times of the steps."""
    if result.failure is None and result.records:
        log.info("Where the time went")
        for line in timing.table_lines(timing.table_rows(result.records, seconds)):
            log.info("%s", line, extra={"table": 2})
        if result.usage:
            log.info("%s", result.usage)
    for line in ending.shown:
        log.info("%s", line, extra={"result": True})
    if ending.failure:
        log.error("%s", ending.failure)
