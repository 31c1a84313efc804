"""Records of finished folders -> what will run, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.workflow import folders, provenance
from dgmd_pipeline.workflow import step as workflow_step
from dgmd_pipeline.workflow.step import Step


@dataclass(frozen=True)
class StepPlan:
    """What will become of a step, and why."""

    step: str
    state: str  # "done", "run" or "maybe": only if what is before it changes
    reason: str
    identity: str | None  # the one it has or will have, where that is known beforehand
    images: int | None = None  # that are in it, or where it is missing in what it is made from
    bytes: int | None = None  # of its files as they are now
    counts: dict[str, Any] = field(default_factory=dict)
    hangs_on: list[str] = field(default_factory=list)  # the steps that run for certain and decide about a "maybe"


def upstream_steps(*last: Step) -> list[Step]:
    """Return all steps that lead to `last`, and itself, each after those that it needs."""
    steps: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.folder not in steps:
            for task in step.deps():
                visit(task)
            steps[step.folder] = step

    for step in last:
        visit(step)
    return list(steps.values())


def select_steps(steps: Iterable[Step], word: str) -> list[Step]:
    """Return the steps that people call `word`, by verb or folder. Raises SettingsError, naming those there are."""
    steps = list(steps)
    found = [step for step in steps if word in (step.verb, step.folder)]
    if not found:
        known: dict[str, list[str]] = {}
        for step in steps:
            known.setdefault(step.verb, []).append(step.folder)
        names = ", ".join(f"{verb} ({', '.join(each)})" for verb, each in known.items())
        raise SettingsError(f"{word!r} is no step of this run. Its steps, with their folders: {names}.")
    return found


def plan(*last: Step) -> list[StepPlan]:
    """Read the folders' records and say for every step up to `last` what will become of it, in running order."""
    job = last[0].job
    for step in upstream_steps(*last):
        job.outlooks[step.folder] = _step_plan(step, [job.outlooks[task.folder] for task in step.deps()])
    outlooks = list(job.outlooks.values())
    job.finished = {each.step: each.identity for each in outlooks if each.state == "done" and each.identity}
    return outlooks


def _step_plan(step: Step, before: list[StepPlan]) -> StepPlan:
    known = {outlook.step: outlook.identity for outlook in before if outlook.identity}
    inputs = known | step.others()
    unknown = [outlook.step for outlook in before if not outlook.identity]
    expected = None if unknown else step.expected(inputs)
    for forced in [outlook.step for outlook in before if outlook.step in step.job.forced]:
        step.job.forced.setdefault(step.folder, step.job.forced[forced])
    path = folders.current_path(step.path)
    if not path.exists():
        return StepPlan(step.folder, "run", "folder is missing", expected, step.given(before))
    record = provenance.read_record(path)
    if record is None:
        if step.data_is_welcome:
            step.news(None)
            found = provenance.walk(path)
            reason = "put there by hand: used as it is"
            return StepPlan(step.folder, "done", reason, found.identity, found.files, found.bytes)
        reason = f"no readable {provenance.SUCCESS}: made by hand or by an older version"
        return StepPlan(step.folder, "run", reason, expected, step.given(before))
    images = step.given(before) if record.images is None else record.images
    why = workflow_step.reasons(step, record, inputs | {name: record.inputs.get(name, "new") for name in unknown})
    if why:
        return StepPlan(step.folder, "run", ", ".join(why), expected, images, record.bytes, record.counts)
    news = step.news(record)
    if news:
        return StepPlan(step.folder, "run", *news, record.counts)
    pending = {
        name: None for outlook in before if outlook.state != "done" for name in outlook.hangs_on or [outlook.step]
    }
    state, reason = ("maybe", f"only if {' or '.join(pending)} changes") if pending else ("done", "")
    identity = None if unknown else record.identity
    return StepPlan(step.folder, state, reason, identity, images, record.bytes, record.counts, list(pending))
