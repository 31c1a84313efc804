"""The commands: arguments and environment -> settings -> graph -> exit code."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from dgmd_pipeline import signals
from dgmd_pipeline.errors import PipelineError, SettingsError

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings
    from dgmd_pipeline.step import Job, Outlook, Step

log = logging.getLogger("dgmd_pipeline")

EXIT_CODES = """exit codes:
  0    what was asked for is there
  2    a setting or an argument is wrong
  10   another run holds DATA_DIR
  20   no usable input: bucket, credentials, pictures or labels
  30   a step failed
  40   refused: a model does not meet the conditions for production
  130  interrupted (SIGINT)
  143  terminated (SIGTERM)
"""


def command() -> NoReturn:
    """Be the process: run `main` and exit with its code."""
    code = main()
    # Python would wait for threads that libraries still have, up to 9 s were seen, and take TensorFlow apart for 1 s.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code."""
    options = _parser().parse_args(arguments, argparse.Namespace(**DEFAULTS))
    options.force = options.force_before + options.force
    try:
        with signals.caught():
            _log(sys.stderr if options.json or options.csv else sys.stdout, options.verbose)
            sys.excepthook = _show_fault
            try:
                return options.command(options)
            except PipelineError as error:
                log.error("%s", error)
                return error.exit_code
    except KeyboardInterrupt:
        log.error("%s", signals.farewell(signals.received[0]))
        return 128 + signals.received[0]


DEFAULTS: dict[str, Any] = {
    "env_file": None,
    "verbose": False,
    "force_before": [],
    "force": [],
    "until": None,
    "refresh": False,
    "json": False,
    "csv": False,
}
STEPS = "download, inspect, label, balance, split, convert, extract, train, evaluate or register"


def _step_options(common: argparse.ArgumentParser, force: str) -> argparse.ArgumentParser:
    steps = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=[common])
    text = f"do STEP again, and all after it; may be given several times. STEP is {STEPS}, or a step's folder"
    steps.add_argument("--force", metavar="STEP", action="append", dest=force, help=text)
    steps.add_argument("--until", metavar="STEP", help="stop when STEP is done")
    steps.add_argument("--refresh", action="store_true", help="take over what is new in the bucket (REFRESH=true)")
    return steps


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
        parents=[_step_options(common, "force_before")],  # a command's own list would take the place of this one
    )
    parser.set_defaults(command=_run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command, text in (
        ("run", _run, "do what is not done yet (the default)"),
        ("plan", _plan, "show what a run would do, and why"),
        ("demo", _demo, "run on a small data set behind a local S3 endpoint"),
    ):
        added = commands.add_parser(
            name, help=text, parents=[common if command is _demo else _step_options(common, "force")]
        )
        added.set_defaults(command=command)
        if command is _plan:
            added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    _add_operations(commands, common)
    return parser


def _add_operations(commands: Any, common: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, operation: Callable[[Any, "Settings", argparse.Namespace], None]) -> Any:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[common])
        added.set_defaults(command=_operate, operation=operation)
        added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        return added

    def ask(added: Any) -> None:
        added.add_argument("--yes", action="store_true", help="do not ask")
        added.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")

    add("models", "show the registered versions", lambda do, values, given: do.models(values, given.json))
    promote = add(
        "promote",
        "make a version production, after a look at its assessment",
        lambda do, values, given: do.promote(values, given.version, given.yes, given.anyway, given.reason, given.json),
    )
    promote.add_argument("version", nargs="?", default="@candidate", help="number or @alias (default: @candidate)")
    promote.add_argument("--force", action="store_true", dest="anyway", help="even if a condition does not hold")
    ask(promote)
    ask(
        add(
            "rollback",
            "make the version production that was it before",
            lambda do, values, given: do.rollback(values, given.yes, given.reason, given.json),
        )
    )
    add(
        "history",
        "show who made which version production, and why",
        lambda do, values, given: do.history(values, given.json),
    )
    compare = add(
        "compare",
        "compare two versions on the validation pictures in DATA_DIR",
        lambda do, values, given: do.compare(values, given.one, given.other, given.json),
    )
    compare.add_argument("one", help="version: number or @alias")
    compare.add_argument("other", help="the version to compare it with")
    predict = add(
        "predict",
        "print label and probability of picture files, by a registered version",
        lambda do, values, given: do.predict(
            values,
            given.files,
            given.version or f"@{given.alias}",
            "json" if given.json else "csv" if given.csv else "table",
        ),
    )
    predict.add_argument("files", nargs="+", type=Path, metavar="FILE", help="picture file, or folder of them")
    which = predict.add_mutually_exclusive_group()
    which.add_argument("--version", metavar="V", help="number of the version")
    which.add_argument("--alias", metavar="A", default="production", help="alias of the version (default: production)")
    predict.add_argument("--csv", action="store_true", default=argparse.SUPPRESS, help="print CSV")


def _operate(options: argparse.Namespace) -> int:
    values = _settings(options)
    from dgmd_pipeline import operations

    options.operation(operations, values, options)
    return 0


def _settings(options: argparse.Namespace) -> "Settings":
    from dgmd_pipeline import settings  # here, so that a signal is heard while it is imported

    values = settings.load(options.env_file)
    return values.model_copy(update={"refresh": True}) if options.refresh else values


def _run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    values = _settings(options)
    from dgmd_pipeline import folders  # after the settings: mistakes are answered at once

    with folders.disk_errors_explained(values.data_dir), folders.lock(values.data_dir):
        from dgmd_pipeline import step, tasks, workers

        folders.recover(values.data_dir, tasks.FOLDERS)
        job = step.Job(values, workers.Pool(), signals.check_stopped)
        last = _last(job, options)
        outlooks = step.plan(*last)
        _show_plan(outlooks, values.data_dir)
        folders.sweep(values.data_dir, [outlook.step for outlook in outlooks if outlook.state == "done"])
        before = step.read_record(last[-1].path)
        idle = all(each.complete() for each in last)
        if not idle:
            _check_what_comes_last(values, job)
            tasks.start_early(job)
            try:
                code = _build(last, options.verbose)
            finally:
                job.pool.close()
            if code:
                return code
        if step.read_record(last[-1].path) == before:
            log.info("%s", _what_stays(values, last[-1], "Nothing to do" if idle else "Nothing to register"))
        _show_times(job, time.monotonic() - start)
        return 0


def _last(job: "Job", options: argparse.Namespace) -> "list[Step]":
    """Return the steps that the run ends with, and note in `job` those that are done again in any case."""
    from dgmd_pipeline import step, tasks

    last: list[Step] = [tasks.RegisterModel(job=job)]
    if options.until:
        last = step.named(step.line_of(*last), options.until)
    for word in options.force:
        for each in step.named(step.line_of(*last), word):
            job.forced[each.folder] = f"--force {word}"
    return last


def _what_stays(values: "Settings", last: "Step", nothing: str) -> str:
    """Say that the last step's outcome is what it was."""
    from dgmd_pipeline import step

    record = step.read_record(last.path)
    counts = record.counts if record else {}
    if values.refresh:
        nothing = f"Nothing new in s3://{values.aws_data_bucket}/{values.aws_data_path}"
        return f"{nothing}: keeping version {counts['version']}." if "version" in counts else f"{nothing}."
    if "version" in counts:
        return f"{nothing}: {counts['name']} version {counts['version']} is registered."
    return f"{nothing}: {last.folder} is done."


def _check_what_comes_last(values: "Settings", job: "Job") -> None:
    """Look for what would only fail at the end, before the first step."""
    from dgmd_pipeline import model, registry, settings, tasks

    learning = {tasks.TrainModel.name, *(f"{tasks.ExtractFeatures.name}_{side}" for side in tasks.SIDES)}
    if any(job.outlooks[name].state != "done" for name in learning & job.outlooks.keys()):
        model.check_weights(values.backbone, values.backbone_weights, values.keras_home)
    if values.mlflow_tracking_uri and tasks.RegisterModel.name in job.outlooks:
        warning = registry.check_server(values.mlflow_tracking_uri, settings.mlflow_login())
        if warning:
            log.warning("%s", warning)


def _build(last: "list[Step]", verbose: bool) -> int:
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


def _plan(options: argparse.Namespace) -> int:
    values = _settings(options)
    from dgmd_pipeline import folders, step

    with folders.disk_errors_explained(values.data_dir):
        outlooks = step.plan(*_last(step.Job(values), options))
    if options.json:
        steps = [dataclasses.asdict(outlook) for outlook in outlooks]
        print(json.dumps({"data_dir": str(values.data_dir), "steps": steps}, indent=1))  # noqa: T201
    else:
        _show_plan(outlooks, values.data_dir)
    return 0


def _show_plan(outlooks: "Sequence[Outlook]", data_dir: Path) -> None:
    from dgmd_pipeline.folders import human

    log.info("Plan for %s", data_dir)
    # A log's lines stay whole, for those who search it; on a terminal what does not fit stays in its column.
    width = shutil.get_terminal_size().columns - 48 if sys.stdout.isatty() else 10_000
    log.info("  %-19s %-5s %9s %8s  %s", "step", "state", "images", "size", "why")
    for each in outlooks:
        images = "" if each.images is None else f"{each.images:,}"
        size = "" if each.bytes is None else human(each.bytes)
        why = textwrap.wrap(each.reason, max(20, width)) or [""]
        row = f"  {each.step:19} {each.state:5} {images:>9} {size:>8}  " + f"\n{48 * ' '}".join(why)
        log.info("%s", row.rstrip())


def _show_times(job: "Job", seconds: float) -> None:
    from dgmd_pipeline import timing

    if job.records:
        log.info("Where the time went")
        for line in timing.lines(timing.rows(job.records, seconds)):
            log.info("%s", line)


def _demo(options: argparse.Namespace) -> int:
    from dgmd_pipeline import demo

    if options.force or options.until or options.refresh:
        raise SettingsError(
            f"demo takes no --force, --until or --refresh: give them to `run --env-file {demo.ENV_FILE}`."
        )
    return demo.run(lambda arguments: main([*arguments, *(["--verbose"] if options.verbose else [])]))


def _log(stream: TextIO, verbose: bool) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines("%(message)s" if stream.isatty() else "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.raiseExceptions = False  # whoever reads a run through `head` does not want to hear of the closed pipe
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


class _Lines(logging.Formatter):
    """Lines without secrets; warnings and errors say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        from dgmd_pipeline.settings import redact

        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def _show_fault(_: type[BaseException], error: BaseException, __: object) -> None:
    log.error("%s", "".join(traceback.format_exception(error)))
