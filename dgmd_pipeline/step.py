"""The step contract: a folder that is there is done; how it is committed, recorded, identified and explained.

A step writes into a draft folder beside its target and renames it in place as its last act, so that a folder that
exists is complete. `_SUCCESS` inside it says where it comes from. `plan` reads these records once, before Luigi starts,
and says what will run and why; `Step` is the Luigi task that keeps the contract. See docs/design.md, section 2.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol, TextIO

import luigi
from luigi.parameter import ParameterVisibility

from dgmd_pipeline.errors import Busy, PipelineError

log = logging.getLogger(__name__)
SUCCESS = "_SUCCESS"


@dataclass(frozen=True)
class Record:
    """What `_SUCCESS` says of the folder it is in."""

    step: str  # the folder's name
    format: int  # number of the way it writes, raised when that changes
    identity: str  # hash, or an id of its own
    settings: dict[str, Any]  # those it was made with
    inputs: dict[str, str]  # name of an input -> its identity
    counts: dict[str, Any]  # what it came to, for people
    started: str  # ISO 8601, UTC
    seconds: float
    version: str  # of this package


def read_record(folder: Path) -> Record | None:
    """Return the record of a finished folder, or None where there is none that can be read."""
    try:
        return Record(**json.loads((folder / SUCCESS).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def digest(value: object) -> str:
    """Return the sha256 of a JSON value, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def walk(folder: Path) -> str:
    """Return the identity of files that nobody recorded: paths, sizes and modification times of those in subfolders."""
    entries = []
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(path) != folder:
            for name in sorted(name for name in names if not name.startswith(".")):
                status = Path(path, name).lstat()
                entries.append([f"{path[len(str(folder)) :]}/{name}", status.st_size, status.st_mtime_ns])
    return digest(entries)


@contextlib.contextmanager
def draft(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` to write in; it takes its place when the block ends, or is removed."""
    folder, old = target.with_name(f".draft-{target.name}"), target.with_name(f".old-{target.name}")
    remove(folder)
    folder.mkdir()
    try:
        yield folder
        # Two renames, because one onto a folder that is not empty fails; `recover` mends a crash between them.
        if target.exists():
            target.rename(old)
        folder.rename(target)
        if old.exists():
            old.rename(folder)  # a draft again: one that is only partly removed must never be put back
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder where there is one, or the file that is in its place."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()


def recover(data_dir: Path) -> None:
    """Put back or sweep away what a killed run left behind."""
    for old in data_dir.glob(".old-*"):
        target = old.with_name(old.name.removeprefix(".old-"))
        if not target.exists():
            old.rename(target)
        remove(old)
    for folder in data_dir.glob(".draft-*"):
        remove(folder)


@contextlib.contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    """Hold `data_dir` for one run. The lock is the kernel's and dies with its process.

    Raises Busy, naming the process that holds it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{data_dir} is in use by another run: {_holder(file)}. Wait until it has ended.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {_now()}")
        file.flush()
        yield
        file.truncate(0)


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read() or "a process that has only just started"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Values(Protocol):
    """What a step needs of the settings object."""

    @property
    def data_dir(self) -> Path:
        """Where the step folders are."""

    def public(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return settings as JSON values without secrets."""


@dataclass(frozen=True)
class Outlook:
    """What will become of a step, and why."""

    step: str
    state: str  # "done", "run" or "maybe": only if what is before it changes
    reason: str
    identity: str | None  # the one it has or will have, where that is known beforehand
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Job:
    """What the steps of one run share: its settings, its processes and what is known of each folder."""

    settings: Values
    pool: Any = None
    check_stopped: Callable[[], None] = lambda: None  # raises when the run has been asked to stop
    outlooks: dict[str, Outlook] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)  # step -> identity
    failure: BaseException | None = None


class JobParameter(luigi.Parameter):
    """A `Job` as Luigi parameter: task ids and logs show a hash of its settings, never their values."""

    def serialize(self, x: Job) -> str:
        return digest(x.settings.public())[:10]


class Declared:
    """The settings that a step has declared; any other is an AttributeError."""

    def __init__(self, values: Values, names: Iterable[str]) -> None:
        self._values, self._names = values, frozenset(names)

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"the step reads the setting {name} without declaring it")
        return getattr(self._values, name)


class Step(luigi.Task):
    """A Luigi task that keeps the step contract. A subclass declares what it uses and does its work."""

    job: Job = JobParameter(visibility=ParameterVisibility.PRIVATE)
    name: ClassVar[str]  # of its folder below DATA_DIR
    format: ClassVar[int] = 1  # raised by hand when what the step writes changes
    uses: ClassVar[tuple[str, ...]] = ()  # settings that what it writes depends on
    reads: ClassVar[tuple[str, ...]] = ()  # settings that it needs, but that change nothing in what it writes
    data_is_welcome: ClassVar[bool] = False  # a folder without a record is the operator's own and used as it is

    @property
    def folder(self) -> str:
        """The name of the step's folder below DATA_DIR."""
        return self.name

    def work(self, draft: Path) -> dict[str, Any]:
        """Write into `draft` and return what it came to, for the record and the line of the step."""
        raise NotImplementedError

    def summary(self, counts: dict[str, Any]) -> str:
        """Return what the step came to, in words."""
        return ", ".join(f"{value:,} {name}" for name, value in counts.items())

    def expected(self, inputs: dict[str, str]) -> str | None:
        """Return the identity of what the step will write, or None where only the work can tell."""
        return digest([self.folder, self.format, self.declared(), inputs])

    def identify(self, folder: Path, inputs: dict[str, str]) -> str:
        """Return the identity of what `folder` holds."""
        del folder
        return digest([self.folder, self.format, self.declared(), inputs])

    def others(self) -> dict[str, str]:
        """Return the identities of inputs that are not steps."""
        return {}

    @property
    def path(self) -> Path:
        """The step's folder."""
        return self.job.settings.data_dir / self.folder

    @property
    def settings(self) -> Any:
        """The settings that the step has declared."""
        return Declared(self.job.settings, self.uses + self.reads)

    def declared(self) -> dict[str, Any]:
        """Return the settings that what the step writes depends on, as they are recorded."""
        return self.job.settings.public(self.uses)

    def complete(self) -> bool:
        """Tell from what is known whether the step has nothing left to do. Luigi asks again and again."""
        return self.folder in self.job.finished

    def run(self) -> None:
        """Work, unless the inputs turn out to be what they were."""
        inputs = {task.folder: self.job.finished[task.folder] for task in self.deps()} | self.others()
        record = read_record(self.path)
        if record and not differences(self, record, inputs):
            self.job.finished[self.folder] = record.identity
            log.info("%-20s unchanged", self.folder)
            return
        log.info("%-20s ...", self.folder)
        started, start = _now(), time.monotonic()
        with disk_errors_explained(self.path.parent), draft(self.path) as folder:
            counts = self.work(folder)
            self.job.check_stopped()
            seconds = round(time.monotonic() - start, 3)
            identity = self.identify(folder, inputs)
            record = Record(
                self.folder, self.format, identity, self.declared(), inputs, counts, started, seconds, _version()
            )
            (folder / SUCCESS).write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n", "utf-8")
        self.job.finished[self.folder] = identity
        log.info("%-20s %s (%.1f s)", self.folder, self.summary(counts), seconds)

    def on_failure(self, exception: BaseException) -> str:
        """Keep the exception for whoever started the run; Luigi would only log it."""
        self.job.failure = exception
        return super().on_failure(exception)


def _version() -> str:
    return version("dgmd_pipeline")


@contextlib.contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn what the disk under `folder` refuses into a PipelineError; any other OSError passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"{folder}: the disk is full ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free). Make room and "
                "run again: finished steps are kept."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EBUSY):
            raise PipelineError(
                f"{error.filename or folder}: {error.strerror}. DATA_DIR has to be a folder that user {os.getuid()}, "
                f"whom the pipeline runs as, can read and write: `chown -R {os.getuid()}` it, run as its owner "
                "(docker run --user), mend its mount, or choose another one."
            ) from None
        raise


def differences(step: Step, record: Record, inputs: dict[str, str]) -> list[str]:
    """Return why a folder with this record is not what the step would make now."""
    now = step.declared()
    reasons = [
        f"{name.upper()} {_shown(record.settings, name)} -> {_shown(now, name)}"
        for name in sorted({*record.settings, *now})
        if name not in record.settings or name not in now or record.settings[name] != now[name]
    ]
    if record.format != step.format:
        reasons.append(f"format {record.format} -> {step.format}")
    reasons += [
        f"{name} changes" for name in sorted({*record.inputs, *inputs}) if record.inputs.get(name) != inputs.get(name)
    ]
    return reasons


def _shown(settings: dict[str, Any], name: str) -> str:
    return "(not used)" if name not in settings else "(not set)" if settings[name] is None else str(settings[name])


def line_of(last: Step) -> list[Step]:
    """Return all steps that lead to `last`, and itself, each after those that it needs."""
    steps: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.folder not in steps:
            for task in step.deps():
                visit(task)
            steps[step.folder] = step

    visit(last)
    return list(steps.values())


def plan(last: Step) -> list[Outlook]:
    """Read the folders' records and say for every step up to `last` what will become of it, in running order."""
    outlooks: dict[str, Outlook] = {}
    for step in line_of(last):
        outlooks[step.folder] = _outlook(step, [outlooks[task.folder] for task in step.deps()])
    last.job.outlooks = outlooks
    last.job.finished = {
        name: outlook.identity for name, outlook in outlooks.items() if outlook.state == "done" and outlook.identity
    }
    return list(outlooks.values())


def _outlook(step: Step, before: list[Outlook]) -> Outlook:
    known = {outlook.step: outlook.identity for outlook in before if outlook.identity}
    inputs = known | step.others()
    unknown = [outlook.step for outlook in before if not outlook.identity]
    expected = None if unknown else step.expected(inputs)
    if not step.path.exists():
        return Outlook(step.folder, "run", "folder is missing", expected)
    record = read_record(step.path)
    if record is None:
        if step.data_is_welcome:
            return Outlook(step.folder, "done", "put there by hand: used as it is", walk(step.path))
        return Outlook(step.folder, "run", f"no readable {SUCCESS}: made by hand or by an older version", expected)
    reasons = differences(step, record, inputs | {name: record.inputs.get(name, "new") for name in unknown})
    if reasons:
        return Outlook(step.folder, "run", ", ".join(reasons), expected)
    pending = [outlook.step for outlook in before if outlook.state != "done"]
    if pending:
        identity = None if unknown else record.identity
        return Outlook(step.folder, "maybe", f"only if {' or '.join(pending)} changes", identity, record.counts)
    return Outlook(step.folder, "done", "", record.identity, record.counts)
