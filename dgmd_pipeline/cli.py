"""The commands: arguments and environment -> settings -> graph -> exit code."""

import argparse
import contextlib
import dataclasses
import errno
import gc
import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from dgmd_pipeline.errors import PipelineError, SettingsError
from dgmd_pipeline.workflow import signals

if TYPE_CHECKING:
    from dgmd_pipeline.commands.status import Status
    from dgmd_pipeline.settings import Settings

log = logging.getLogger("dgmd_pipeline")
# Millions of rows are tuples, which hold no cycles: looking at them after every 700 new ones takes a tenth of the time
# of the steps that work on rows, and grows faster than they do. docs/measurements.md
ROWS_BETWEEN_COLLECTIONS = 100_000

EXIT_CODES = """exit codes:
  0    what was asked for is there
  2    a setting or an argument is wrong
  10   another run holds DATA_DIR
  20   no usable input: bucket, credentials, pictures, labels or corrections.csv
  30   a step failed
  40   refused: a model does not meet the conditions for production
  130  interrupted (SIGINT)
  143  terminated (SIGTERM)
"""


def command() -> NoReturn:
    """Be the process: run `main` and exit with its code."""
    gc.set_threshold(ROWS_BETWEEN_COLLECTIONS)
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
    if options.time and options.command is not _start:
        _parser().error("--time stands alone: it is of no command")
    try:
        with signals.handle_signals():
            _log(sys.stderr if options.json or options.csv else sys.stdout, options.verbose)
            sys.excepthook = _show_fault
            try:
                return options.command(options)
            except PipelineError as error:
                log.error("%s", error)
                return error.exit_code
    except KeyboardInterrupt:
        log.error("%s", signals.stop_message(signals.received[0]))
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
    "time": 0,
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
    parser.add_argument(
        "--time", metavar="SECONDS", type=_seconds, help="run again and again, so long after the end of each"
    )
    parser.set_defaults(command=_start)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command, text in (
        ("run", _run, "do what is not done yet (the default)"),
        ("plan", _plan, "show what a run would do, and why"),
        ("health", _health, "tell whether the last run succeeded"),
        ("demo", _demo, "run on a small data set behind a local S3 endpoint"),
    ):
        takes_steps = command in (_run, _plan)
        added = commands.add_parser(
            name, help=text, parents=[_step_options(common, "force") if takes_steps else common]
        )
        added.set_defaults(command=command)
        if command is _demo:
            added.add_argument(
                "--serve", metavar="PORT", type=int, help="only offer the demo's bucket at PORT, to other containers"
            )
        if command in (_plan, _health):
            added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    _add_operations(commands, common)
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1e9:  # what comes later has no date
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected seconds, 0 to 1e9")


def _add_operations(commands: Any, common: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, operation: Callable[[Any, "Settings", argparse.Namespace], None]) -> Any:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[common])
        added.set_defaults(command=_operate, operation=operation)
        added.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        return added

    def ask(added: Any) -> None:
        added.add_argument("--yes", action="store_true", help="do not ask")
        added.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")

    add("models", "show the registered versions", lambda do, values, given: do.models.models(values, given.json))
    promote = add(
        "promote",
        "make a version production, after a look at its assessment",
        lambda do, values, given: do.promotion.promote(
            values, given.version, given.yes, given.anyway, given.reason, given.json
        ),
    )
    promote.add_argument("version", nargs="?", default="@candidate", help="number or @alias (default: @candidate)")
    promote.add_argument("--force", action="store_true", dest="anyway", help="even if a condition does not hold")
    ask(promote)
    ask(
        add(
            "rollback",
            "make the version production that was it before",
            lambda do, values, given: do.promotion.rollback(values, given.yes, given.reason, given.json),
        )
    )
    add(
        "history",
        "show who made which version production, and why",
        lambda do, values, given: do.models.history(values, given.json),
    )
    compare = add(
        "compare",
        "compare two versions on the validation pictures in DATA_DIR",
        lambda do, values, given: do.compare.compare(values, given.one, given.other, given.json),
    )
    compare.add_argument("one", help="version: number or @alias")
    compare.add_argument("other", help="the version to compare it with")
    predict = add(
        "predict",
        "print label and probability of picture files, by a registered version",
        lambda do, values, given: do.predict.predict(
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
    _load_luigi(values)
    from dgmd_pipeline import commands
    from dgmd_pipeline.commands import compare, models, predict, promotion  # noqa: F401

    options.operation(commands, values, options)
    return 0


def _settings(options: argparse.Namespace) -> "Settings":
    from dgmd_pipeline import settings  # here, so that a signal is heard while it is imported

    values = settings.load(options.env_file)
    return values.model_copy(update={"refresh": True}) if options.refresh else values


def _load_luigi(values: "Settings") -> str | None:
    """Read Luigi's configuration before anything imports Luigi; return the address of the scheduler to report to."""
    from dgmd_pipeline.workflow import luigi_config

    found = luigi_config.load(values.luigi_config_path)
    return values.luigi_scheduler_url or found


def _start(options: argparse.Namespace) -> int:
    """Do what no command means: run once, or at the times that are set."""
    values = _settings(options)
    if not values.schedule and not options.time:
        return _run(options)
    if values.schedule and options.time:
        raise SettingsError(f"SCHEDULE={values.schedule} and --time {options.time:g}: expected one of the two.")
    from dgmd_pipeline.commands import schedule

    times = schedule.at(values.schedule, schedule.zone(values.tz)) if values.schedule else schedule.every(options.time)
    command = [sys.executable, sys.argv[0], "run", "--refresh", *(["--verbose"] if options.verbose else [])]
    for name, value in (("--env-file", options.env_file), ("--until", options.until)):
        command += [name, value] if value else []
    for step in options.force:
        command += ["--force", step]
    known = _told(values)

    def ended(code: int, seconds: float) -> None:
        nonlocal known
        _ended(values, code, seconds, has_told=_told(values) != known)
        known = _told(values)

    schedule.run_on_schedule(command, times, ended)
    return 0


def _told(values: "Settings") -> "Status | None":
    from dgmd_pipeline.commands import status

    with contextlib.suppress(OSError):  # a folder that cannot be read holds nothing that was told
        return status.read(values.data_dir)
    return None


def _ended(values: "Settings", code: int, seconds: float, has_told: bool) -> None:
    """Say what became of a scheduled run; where it was killed or could not begin, it has not told so itself."""
    from dgmd_pipeline.commands import run

    if code:
        log.error("The run ended with exit code %d; the next one comes all the same.", code)
    if code >= 0 and code not in (1, SettingsError.exit_code):  # these two may be of before the run began
        return
    if not has_told:
        killed = f"killed by signal {-code}, as when memory runs out"
        message = killed if code < 0 else "the run could not begin; the log says why"
        run.publish_status(values, None, 128 - code if code < 0 else code, message, seconds)


def _run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    values = _settings(options)
    scheduler_url = _load_luigi(values)
    from dgmd_pipeline.commands import run  # after the settings: mistakes are answered at once

    return run.run(values, options.force, options.until, options.verbose, start, scheduler_url)


def _plan(options: argparse.Namespace) -> int:
    values = _settings(options)
    _load_luigi(values)
    from dgmd_pipeline.commands import run

    outlooks = run.plan(values, options.force, options.until)
    if options.json:
        steps = [plan.as_json() for plan in outlooks]
        print(json.dumps({"data_dir": str(values.data_dir), "steps": steps}, indent=1))  # noqa: T201
    else:
        run.show_plan(outlooks, values.data_dir)
    return 0


def _health(options: argparse.Namespace) -> int:
    values = _settings(options)
    from dgmd_pipeline.commands import status
    from dgmd_pipeline.workflow import disk

    with disk.disk_errors_explained(values.data_dir):
        last = status.read(values.data_dir)
        if not values.data_dir.is_dir():
            log.error("%s: there is no such folder, so no run has ended there.", values.data_dir)
            return 1
        if not os.access(values.data_dir, os.W_OK):  # what is known is old: no run can say anything newer
            reason = errno.EROFS if os.statvfs(values.data_dir).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(reason, os.strerror(reason), str(values.data_dir))
    if options.json:
        print(json.dumps(last and dataclasses.asdict(last), indent=1))  # noqa: T201
    elif last is None:
        log.info("No run has ended yet in %s.", values.data_dir)
    else:
        log.info("%s: %s after %.0f s. %s", last.ended, last.outcome, last.seconds, last.message)
    return 0 if last is None or last.is_good else 1


def _demo(options: argparse.Namespace) -> int:
    from dgmd_pipeline.commands import demo

    if options.force or options.until or options.refresh:
        raise SettingsError(
            f"demo takes no --force, --until or --refresh: give them to `run --env-file {demo.ENV_FILE}`."
        )
    if options.serve is not None:
        demo.serve(options.serve)
    return demo.run(lambda arguments: main([*arguments, *(["--verbose"] if options.verbose else [])]))


def _log(stream: TextIO, verbose: bool) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # the line with a name that is no text would be lost
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines("%(message)s" if stream.isatty() else "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.raiseExceptions = False  # whoever reads a run through `head` does not want to hear of the closed pipe
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


class _Lines(logging.Formatter):
    """Lines without secrets; warnings and errors say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        from dgmd_pipeline.formatting import redact

        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def _show_fault(_: type[BaseException], error: BaseException, __: object) -> None:
    log.error("%s", "".join(traceback.format_exception(error)))
