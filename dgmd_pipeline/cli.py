"""The command line: parses the arguments, calls a command, and returns its exit code."""

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dgmd_pipeline import environment
from dgmd_pipeline.commands import logs
from dgmd_pipeline.errors import Declined, PipelineError, SettingsError
from dgmd_pipeline.workflow import disk, process, signals

if TYPE_CHECKING:
    from dgmd_pipeline.settings import Settings

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

log = logging.getLogger("dgmd_pipeline")
# Rows are tuples without reference cycles, so the garbage collector has nothing to free among them. By default, it runs
# after 700 new objects, and would take a tenth of the time of the steps that process rows. This share grows with the
# number of rows.
ROWS_BETWEEN_COLLECTIONS = 100_000

EXIT_CODES = """exit codes:
  0    success
  1    health: the check failed; other commands: a bug of the pipeline
  2    invalid setting or argument, file-name encoding other than UTF-8, or
       fewer than 256 open files allowed
  10   another run holds DATA_DIR
  20   no usable input: bucket, credentials, images, labels, corrections.csv,
       version or file; predict: a file that cannot be read
  30   run: a step failed; other commands: MLflow does not answer, or the
       output could not be written
  40   refused: a condition fails, the answer was no, or there is no previous
       version
  130  interrupted (SIGINT)
  137  killed (SIGKILL), in most cases because memory ran out
  143  terminated (SIGTERM)
"""
DEFAULTS: dict[str, object] = {
    "env_file": None,
    "verbose": False,
    "force_before": [],
    "force": [],
    "until": None,
    "refresh": False,
    "only_if_better": False,
    "json": False,
    "csv": False,
    "time": 0,
}
STEPS = "download, inspect, label, balance, split, convert, extract, train, evaluate or register"


def command() -> NoReturn:
    """Run `main`, and end the process with the exit code that `main` returns."""
    gc.set_threshold(ROWS_BETWEEN_COLLECTIONS)
    logs.protect_streams()
    code = main()
    if lost := logs.lost_output():
        print(f"error: {lost}. Lines are missing there.", file=sys.stderr)  # noqa: T201 - the log may be lost, too
    # A normal exit would wait for threads of libraries (up to 9 s were measured) and for TensorFlow's clean-up (1 s).
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments, argparse.Namespace(**DEFAULTS))
    options.force = options.force_before + options.force
    if options.time and options.command is not _run_or_schedule:
        parser.error("--time cannot be combined with a command")
    try:
        with signals.handle_signals():
            # If a command prints data to stdout, the log goes to stderr. All output of `predict` counts as data,
            # because users often redirect it to a file.
            printed = options.json or options.csv or vars(options).get("name") == "predict"
            stream, times = sys.stderr if printed else sys.stdout, options.command in (_run, _run_or_schedule, _demo)
            logs.start(stream, options.verbose, environment.wants_colours(), times)
            try:
                process.check()
                code = options.command(options)
            except PipelineError as error:
                log.log(logging.INFO if isinstance(error, Declined) else logging.ERROR, "%s", error)
                return error.exit_code
    except KeyboardInterrupt:
        log.error("%s", signals.stop_message(signals.received[0]))
        return 128 + signals.received[0]
    # A run succeeds even if its log is lost. Any other command fails if its output is lost, because the output is the
    # command's only result.
    is_run = options.command in (_run, _run_or_schedule)
    return PipelineError.exit_code if not code and not is_run and logs.lost_output() else code


def _parser() -> argparse.ArgumentParser:
    # No option has a default in its parser. The default of a command's option would overwrite the value that the
    # operator gave before the command.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--env-file", metavar="FILE", help="read variables from FILE (default: .env, if it exists)")
    common.add_argument("--verbose", action="store_true", help="show Luigi's log, too")
    parser = argparse.ArgumentParser(
        "pipeline.py",
        description="Turn a bucket of labelled images into a registered image classifier.\nWithout a command: run.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # --force can be given before and after the command. If both positions shared an attribute, the values after
        # the command would replace the values before it.
        parents=[_step_options(common, "force_before")],
    )
    _add_only_if_better(parser)
    text = "repeat the run, waiting SECONDS between runs; with 0, run once"
    parser.add_argument("--time", metavar="SECONDS", type=_seconds, help=text)
    parser.set_defaults(command=_run_or_schedule)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_pipeline_commands(commands, common)
    _add_registry_commands(commands, common)
    return parser


def _step_options(common: argparse.ArgumentParser, force: str) -> argparse.ArgumentParser:
    """Return the options of `run` and `plan`; `force` is the attribute for the values of --force."""
    steps = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=[common])
    text = f"repeat STEP and all steps after it; may be given several times. STEP is {STEPS}, or a step's folder"
    steps.add_argument("--force", metavar="STEP", action="append", dest=force, help=text)
    steps.add_argument("--until", metavar="STEP", help="stop after STEP")
    steps.add_argument("--refresh", action="store_true", help="update the images from the bucket (REFRESH=true)")
    return steps


def _add_only_if_better(parser: argparse.ArgumentParser) -> None:
    text = "promote the version of the run if it is better than production (PROMOTE_IF_BETTER=true)"
    parser.add_argument("--only-if-better", action="store_true", default=argparse.SUPPRESS, help=text)


def _number(expected: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a function that reads a number from the command line. The function's error says what is `expected`."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if accepts(number := float(text)):
                return number
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return read


# The upper limits keep times within the dates that Python can represent.
_seconds = _number("seconds, 0 to 1e9", lambda number: 0 <= number <= 1e9)
_hours = _number("hours, more than 0 and at most 1e6", lambda number: 0 < number <= 1e6)


def _add(commands: "Commands", name: str, text: str, parent: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a command with the options of `parent`; `text` is for the list of commands and for the command's own help."""
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[parent])


def _add_pipeline_commands(commands: "Commands", common: argparse.ArgumentParser) -> None:
    steps = _step_options(common, "force")
    run = _add(commands, "run", "run the steps that are not done yet (the default)", steps)
    _add_only_if_better(run)
    run.set_defaults(command=_run)
    plan = _add(commands, "plan", "show what a run would do, and why", steps)
    plan.set_defaults(command=_plan)
    health = _add(commands, "health", "show whether the last run succeeded", common)
    health.set_defaults(command=_health)
    text = "fail if no run has succeeded in the last HOURS (HEALTH_MAX_AGE)"
    health.add_argument("--max-age", metavar="HOURS", type=_hours, help=text)
    demo = _add(commands, "demo", "run on a small data set behind a local S3 endpoint", common)
    demo.set_defaults(command=_demo)
    text = "do not run the pipeline; only serve the demo bucket to other containers, at PORT"
    demo.add_argument("--serve", metavar="PORT", type=int, help=text)
    for added in (plan, health):
        added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _add_registry_commands(commands: "Commands", common: argparse.ArgumentParser) -> None:
    def add(name: str, text: str) -> argparse.ArgumentParser:
        added = _add(commands, name, text, common)
        added.set_defaults(command=_registry_command, name=name)
        added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        return added

    add("models", "show the registered versions")
    promote = add("promote", "show the review of a version, and make the version production")
    promote.add_argument("version", nargs="?", default="@candidate", help="number or @alias (default: @candidate)")
    promote.add_argument(
        "--force", action="store_true", dest="anyway", help="promote even if a condition fails; requires --reason"
    )
    rollback = add("rollback", "restore the previous production version")
    for added in (promote, rollback):
        added.add_argument("--yes", action="store_true", help="do not ask for confirmation")
        added.add_argument("--reason", default="", metavar="TEXT", help="record TEXT in the history")
    add("history", "show who made which version production, and why")
    compare = add("compare", "compare two versions on the validation images in DATA_DIR")
    compare.add_argument("one", metavar="A", help="version: number or @alias")
    compare.add_argument("other", metavar="B", help="version to compare A with")
    predict = add("predict", "classify image files with a registered version")
    predict.add_argument("files", nargs="+", type=Path, metavar="FILE", help="image file, or folder of image files")
    version = predict.add_mutually_exclusive_group()
    version.add_argument("--version", metavar="V", help="number of the version")
    version.add_argument(
        "--alias", metavar="A", default="production", help="alias of the version (default: production)"
    )
    predict.add_argument("--csv", action="store_true", default=argparse.SUPPRESS, help="print CSV")


def _settings(options: argparse.Namespace) -> "Settings":
    from dgmd_pipeline import settings  # imported here, so that a signal during the import is handled

    values = settings.load(options.env_file)
    chosen = {"refresh": options.refresh, "promote_if_better": options.only_if_better}
    return values.model_copy(update={name: True for name, given in chosen.items() if given})


def _load_luigi(values: "Settings") -> str | None:
    """Read Luigi's configuration before Luigi is imported; return the address of the scheduler to report to."""
    from dgmd_pipeline.workflow import luigi_config

    found = luigi_config.load(values.luigi_config_path)
    return values.luigi_scheduler_url or found


def _run_or_schedule(options: argparse.Namespace) -> int:
    values = _settings(options)
    if not values.schedule and not options.time:
        return _run(options)
    from dgmd_pipeline.commands import schedule

    arguments = ["--verbose"] if options.verbose else []
    arguments += ["--only-if-better"] if options.only_if_better else []
    for name, value in (("--env-file", options.env_file), ("--until", options.until)):
        arguments += [name, value] if value else []
    for step in options.force:
        arguments += ["--force", step]
    schedule.schedule(values, options.time, arguments)
    return 0


def _run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    values = _settings(options)
    scheduler_url = _load_luigi(values)
    from dgmd_pipeline.commands import run  # after the settings, so that an invalid setting is reported immediately

    return run.run(values, options.force, options.until, options.verbose, start, scheduler_url)


def _plan(options: argparse.Namespace) -> int:
    values = _settings(options)
    _load_luigi(values)
    from dgmd_pipeline.commands import run

    run.plan(values, options.force, options.until, options.json)
    return 0


def _health(options: argparse.Namespace) -> int:
    values = _settings(options)
    from dgmd_pipeline.commands import health

    return health.health(values, options.json, options.max_age)


def _demo(options: argparse.Namespace) -> int:
    from dgmd_pipeline.commands import demo

    given = ("env_file", "force", "until", "refresh", "only_if_better")
    if refused := [f"--{name.replace('_', '-')}" for name in given if getattr(options, name)]:
        raise SettingsError(
            f"demo does not accept {', '.join(refused)}. After the demo, use them with `run --env-file "
            f"{demo.ENV_FILE}`."
        )
    if options.serve is not None:
        demo.serve(options.serve)
    return demo.run(lambda arguments: main([*arguments, *(["--verbose"] if options.verbose else [])]))


def _registry_command(options: argparse.Namespace) -> int:
    values = _settings(options)
    _load_luigi(values)
    with disk.disk_errors_explained(values.data_dir, options.name):
        _call_registry_command(options, values)
    return 0


def _call_registry_command(options: argparse.Namespace, values: "Settings") -> None:
    from dgmd_pipeline.commands import compare, history, models, predict, promotion

    match options.name:
        case "models":
            models.models(values, options.json)
        case "promote":
            promotion.promote(values, options.version, options.yes, options.anyway, options.reason, options.json)
        case "rollback":
            promotion.rollback(values, options.yes, options.reason, options.json)
        case "history":
            history.history(values, options.json)
        case "compare":
            compare.compare(values, options.one, options.other, options.json)
        case "predict":
            form: predict.Format = "json" if options.json else "csv" if options.csv else "table"
            predict.predict(values, options.files, options.version or f"@{options.alias}", form)
