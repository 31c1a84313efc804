"""The commands: arguments and environment -> settings -> graph -> exit code."""

import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgmd_pipeline import settings
from dgmd_pipeline.errors import PipelineError, Stopped

if TYPE_CHECKING:
    from dgmd_pipeline.step import Job, Outlook, Step

log = logging.getLogger("dgmd_pipeline")

EXIT_CODES = """exit codes:
  0    what was asked for is there
  2    a setting or an argument is wrong
  10   another run holds DATA_DIR
  20   no usable input: bucket, credentials, pictures or labels
  30   a step failed
  130  interrupted (SIGINT)
  143  terminated (SIGTERM)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code."""
    options = _parser().parse_args(arguments, argparse.Namespace(env_file=None, verbose=False))
    _log_to_stdout(options.verbose)
    sys.excepthook = _show_fault
    received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        return options.command(options)
    except PipelineError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        how = "terminated" if received[0] == signal.SIGTERM else "interrupted"
        log.error("%s; the next run goes on from the finished steps", how)
        return 128 + received[0]


received: list[int] = []  # signals that ask to stop


def _stop(number: int, _: object) -> None:
    received.append(number)
    check_stopped()


def check_stopped() -> None:
    """Raise Stopped if a signal came. What the handler raises inside TensorFlow may be swallowed or changed there."""
    if received:
        raise Stopped


def _parser() -> argparse.ArgumentParser:
    # Suppressed defaults: a command's own would undo what stands before the command.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--env-file", metavar="FILE", help="read variables from FILE (default: .env, if it is there)")
    common.add_argument("--verbose", action="store_true", help="show what Luigi says, too")
    parser = argparse.ArgumentParser(
        "pipeline.py",
        description="Turn a bucket of labelled pictures into a registered image classifier. Without a command: run.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(command=_run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command, text in (
        ("run", _run, "do what is not done yet (the default)"),
        ("plan", _plan, "show what a run would do, and why"),
        ("demo", _demo, "run on a small data set behind a local S3 endpoint"),
    ):
        commands.add_parser(name, help=text, parents=[common]).set_defaults(command=command)
    return parser


def _run(options: argparse.Namespace) -> int:
    values = settings.load(options.env_file)
    from dgmd_pipeline import step, tasks, workers  # after the settings: mistakes are answered at once

    job = step.Job(values, workers.Pool(), check_stopped)
    last = tasks.RegisterModel(job=job)
    with step.disk_errors_explained(values.data_dir), step.lock(values.data_dir):
        step.recover(values.data_dir)
        outlooks = step.plan(last)
        _show_plan(outlooks, values.data_dir)
        if last.complete():
            counts = outlooks[-1].counts
            log.info("Nothing to do: %s version %s is registered.", counts["name"], counts["version"])
            return 0
        _check_what_comes_last(values, job)
        try:
            return _build(last, options.verbose)
        finally:
            job.pool.close()


def _check_what_comes_last(values: settings.Settings, job: "Job") -> None:
    """Look for what would only fail at the end, before the first step."""
    from dgmd_pipeline import model, registry, tasks

    if job.outlooks[tasks.TrainModel.name].state != "done":
        model.check_weights(values.backbone, values.backbone_weights, values.keras_home)
    if values.mlflow_tracking_uri:
        warning = registry.check_server(values.mlflow_tracking_uri, settings.mlflow_login())
        if warning:
            log.warning("%s", warning)


def _build(last: "Step", verbose: bool) -> int:
    """Let Luigi run what is not complete. Its own verdict is not the truth: the last task knows."""
    import luigi

    for name in ("luigi", "luigi-interface"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL + 1)
    luigi.configuration.get_config().set("core", "no_configure_logging", "true")
    luigi.build([last], local_scheduler=True)
    check_stopped()
    failure = last.job.failure
    if isinstance(failure, PipelineError):
        raise failure
    if failure is not None:
        log.error("%s", "".join(traceback.format_exception(failure)))
        log.error("A step failed by a fault of the pipeline's own; please report the lines above.")
        return PipelineError.exit_code
    if not last.complete():
        raise PipelineError("Luigi ended without an error and without a registered model; --verbose shows its log.")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from dgmd_pipeline import step, tasks

    values = settings.load(options.env_file)
    with step.disk_errors_explained(values.data_dir):
        _show_plan(step.plan(tasks.RegisterModel(job=step.Job(values))), values.data_dir)
    return 0


def _show_plan(outlooks: "Sequence[Outlook]", data_dir: Path) -> None:
    log.info("Plan for %s", data_dir)
    for outlook in outlooks:
        log.info("  %-20s %-6s %s", outlook.step, outlook.state, outlook.reason)


def _demo(options: argparse.Namespace) -> int:
    from dgmd_pipeline import demo

    return demo.run(lambda arguments: main([*arguments, *(["--verbose"] if options.verbose else [])]))


def _log_to_stdout(verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        _Lines("%(message)s" if sys.stdout.isatty() else "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    logging.raiseExceptions = False  # whoever reads a run through `head` does not want to hear of the closed pipe
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


class _Lines(logging.Formatter):
    """Lines without secrets; warnings and errors say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        return settings.redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def _show_fault(_: type[BaseException], error: BaseException, __: object) -> None:
    log.error("%s", "".join(traceback.format_exception(error)))
