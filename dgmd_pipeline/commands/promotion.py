"""The commands `promote` and `rollback`."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgmd_pipeline import settings
from dgmd_pipeline.commands import models as commands_models
from dgmd_pipeline.commands import output
from dgmd_pipeline.errors import PipelineError, Refused, SettingsError
from dgmd_pipeline.evaluation import gates as evaluation_gates
from dgmd_pipeline.registry import promotion, store, versions
from dgmd_pipeline.tasks import names, outputs

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.review import CandidateModel, Review
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def promote(values: "Settings", version: str, yes: bool, force: bool, reason: str, as_json: bool) -> None:
    """Show what is known of a version, see that it can be loaded, and make it production.

    Raises Refused where a condition does not hold and `force` is not given.
    """
    if force and not reason:
        raise SettingsError('--force wants to know why: --reason "..."; it is kept in the history.')
    store, found = commands_models.registered_versions(values)
    entry = commands_models.select_version(found, version, values.model_name)
    now = promotion.current(store, values.model_name)
    if entry.version == now:
        output.print_result(
            f"{values.model_name} version {now} is production already.", as_json, version=now, promoted=False
        )
        return
    for each in found:
        if now is None and each.stage == promotion.STAGE:
            log.warning(
                "version %d has the stage %s and not the alias: it counts for nothing and is archived by a promotion; "
                "docs/moving.md has the lines that make it count",
                each.version, each.stage,
            )  # fmt: skip
    with output.temporary_folder() as folder:
        candidate = _load_and_check(store, values.model_name, entry, folder)
        former = next((each for each in found if each.version == now), None)
        known = _reviewed(values, store, entry, candidate, former, folder)
    limits = evaluation_gates.Limits(values.max_class_drop, values.max_latency_ratio)
    gates = evaluation_gates.check_gates(known, limits)
    if not as_json:
        output.print_review(values.model_name, entry, now, known, gates)
    closed = [gate for gate in gates if gate.passed is False]
    if closed and not force:
        if as_json:
            output.print_json(
                {"version": entry.version, "promoted": False, "gates": [gate._asdict() for gate in gates]}
            )
        raise Refused(
            f"Version {entry.version} is not promoted. {' '.join(gate.text for gate in closed)} "
            'If it shall be production all the same: --force --reason "...".'
        )
    output.confirm(f"Make version {entry.version} production{f' instead of {now}' if now else ''}?", yes)
    event = promotion.set_production(
        store, values.model_name, entry.version, now,
        action="promote", who=settings.operator(), why=reason, gates=gates, forced=bool(closed),
    )  # fmt: skip
    output.print_result(
        f"{values.model_name} version {entry.version} is production"
        + (f"; version {now} was. `rollback` goes back to it." if now else "."),
        as_json, version=entry.version, promoted=True, event=event._asdict(), gates=[gate._asdict() for gate in gates],
    )  # fmt: skip


def rollback(values: "Settings", yes: bool, reason: str, as_json: bool) -> None:
    """Make the version production that was it before, by the history. Raises Refused where there is none."""
    store, found = commands_models.registered_versions(values)
    now = promotion.current(store, values.model_name)
    earlier = promotion.previous_versions(promotion.history(store, values.model_name), now)
    there = {entry.version: entry for entry in found}
    for version in [version for version in earlier if version not in there]:
        log.warning("version %d was production, too, but is not in the registry any more", version)
    earlier = [version for version in earlier if version in there and version != now]
    if now is None or not earlier:
        raise Refused(
            f"{values.model_name} has no earlier production version to go back to"
            + (f"; version {now} was the first." if now else ": nothing is production.")
        )
    version = earlier[-1]
    with output.temporary_folder() as folder:
        try:
            _load_and_check(store, values.model_name, there[version], folder)
        except versions.Foreign as error:  # it was production all the same
            log.warning("%s Whether it can be loaded is not tried.", error)
    output.confirm(f"Go back from version {now} to version {version}?", yes)
    event = promotion.set_production(
        store, values.model_name, version, now, action="rollback", who=settings.operator(), why=reason
    )
    output.print_result(
        f"{values.model_name} version {version} is production again; version {now} was.",
        as_json, version=version, event=event._asdict(),
    )  # fmt: skip


def _load_and_check(store: store.Store, name: str, entry: versions.Entry, folder: Path) -> "CandidateModel":
    """Fetch a version and see that it can be used."""
    import numpy as np

    from dgmd_pipeline.training import runtime

    log.info("Loading version %d from the registry ...", entry.version)
    contender = outputs.candidate_model(store, name, entry, folder / str(entry.version))
    runtime.start_tensorflow()
    network = output.load_network(contender.path, name, entry)
    found = network.predict_on_batch(np.zeros((1, 64, 64, 3), np.uint8)).shape
    if found != (1, len(contender.labels)):
        raise PipelineError(
            f"{name} version {entry.version} gives probabilities of shape {found} where {len(contender.labels)} labels "
            "are stored with it: it is damaged. Train a new one."
        )
    return contender


def _reviewed(
    values: "Settings",
    store: store.Store,
    entry: versions.Entry,
    candidate: "CandidateModel",
    now: versions.Entry | None,
    folder: Path,
) -> "Review":
    """Return a version's review: that of its run, or a new one if production has changed or a part is missing."""
    from dgmd_pipeline.evaluation import review

    name = names.EVALUATION
    for file in (review.COMPARISON, review.SERVING_BENCHMARK):
        if versions.artifact(store, entry, f"{name}/{file}", folder) is None:
            return review.Review(None, "", None, f"The run of version {entry.version} has no {name}/{file}.")
    recorded = _recorded_review(values, entry, now, folder / name)
    complete = recorded.serving_benchmark and not recorded.comparison_error
    images = None if complete else outputs.validation_images(values)
    if images is None:
        return recorded
    log.info(
        "%s ...",
        f"Production is version {now.version}: comparing" if now else "Benchmarking the model in a clean process",
    )
    try:
        production = outputs.candidate_model(store, values.model_name, now, folder / str(now.version)) if now else None
        found = review.review(candidate, production, images, folder, settings.serving_environment())
    except PipelineError as error:  # for example, an older pipeline made production; --force replaces it
        return recorded._replace(comparison_error=str(error))
    if found.serving_benchmark and recorded.serving_benchmark:  # its run compared it with the trained network itself
        benchmark = replace(
            found.serving_benchmark,
            predictions_equal=recorded.serving_benchmark.predictions_equal,
            largest_difference=recorded.serving_benchmark.largest_difference,
        )
        found = found._replace(serving_benchmark=benchmark)
    return found


def _recorded_review(values: "Settings", entry: versions.Entry, now: versions.Entry | None, folder: Path) -> "Review":
    """Return the review in `folder`, without the comparison if that is not with today's production."""
    from dgmd_pipeline.evaluation import review

    recorded = review.read(folder)
    compared_with = recorded.comparison.run if recorded.comparison else None
    if now is not None and compared_with == now.run_id:
        return recorded
    error = ""
    if now:
        earlier = f"version {recorded.comparison.version}" if recorded.comparison else "no version"
        error = (
            f"Version {entry.version} was compared with {earlier}, production is version {now.version}, and there are "
            f"no validation records in {values.data_dir} to compare them on."
        )
    benchmark = recorded.serving_benchmark and replace(recorded.serving_benchmark, production=None)
    return review.Review(None, error, benchmark, recorded.benchmark_error)
