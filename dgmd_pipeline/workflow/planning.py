"""The plan of a run: which steps will run, and why."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from dgmd_pipeline.errors import SettingsError
from dgmd_pipeline.workflow import folders, success_file
from dgmd_pipeline.workflow.success_file import Json, Reason

if TYPE_CHECKING:
    from dgmd_pipeline.workflow.step import Step


@dataclass(frozen=True)
class StepPlan:
    """What a run will do with a step, and why."""

    step: str  # name of its folder
    state: Literal["done", "run", "maybe"]  # "maybe": the step runs only if an upstream step changes
    reasons: Sequence[Reason]
    fingerprint: str | None  # fingerprint of the folder after the run; None if only the run reveals it
    # `images` is the number of images in the present folder, and `bytes` is the total size of its files. If the folder
    # is missing or unreadable, `images` is the number of images in the step's input. If the reason is "upstream", both
    # numbers describe the folder that the step will write.
    images: int | None = None
    bytes: int | None = None
    counts: Json = field(default_factory=dict)
    waits_for: Sequence[str] = ()  # for "maybe": steps that will run, and whose results decide whether this step runs
    reuse: str = ""  # what the step will reuse, for example "12 new, 1,588 reused"; "" if unknown

    @property
    def reason(self) -> str:
        """The reasons as text."""
        return ", ".join(map(str, self.reasons))

    @property
    def explanation(self) -> str:
        """The reasons, and what the step will reuse, as text."""
        return "; ".join(filter(None, (self.reason, self.reuse)))

    def as_json(self) -> Json:
        """Return what `plan --json` prints."""
        return {
            "step": self.step,
            "state": self.state,
            "reason": self.reason,
            "identity": self.fingerprint,
            "images": self.images,
            "bytes": self.bytes,
            "counts": self.counts,
            "hangs_on": list(self.waits_for),
            "reuse": self.reuse,
        }


def upstream_steps(*last: "Step") -> list["Step"]:
    """Return all steps that `last` depends on, and `last` itself, in the order in which they run."""
    steps: dict[str, Step] = {}

    def visit(step: "Step") -> None:
        if step.folder not in steps:
            for task in step.deps():
                visit(task)
            steps[step.folder] = step

    for step in last:
        visit(step)
    return list(steps.values())


def select_steps(steps: Iterable["Step"], word: str) -> list["Step"]:
    """Return the steps with this verb or folder name.

    If no step has that verb or name, raises a SettingsError that lists all steps.
    """
    steps = list(steps)
    found = [step for step in steps if word in (step.verb, step.folder)]
    if not found:
        known: dict[str, list[str]] = {}
        for step in steps:
            known.setdefault(step.verb, []).append(step.folder)
        names = ", ".join(f"{verb} ({', '.join(each)})" for verb, each in known.items())
        raise SettingsError(f"{word!r} is not a step of this run. Its steps, with their folders: {names}.")
    return found


def plan(*last: "Step", with_reuse: bool = False) -> list[StepPlan]:
    """Return the plans of all steps up to `last`, in the order in which the steps run.

    With `with_reuse`, a plan also says what the step will reuse from its folder. This takes longer.
    The fingerprints of folders that are up to date are added to the run's result. These folders are not examined again.
    """
    plans: dict[str, StepPlan] = {}
    for step in upstream_steps(*last):
        upstream = [plans[task.folder] for task in step.deps()]
        found = _step_plan(step, upstream, list(plans))
        reuse = step.expected_reuse(upstream) if with_reuse and found.state != "done" else ""
        stopped = step.stopped_work(upstream) if found.state == "run" else ""
        found = replace(found, reuse="; ".join(filter(None, (reuse, stopped))))
        plans[step.folder] = found
        step.context.result.planned.add(step.folder)
        if found.state == "done" and found.fingerprint:
            step.context.result.fingerprints[step.folder] = found.fingerprint
    return list(plans.values())


def _without_outdated_numbers(plan: StepPlan) -> StepPlan:
    """Return the plan. If the run will replace the folder, leave out the numbers that describe the old folder."""
    # The plan of a step with the reason "upstream" has the number of images in the new folder.
    is_current = plan.state != "run" or any(reason.kind == "upstream" for reason in plan.reasons)
    return plan if is_current else replace(plan, images=None, counts={})


def _step_plan(step: "Step", upstream: list[StepPlan], planned: Sequence[str]) -> StepPlan:
    """Return the plan of a step, based on the plans of its inputs. `planned` has the names of all earlier steps."""
    name, path = step.folder, folders.current_path(step.path)
    record = success_file.read_record(path)
    known = step.context.result.fingerprints.get(name)
    if known:
        images, size = (record.images, record.bytes) if record else (None, None)
        return StepPlan(name, "done", (), known, images, size)
    inputs = {each.step: each.fingerprint for each in upstream if each.fingerprint} | step.extra_inputs()
    unknown = [each.step for each in upstream if not each.fingerprint]
    expected = None if unknown else step.expected_fingerprint(inputs)
    images = step.input_images([_without_outdated_numbers(each) for each in upstream])
    if not path.exists():
        return StepPlan(name, "run", [Reason("missing")], expected, images)
    if record is None:
        if step.accepts_external_data:
            step.check_upstream(None)
            found = success_file.walk(path)
            return StepPlan(name, "done", [Reason("external")], found.fingerprint, found.files, found.bytes)
        return StepPlan(name, "run", [Reason("unreadable")], expected, images)
    images = step.input_images(upstream) if record.images is None else record.images
    reasons = step.outdated(record, inputs | {each: record.inputs.get(each, "new") for each in unknown})
    if reasons:
        return StepPlan(name, "run", reasons, expected, images, record.bytes, record.counts)
    if change := step.check_upstream(record):
        reason = Reason("upstream", change.reason)
        return StepPlan(name, "run", [reason], change.fingerprint, change.images, change.bytes, record.counts)
    undecided = {other for each in upstream if each.state != "done" for other in each.waits_for or [each.step]}
    waits_for = [each for each in planned if each in undecided]
    reasons = [Reason("waiting", " or ".join(waits_for))] if waits_for else []
    fingerprint = None if unknown else record.identity
    state: Literal["maybe", "done"] = "maybe" if waits_for else "done"
    return StepPlan(name, state, reasons, fingerprint, images, record.bytes, record.counts, waits_for)
