"""The step contract: a folder that is there is done; where it comes from, whether it is today's, and why not.

`_SUCCESS` inside a step's folder says where it comes from. `plan` reads these records once, before Luigi starts, and
says what will run and why; `Step` is the Luigi task that keeps the contract. See docs/design.md, section 2.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import luigi
from luigi.parameter import ParameterVisibility

from dgmd_pipeline import formatting
from dgmd_pipeline.workflow import disk, folders, provenance
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.provenance import StepRecord

log = logging.getLogger(__name__)


class Values(Protocol):
    """What a step needs of the settings object."""

    @property
    def data_dir(self) -> Path:
        """Where the step folders are."""

    def public(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return settings as JSON values without secrets."""


class UpstreamChange(NamedTuple):
    """Why a folder is out of date though neither settings nor inputs differ, and what it will be."""

    reason: str
    identity: str | None
    images: int | None
    bytes: int | None


@dataclass(eq=False)
class Job:
    """What the steps of one run share: its settings, its processes and what is known of each folder."""

    settings: Values
    pool: Any = None
    check_stopped: Callable[[], None] = lambda: None  # raises when the run has been asked to stop
    forced: dict[str, str] = field(default_factory=dict)  # step -> why it is done again in any case
    listing: Any = None  # of the bucket, where planning needed it: it is made once in a run
    network: Callable[[], Any] | None = None  # waits for the frozen network, which is built once in a run
    trained: tuple[str, Any] | None = None  # identity and model, where this run has trained it
    outlooks: dict[str, StepPlan] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)  # step -> identity
    records: list[StepRecord] = field(default_factory=list)  # of the steps that worked in this run, in their order
    failure: BaseException | None = None
    failed: str | None = None  # the step that did


class JobParameter(luigi.Parameter):
    """A `Job` as Luigi parameter: task ids and logs show a hash of its settings, never their values."""

    def serialize(self, x: Job) -> str:
        return provenance.digest(x.settings.public())[:10]


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
    verb: ClassVar[str] = ""  # what people call it on the command line
    format: ClassVar[int] = 1  # raised by hand when what the step writes changes
    uses: ClassVar[tuple[str, ...]] = ()  # settings that what it writes depends on
    reads: ClassVar[tuple[str, ...]] = ()  # settings that it needs, but that change nothing in what it writes
    data_is_welcome: ClassVar[bool] = False  # a folder without a record is the operator's own and used as it is
    resumes: ClassVar[bool] = False  # goes on with the draft of a run that was stopped

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

    def made_of(self, inputs: dict[str, str]) -> str:
        """Return the identity of everything that decides what the step writes."""
        return provenance.digest([self.folder, self.format, self.declared(), inputs])

    def expected(self, inputs: dict[str, str]) -> str | None:
        """Return the identity of what the step will write, or None where only the work can tell."""
        return self.made_of(inputs)

    def identify(self, folder: Path, inputs: dict[str, str]) -> str:
        """Return the identity of what `folder` holds."""
        del folder
        return self.made_of(inputs)

    def news(self, record: StepRecord | None) -> UpstreamChange | None:
        """Look whether the world outside has changed since the folder was made; None where it has not."""

    def images(self, counts: dict[str, Any]) -> int | None:
        """Return how many images the folder holds or says something about."""
        return counts.get("images")

    def worked(self, counts: dict[str, Any]) -> int | None:
        """Return how many images the step has worked on just now."""
        return self.images(counts)

    def volume(self, counts: dict[str, Any]) -> int | None:
        """Return how many bytes of pictures have just gone through the step."""

    def given(self, before: Sequence[StepPlan]) -> int | None:
        """Return how many images the step gets from those before it, as far as is known."""
        return next((outlook.images for outlook in before if outlook.images is not None), None)

    def needs(self) -> int | None:
        """Return about how many bytes the step will write, where that can be told."""
        record = provenance.read_record(self.path)
        return record.bytes if record else None

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
        record = provenance.read_record(self.path)
        # With nothing before it that could turn out to be what it was, a step is not asked to run without need.
        if self.deps() and record and not reasons(self, record, inputs) and not self.news(record):
            folders.sweep(self.path.parent, [self.folder])
            self.job.finished[self.folder] = record.identity
            log.info("%-20s unchanged", self.folder)
            return
        log.info("%-20s ...", self.folder)
        started, start = formatting.utc_now(), time.monotonic()
        purpose = self.made_of(inputs) if self.resumes else None
        with (
            disk.disk_errors_explained(self.path.parent, self.folder, self.needs()),
            folders.draft(self.path, purpose) as folder,
        ):
            (folder / provenance.SUCCESS).unlink(missing_ok=True)  # of a run that was killed just before its last act
            counts = self.work(folder)
            self.job.check_stopped()
            seconds = round(time.monotonic() - start, 3)
            identity = self.identify(folder, inputs)
            record = StepRecord(
                step=self.folder,
                format=self.format,
                identity=identity,
                settings=self.declared(),
                inputs=inputs,
                counts=counts,
                started=started,
                seconds=seconds,
                version=version("dgmd_pipeline"),
                images=self.images(counts),
                bytes=disk.folder_bytes(folder),
                worked=self.worked(counts),
                volume=self.volume(counts),
            )
            (folder / provenance.SUCCESS).write_text(
                json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n", "utf-8"
            )
        self.job.finished[self.folder] = identity
        self.job.records.append(record)
        log.info("%-20s %s (%.1f s)", self.folder, self.summary(counts), seconds)

    def on_failure(self, exception: BaseException) -> str:
        """Keep the exception for whoever started the run; Luigi would only log it."""
        self.job.failure, self.job.failed = exception, self.folder
        return super().on_failure(exception)


def differences(step: Step, record: StepRecord, inputs: Mapping[str, str]) -> list[str]:
    """Return in what a folder with this record is not what the step would make now."""
    now = step.declared()
    found = [
        f"{name.upper()} {_shown(record.settings, name)} -> {_shown(now, name)}"
        for name in sorted({*record.settings, *now})
        if name not in record.settings or name not in now or record.settings[name] != now[name]
    ]
    if record.format != step.format:
        found.append(f"format {record.format} -> {step.format}")
    found += [
        f"{name} changes" for name in sorted({*record.inputs, *inputs}) if record.inputs.get(name) != inputs.get(name)
    ]
    return found


def _shown(settings: dict[str, Any], name: str) -> str:
    return "(not used)" if name not in settings else "(not set)" if settings[name] is None else str(settings[name])


def reasons(step: Step, record: StepRecord, inputs: Mapping[str, str]) -> list[str]:
    """Return why a folder with this record is to be made again."""
    forced = step.job.forced.get(step.folder)
    return [forced] if forced else differences(step, record, inputs)
