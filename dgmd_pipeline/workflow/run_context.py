"""What the steps of one run share: settings, processes, what is forced, and what has happened so far."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from luigi.task_register import Register

from dgmd_pipeline.workflow.executors import ProcessExecutor
from dgmd_pipeline.workflow.step_record import Json, StepRecord

Shared = TypeVar("Shared")


class Values(Protocol):
    """What a step needs of the settings object."""

    @property
    def data_dir(self) -> Path:
        """The folder of the step folders."""

    def public(self, names: Iterable[str] | None = None) -> Json:
        """Return settings as JSON values without secrets."""


@dataclass
class RunResult:
    """What has happened in a run so far."""

    fingerprints: dict[str, str] = field(default_factory=dict)  # of each step folder that is known to be up to date
    records: list[StepRecord] = field(default_factory=list)  # of the steps that worked in this run, in their order
    summaries: dict[str, str] = field(default_factory=dict)  # step -> what its work came to, for people
    failure: BaseException | None = None
    failed_step: str | None = None


@dataclass(frozen=True, eq=False)
class RunContext:
    """One run."""

    settings: Values
    executor: ProcessExecutor = field(default_factory=ProcessExecutor)
    check_stopped: Callable[[], None] = lambda: None  # raises when the run has been asked to stop
    forced: Mapping[str, str] = field(default_factory=dict)  # step folder -> why it is done again in any case
    name: str = "run"  # on the page of a Luigi scheduler
    holds_lock: bool = True  # whoever made the context holds DATA_DIR; else each step takes the lock while it works
    result: RunResult = field(default_factory=RunResult)
    _shared: dict[type, Any] = field(default_factory=dict)

    def shared(self, kind: type[Shared]) -> Shared:
        """Return the one object of a class that this run has; the first call makes it."""
        return self._shared.setdefault(kind, kind())


def _no_context() -> RunContext:
    raise RuntimeError("no run context: use `activate`, or import dgmd_pipeline.tasks, which provides one")


_active: RunContext | None = None
_default: Callable[[], RunContext] = _no_context


def current() -> RunContext:
    """Return the context of this process's run; one from the environment where the run is Luigi's own command."""
    global _active  # noqa: PLW0603 - Luigi makes tasks from their parameters alone; there is one run in a process
    if _active is None:
        _active = _default()
    return _active


def provide_default(make: Callable[[], RunContext]) -> None:
    """Register what makes the context of a run that was started by Luigi's own command."""
    global _default  # noqa: PLW0603
    _default = make


@contextlib.contextmanager
def activate(context: RunContext) -> Iterator[RunContext]:
    """Make a context the current one inside the block."""
    global _active  # noqa: PLW0603
    before, _active = _active, context
    Register.clear_instance_cache()  # Luigi returns the same task object for the same parameters, in every run
    try:
        yield context
    finally:
        _active = before
        Register.clear_instance_cache()
