"""The Luigi task of this pipeline: a step writes one folder below DATA_DIR and records what the folder was made from.

docs/architecture.md has the rules for steps.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import luigi

from dgmd_pipeline import formatting
from dgmd_pipeline.workflow import disk, folders, lock, planning, progress, run_context
from dgmd_pipeline.workflow.planning import StepPlan
from dgmd_pipeline.workflow.run_context import RunContext, Values
from dgmd_pipeline.workflow.success_file import (
    SUCCESS,
    Json,
    Reason,
    StepRecord,
    differences,
    digest,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)


@cache
def _version() -> str:
    return version("dgmd_pipeline")


class UpstreamChange(NamedTuple):
    """A change outside the pipeline, for example in the bucket, which requires that a step runs again.

    The fields `fingerprint`, `images` and `bytes` describe the folder that the step will write. None: not known yet.
    """

    reason: str
    fingerprint: str | None = None
    images: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class StepResult:
    """The result of a step's work."""

    counts: Json = field(default_factory=dict)  # for the record, and for the steps that follow
    images: int | None = None  # number of images that the folder contains or describes
    images_processed: int | None = None  # None: the same number as `images`
    bytes_processed: int | None = None  # bytes of images that were read or written
    summary: str = ""  # for the log


class DeploymentParameter(luigi.Parameter):
    """Name of the run and a hash of its settings.

    A scheduler uses it to distinguish the steps of several deployments. It does not reveal any setting.
    """

    def has_task_value(self, task_name: str, param_name: str) -> bool:
        """Return True, because `task_value` always has a value."""
        return True

    def task_value(self, task_name: str, param_name: str) -> str:
        """Return the value of the current run."""
        return run_context.current().deployment


class DeclaredSettings:
    """The settings that a step has declared. Reading another setting raises AttributeError."""

    def __init__(self, values: Values, names: Iterable[str]) -> None:
        self._values, self._names = values, frozenset(names)

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"the step reads the setting {name} without declaring it")
        return getattr(self._values, name)


class StepTarget(luigi.Target):
    """The folder of a step as a target of Luigi: `exists` tells whether the step is done."""

    def __init__(self, step: "Step") -> None:
        self._step = step
        self.path = step.path

    def exists(self) -> bool:
        """Return whether the step and every step before it are done."""
        return self.fingerprint() is not None

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the folder if the target exists, else None."""
        context, folder = self._step.context, self._step.folder
        known = context.result.fingerprints
        # `known` has the fingerprint of each folder that was done at the time of the planning. Each step of this run
        # adds its new fingerprint. There are two cases:
        # - This run has locked DATA_DIR. No other process changes the folders, so a planned folder that has no
        #   fingerprint in `known` is not done.
        # - Luigi's own command has started this run. The run has not locked DATA_DIR, and another process may have run
        #   the step, so the folder is examined again.
        if folder not in known and not (context.holds_lock and folder in context.result.planned):
            planning.plan(self._step)
        return known.get(folder)

    def __str__(self) -> str:
        return str(self.path)


class Step(luigi.Task):
    """A Luigi task that writes one folder. A subclass declares what the content depends on, and does the work."""

    deployment: str = DeploymentParameter()
    name: ClassVar[str]  # name of the folder below DATA_DIR
    verb: ClassVar[str] = ""  # name of the step on the command line
    format_version: ClassVar[int] = 1  # version of the files' format; increased when new code writes different files
    params: ClassVar[tuple[str, ...]] = ()  # settings that the content depends on
    runtime_params: ClassVar[tuple[str, ...]] = ()  # settings that are read but do not affect the content
    # Whether the operator may create the folder of the step. Such a folder has no record. The step uses it unchanged.
    accepts_external_data: ClassVar[bool] = False
    resumable: ClassVar[bool] = False  # whether the step continues the draft of a stopped run
    # Whether the step reuses the finished pieces in the draft of a stopped run. Each piece is a part of the work.
    keeps_pieces: ClassVar[bool] = False

    # Luigi's scheduler runs only one task with this resource at a time.
    resources = {"data_dir": 1}

    @property
    def folder(self) -> str:
        """The name of the step's folder below DATA_DIR."""
        return self.name

    @property
    def label(self) -> str:
        """The name of the step in progress lines."""
        return self.verb

    @property
    def context(self) -> RunContext:
        """The run that the step belongs to."""
        return run_context.current()

    @property
    def path(self) -> Path:
        """The step's folder."""
        return self.context.settings.data_dir / self.folder

    @property
    def settings(self) -> Any:
        """The settings that the step has declared."""
        return DeclaredSettings(self.context.settings, self.params + self.runtime_params)

    def requires(self) -> dict[str, "Step"]:
        """Return a dictionary: name that `work` uses for an input -> step that writes this input."""
        return {}

    @classmethod
    @cache
    def get_params(cls) -> list[tuple[str, luigi.Parameter]]:
        """Return the parameters of the class. They are cached, because Luigi calls this method for each new task."""
        return super().get_params()

    @cached_property
    def _needed(self) -> list["Step"]:
        return super().deps()

    def deps(self) -> list["Step"]:
        """Return the steps that this one needs. They are cached, because Luigi's own method creates them each time."""
        return self._needed

    def output(self) -> StepTarget:
        """Return the step's folder as a Luigi target."""
        return StepTarget(self)

    def work(self, draft: Path) -> StepResult:
        """Write into the folder `draft`, which becomes the step's folder, and return the result."""
        raise NotImplementedError

    # What a subclass may override

    def declared_settings(self) -> Json:
        """Return the settings that the content depends on, in the form that is recorded."""
        return self.context.settings.public(self.params)

    def extra_inputs(self) -> dict[str, str]:
        """Return the fingerprints of inputs that are not steps."""
        return {}

    def check_upstream(self, record: StepRecord | None) -> UpstreamChange | None:
        """Return what has changed outside the pipeline since the folder was made, or None."""

    def expected_fingerprint(self, inputs: Mapping[str, str]) -> str | None:
        """Return the fingerprint of what the step will write, or None if only the work reveals it."""
        return self._input_fingerprint(inputs)

    def fingerprint_of(self, folder: Path, inputs: Mapping[str, str]) -> str:
        """Return the fingerprint of what was written into `folder`."""
        del folder
        return self._input_fingerprint(inputs)

    def input_images(self, upstream: Sequence[StepPlan]) -> int | None:
        """Return how many images the step will get; None if unknown. Default: the number in the first input's plan."""
        return upstream[0].images if upstream else None

    def expected_reuse(self, upstream: Sequence[StepPlan]) -> str:
        """Return what the plan says about reuse from the folder of this step; "" if no reuse is expected."""
        return ""

    def describe_draft(self, kept: Path) -> str:
        """Return what the plan says about a step that will resume a stopped run. `kept` has the files of that run."""
        del kept
        return "continues a stopped run"

    def keeps_replaced(self) -> bool:
        """Return whether to keep the old folder of this step after the new folder has replaced it.

        Another step may reuse parts of the old folder.
        """
        return False

    def estimated_bytes(self) -> int | None:
        """Return about how many bytes the step will write, or None if that is unknown."""
        record = read_record(self.path)
        return record.bytes if record else None

    # The contract

    def stopped_work(self, upstream: Sequence[StepPlan]) -> str:
        """Return what the plan says about reuse from a stopped run; "" if nothing is reused."""
        if self._forced():
            return ""
        if self.keeps_pieces:
            pieces = len(folders.pieces(self.path))
            return f"{formatting.counted(pieces, 'finished piece')} of a stopped run" if pieces else ""
        inputs = {each.step: each.fingerprint for each in upstream if each.fingerprint} | self.extra_inputs()
        kept = folders.resumable(self.path, self._draft_fingerprint(inputs))
        return self.describe_draft(kept) if kept else ""

    def _input_fingerprint(self, inputs: Mapping[str, str]) -> str:
        """Return the fingerprint of everything that the content depends on."""
        return digest([self.folder, self.format_version, self.declared_settings(), inputs])

    def outdated(self, record: StepRecord, inputs: Mapping[str, str]) -> list[Reason]:
        """Return why a folder with this record is made again; an empty list if it is up to date."""
        if forced := self._forced():
            return [Reason("forced", forced)]
        return differences(record, self.declared_settings(), self.format_version, inputs)

    def reusable_folders(self) -> list[Path]:
        """Return the folders whose unchanged parts `work` may reuse; none if the step is forced.

        The finished folders of the step come first, then the pieces that a stopped run has finished.
        """
        return [] if self._forced() else [*self._finished_folders(), *folders.pieces(self.path)]

    def _finished_folders(self) -> list[Path]:
        """Return the step's folder and the replaced folder, each only if it exists and has the current format."""
        records = {path: read_record(path) for path in folders.versions(self.path)}
        return [path for path, record in records.items() if record and record.format == self.format_version]

    def _forced(self) -> str | None:
        """Return the reason if this step or a step before it is forced, else None."""
        forced = self.context.forced
        if not forced:
            return None
        steps = reversed(planning.upstream_steps(self))  # if the step itself is forced, its reason comes first
        return next((forced[step.folder] for step in steps if step.folder in forced), None)

    def run(self) -> None:
        """Do the work, unless the folder is up to date after all.

        It is up to date if the earlier steps have run and produced the same results as before.
        """
        with self._locked():
            known = self.context.result.fingerprints
            inputs = {task.folder: str(task.output().fingerprint()) for task in self.deps()} | self.extra_inputs()
            record = read_record(self.path)
            # A step without inputs needs no check: Luigi would not have started it if its folder were up to date.
            if self.deps() and record and not self.outdated(record, inputs) and not self.check_upstream(record):
                folders.sweep(self.path.parent, [self.folder])
                known[self.folder] = record.identity
                log.info("%-20s unchanged", self.folder)
                return
            self.context.tell(self.folder, "")
            total = len(self.context.result.planned)
            log.info("%-20s ... (step %d of %d)", self.folder, len(known) + 1, total)
            record, summary = self._write(inputs)
            known[self.folder] = record.identity
            self.context.result.records.append(record)
            self.context.result.summaries[self.folder] = summary
            log.info("%-20s %s (%.1f s)", self.folder, summary, record.seconds)

    def _draft_fingerprint(self, inputs: Mapping[str, str]) -> str | None:
        """Return the fingerprint of a draft that the step may resume; None if it never resumes a draft."""
        if self.keeps_pieces:  # each piece has its own fingerprint
            return digest([self.folder, self.format_version])
        return self._input_fingerprint(inputs) if self.resumable else None

    def _write(self, inputs: dict[str, str]) -> tuple[StepRecord, str]:
        started, start = formatting.utc_now(), time.monotonic()
        if self._forced():
            folders.sweep(self.path.parent, [self.folder])
        with (
            disk.disk_errors_explained(self.path.parent, self.folder),
            folders.draft(self.path, self._draft_fingerprint(inputs), self.keeps_replaced()) as draft,
            # The second `disk_errors_explained` explains an error of the work. It exits before `folders.draft` removes
            # the draft. So it examines the disk while the disk is still full.
            disk.disk_errors_explained(self.path.parent, self.folder, self.estimated_bytes()),
        ):
            # An earlier run may have been killed after it wrote this file and before it renamed the draft.
            (draft / SUCCESS).unlink(missing_ok=True)
            if self.keeps_pieces and (kept := folders.keep_pieces(draft)):
                log.info("  %s: %s finished pieces of a run that was stopped are reused", self.label, f"{kept:,}")
            result = self.work(draft)
            self.context.check_stopped()
            record = StepRecord(
                step=self.folder,
                format=self.format_version,
                identity=self.fingerprint_of(draft, inputs),
                settings=self.declared_settings(),
                inputs=inputs,
                counts=result.counts,
                started=started,
                seconds=round(time.monotonic() - start, 3),
                version=_version(),
                images=result.images,
                bytes=folders.folder_bytes(draft),
                worked=result.images if result.images_processed is None else result.images_processed,
                volume=result.bytes_processed,
            )
            write_record(draft, record)
        return record, result.summary

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock DATA_DIR while the step runs, unless the run has locked it already.

        With Luigi's own command, each step takes the lock. With `--workers 2`, this command also forks a process for
        each step. The forked process cannot exit while processes of the executor are running. So this function ends the
        executor's processes after the step.
        """
        if self.context.holds_lock:
            yield
            return
        with lock.hold(self.path.parent), contextlib.closing(self.context.executor):
            folders.recover(self.path.parent, [self.folder])
            yield

    def progress(
        self, items: Iterable[progress.Item], total: int, unit: str, **options: Any
    ) -> Iterator[progress.Item]:
        """Yield `items` and show the step's progress, in the log and with `report`."""
        shown = {"report": self.report, "note": self.context.executor.describe, **options}
        return progress.progress(items, self.label, total, unit, **shown)

    def report(self, percent: int, text: str) -> None:
        """Give the step's progress to the command `health` and to the page of a Luigi scheduler."""
        self.context.tell(self.folder, text)
        for name, value in (("set_progress_percentage", percent), ("set_status_message", text)):
            if tell := getattr(self, name, None):  # the method exists only while Luigi's worker runs the task
                tell(value)

    def on_failure(self, exception: BaseException) -> str:
        """Store the exception in the run's result, because Luigi would only log it."""
        self.context.result.failure, self.context.result.failed_step = exception, self.folder
        return super().on_failure(exception)
