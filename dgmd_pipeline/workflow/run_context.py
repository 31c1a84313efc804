"""The objects that all steps of a run share: settings, worker processes, forced steps, and results so far."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from luigi.task_register import Register

from dgmd_pipeline.workflow.executors import Executor, ProcessExecutor
from dgmd_pipeline.workflow.success_file import Json, StepRecord, digest

Shared = TypeVar("Shared")


class Values(Protocol):
    """The part of the settings object that steps need."""

    @property
    def data_dir(self) -> Path:
        """The folder that contains the step folders."""

    def public(self, names: Iterable[str] | None = None) -> Json:
        """Return all settings, or those in `names`, as JSON values without secrets."""


@dataclass
class RunResult:
    """What has happened in a run so far."""

    # Step folder -> its fingerprint, for each folder that is known to be up to date.
    fingerprints: dict[str, str] = field(default_factory=dict)
    planned: set[str] = field(default_factory=set)  # step folders that have been examined
    # Records of the steps that did work in this run, in the order in which the steps ran.
    records: list[StepRecord] = field(default_factory=list)
    summaries: dict[str, str] = field(default_factory=dict)  # step folder -> the result of the step in words
    failure: BaseException | None = None
    failed_step: str | None = None
    dashboard: str | None = None  # address of the cluster's page, if the run used a cluster
    usage: str = ""  # a line about the work of a cluster; "" if no cluster did any work


@dataclass(frozen=True, eq=False)
class RunContext:
    """One run."""

    settings: Values
    executor: Executor = field(default_factory=ProcessExecutor)
    check_stopped: Callable[[], None] = lambda: None  # raises when the run has been asked to stop
    tell: Callable[[str, str], None] = lambda _step, _progress: None  # says which step runs, and how far it is
    forced: Mapping[str, str] = field(default_factory=dict)  # step folder -> why the step runs even if it is up to date
    name: str = "run"  # name of the run on the page of a Luigi scheduler
    # Whether the creator of this context has locked DATA_DIR. Otherwise, each step locks DATA_DIR while the step works.
    holds_lock: bool = True
    result: RunResult = field(default_factory=RunResult)
    _shared: dict[type, Any] = field(default_factory=dict)

    @cached_property
    def deployment(self) -> str:
        """The name of the run and a hash of its settings."""
        return f"{self.name}-{digest(self.settings.public())[:8]}"

    def shared(self, kind: type[Shared]) -> Shared:
        """Return the object of class `kind`, which all steps of the run share. The first call creates the object."""
        if kind not in self._shared:
            self._shared[kind] = kind()
        return self._shared[kind]


def _no_context() -> RunContext:
    raise RuntimeError("no run context: use `activate`, or import dgmd_pipeline.tasks, which provides one")


_active: RunContext | None = None
_default: Callable[[], RunContext] = _no_context


def current() -> RunContext:
    """Return the context of the active run.

    If Luigi's own command started the run, the first call creates the context from the environment.
    """
    global _active  # noqa: PLW0603 - Luigi gives a task only its parameters; the task finds its run here
    if _active is None:
        _active = _default()
    return _active


def provide_default(make: Callable[[], RunContext]) -> None:
    """Register the function that creates the context of a run that Luigi's own command has started."""
    global _default  # noqa: PLW0603
    _default = make


@contextlib.contextmanager
def activate(context: RunContext) -> Iterator[RunContext]:
    """Within the block, `current` returns this context."""
    global _active  # noqa: PLW0603
    before, _active = _active, context
    Register.clear_instance_cache()  # otherwise, Luigi would return the task objects of an earlier run
    try:
        yield context
    finally:
        _active = before
        Register.clear_instance_cache()
