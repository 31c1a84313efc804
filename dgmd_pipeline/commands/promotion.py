"""The commands `promote` and `rollback`."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmd_pipeline import settings
from dgmd_pipeline.commands import notify, output, status, versions
from dgmd_pipeline.errors import ChangedFile, PipelineError, Refused, SettingsError
from dgmd_pipeline.evaluation import gates
from dgmd_pipeline.evaluation.summary import BETTER, NO_DIFFERENCE
from dgmd_pipeline.formatting import percent, utc_now
from dgmd_pipeline.registry import promotion
from dgmd_pipeline.registry import versions as registry_versions
from dgmd_pipeline.registry.store import Store
from dgmd_pipeline.registry.versions import ModelState, ModelVersion
from dgmd_pipeline.tasks import lookup, names

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.comparison import Comparison
    from dgmd_pipeline.evaluation.review import CandidateModel, Review
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def promote(values: "Settings", version: str, yes: bool, force: bool, reason: str, as_json: bool) -> None:
    """Show the review of a version, check that the version can be loaded, and make the version production.

    Raises Refused if a condition does not hold and `force` is not set.
    """
    if force and not reason:
        raise SettingsError('--force requires a reason: --reason "..."; the history records the reason.')
    store, state = versions.read_registry(values)
    candidate = versions.select_version(state, version)
    if candidate == state.production:
        output.print_result(
            f"{state.name} version {candidate.version} is production already.",
            as_json, version=candidate.version, promoted=False,
        )  # fmt: skip
        return
    _warn_of_ignored_stages(state)
    known, decision = _decide(values, store, state, candidate)
    previous = state.production.version if state.production else None
    shown = {"verdict": decision.verdict, "gates": [gate._asdict() for gate in decision.gates]}
    if not as_json:
        output.print_review(state.name, candidate, previous, known, decision)
        if known.best is None and (best := promotion.best_former(state, candidate)):
            print(
                f"Version {best.version}, which was production before, had an accuracy of "
                f"{percent(promotion.accuracy(best) or 0)} on the images of its own run. It was not compared with "
                f"version {candidate.version}."
            )
    failed = ", ".join(decision.failed)
    if failed and not force:
        if as_json:
            output.print_json({"version": candidate.version, "promoted": False, **shown})
        raise Refused(f'Version {candidate.version} is not promoted. To promote it anyway: --force --reason "...".')
    output.confirm(_question(candidate, previous, decision), yes)
    event = promotion.set_production(
        store, state, candidate.version,
        action="promote", user=settings.operator(), reason=reason, gates=decision.gates, forced=bool(failed),
    )  # fmt: skip
    text = (
        f"{state.name} version {candidate.version} is production"
        + (f" instead of version {previous}. `rollback` restores version {previous}." if previous else ".")
        + (f" Overridden: {failed}." if failed else "")
    )
    _tell(values, status.PROMOTED, candidate, text, known.comparison, decision.verdict)
    output.print_result(
        text,
        as_json,
        version=candidate.version,
        promoted=True,
        event=event.as_json(),
        overridden=decision.failed,
        **shown,
    )


def promote_if_better(values: "Settings", version: int) -> str:
    """Make a version production if it is better than production and meets all conditions; return a sentence.

    This function never promotes the first version. It never promotes a version that was production before, because an
    operator may have rolled that version back.
    """
    store, state = versions.read_registry(values)
    candidate = versions.select_version(state, str(version))
    refused, now = f"Version {version} is not promoted:", state.production
    if now is None:
        return f"{refused} an operator promotes the first version."
    if candidate == now or any(event.done and event.version == version for event in promotion.history(state)):
        return f"{refused} an operator decides on a version that was production before."
    _, decision = _decide(values, store, state, candidate)
    if decision.verdict != BETTER or decision.failed:
        return f"{refused} {decision.finding}. {decision.reason}"
    promotion.set_production(
        store, state, version,
        action="promote", user=settings.operator(), reason=decision.finding, gates=decision.gates, automatic=True,
    )  # fmt: skip
    return f"Version {version} is production now: {decision.finding}. `rollback` restores version {now.version}."


def _decide(
    values: "Settings", store: Store, state: ModelState, candidate: ModelVersion
) -> "tuple[Review, gates.Decision]":
    """Check that a version can be loaded; return its review and the decision."""
    with output.temporary_folder() as folder:
        model = _load_and_check(store, state.name, candidate, folder)
        known = _reviewed(values, store, candidate, model, state, folder)
        if state.production:
            known = _with_labels(known, store, model, state.production, folder / "production")
    return known, gates.decide(known, lookup.promotion_limits(values))


def _with_labels(known: "Review", store: Store, model: "CandidateModel", now: ModelVersion, folder: Path) -> "Review":
    """Add to a review how the labels of the version and of production differ. Runs do not record this difference."""
    from dgmd_pipeline.evaluation import review

    try:
        before = registry_versions.trained_labels(store, now, folder)
    except PipelineError as error:
        return known._replace(label_changes_error=f"The labels of version {now.version} are unknown: {error}")
    if before is None:
        return known._replace(
            label_changes_error=f"Version {now.version} has no list of its training images and labels."
        )
    return known._replace(label_changes=review.label_changes(model, before))


def _question(candidate: ModelVersion, previous: int | None, decision: gates.Decision) -> str:
    question = f"Make version {candidate.version} production"
    if previous is None:
        return f"{question}?"
    despite = ", although there is no significant difference" if decision.verdict == NO_DIFFERENCE else ""
    return f"{question} instead of version {previous}{despite}?"


def rollback(values: "Settings", yes: bool, reason: str, as_json: bool) -> None:
    """Restore the previous production version. Raises Refused if there is none."""
    store, state = versions.read_registry(values)
    current = state.production.version if state.production else None
    registered = {version.version: version for version in state.versions}
    previous = promotion.previous_versions(promotion.history(state), current)
    for number in previous:
        if number not in registered:
            log.warning("version %d was production before, but is no longer in the registry", number)
    previous = [number for number in previous if number in registered and number != current]
    if current is None or not previous:
        raise Refused(
            f"{state.name} has no previous production version"
            + (f"; version {current} was the first." if current else ": no version is production.")
        )
    restored = registered[previous[-1]]
    with output.temporary_folder() as folder:
        try:
            _load_and_check(store, state.name, restored, folder)
        except registry_versions.ForeignVersion as error:  # the version was production, so it is restored unchecked
            log.warning("%s Rolling back without checking that it can be loaded.", error)
    output.confirm(f"Roll back from version {current} to version {restored.version}?", yes)
    event = promotion.set_production(
        store, state, restored.version, action="rollback", user=settings.operator(), reason=reason
    )
    text = f"{state.name} version {restored.version} is production again, instead of version {current}."
    _tell(values, status.ROLLED_BACK, restored, text)
    output.print_result(
        text, as_json, version=restored.version, event=event.as_json(),
    )  # fmt: skip


def _tell(
    values: "Settings",
    what: str,
    version: ModelVersion,
    text: str,
    compared: "Comparison | None" = None,
    verdict: str | None = None,
) -> None:
    """Send a promotion or a rollback to NOTIFY_URL."""
    measured = {name: getattr(compared, name) for name in ("difference", "low", "high")} if compared else {}
    known: dict[str, Any] = {"version": version.version, "accuracy": promotion.accuracy(version), "verdict": verdict}
    notify.tell(values, status.Status(what, 0, text, utc_now(), 0.0, values.model_name, **known, **measured))


def _warn_of_ignored_stages(state: ModelState) -> None:
    if state.production is not None:
        return
    for version in state.versions:
        if version.stage == promotion.STAGE:
            log.warning(
                "version %d has the stage %s but not the alias of production. No version is compared with it, and a "
                "promotion archives it. docs/moving.md shows how to set the alias.",
                version.version, version.stage,
            )  # fmt: skip


def _load_and_check(store: Store, name: str, version: ModelVersion, folder: Path) -> "CandidateModel":
    """Fetch a version and check that it predicts. Raises PipelineError if it is damaged."""
    import numpy as np

    from dgmd_pipeline.training import runtime

    log.info("Loading version %d from the registry ...", version.version)
    model = lookup.candidate_model(store, name, version, folder / str(version.version))
    runtime.start_tensorflow()
    network = versions.load_network(model.path, version)
    shape = network.predict_on_batch(np.zeros((1, 64, 64, 3), np.uint8)).shape
    if shape != (1, len(model.labels)):
        raise PipelineError(
            f"{name} version {version.version} is damaged: it predicts probabilities of shape {shape}, and "
            f"{len(model.labels)} labels are stored with it. Train a new version."
        )
    return model


def _reviewed(
    values: "Settings",
    store: Store,
    entry: ModelVersion,
    candidate: "CandidateModel",
    state: ModelState,
    folder: Path,
) -> "Review":
    """If a version's run recorded a complete review, return this review, otherwise a new one.

    A review is complete if it has the serving benchmark and, if there is a production version, the comparison with this
    production version. A new review needs the validation images in DATA_DIR. Without these images, the incomplete
    review is returned. If the run lacks a file of its review, the returned review contains only an error.
    """
    from dgmd_pipeline.evaluation import review, serving_benchmark

    name, now = names.EVALUATION, state.production
    for file in (review.COMPARISON, review.SERVING_BENCHMARK):
        if registry_versions.artifact(store, entry, f"{name}/{file}", folder) is None:
            return review.Review(None, "", None, f"The run of version {entry.version} has no {name}/{file}.")
    recorded = _recorded_review(values, entry, now, folder / name)
    complete = recorded.serving_benchmark and not recorded.comparison_error
    images = None if complete else lookup.validation_images(values)
    if images is None:
        return recorded
    log.info(
        "%s ...",
        f"Comparing with version {now.version} (production)" if now else "Benchmarking the model in a clean process",
    )
    try:
        rivals = lookup.rivals(store, state, now, folder, entry) if now else review.Rivals()
        with serving_benchmark.start_process(settings.serving_environment()) as process:
            found = review.review(candidate, rivals, images, folder, process)
    except PipelineError as error:  # for example if an older pipeline registered the production version
        # With this error, a condition fails. The operator can still promote the version with --force.
        return recorded._replace(comparison_error=str(error))
    if found.serving_benchmark and recorded.serving_benchmark:
        # Keep these two recorded values, because only the run could compare the saved model with the trained network in
        # memory.
        benchmark = replace(
            found.serving_benchmark,
            predictions_equal=recorded.serving_benchmark.predictions_equal,
            largest_difference=recorded.serving_benchmark.largest_difference,
        )
        found = found._replace(serving_benchmark=benchmark)
    return found


def _recorded_review(values: "Settings", entry: ModelVersion, now: ModelVersion | None, folder: Path) -> "Review":
    """Return the review in `folder`. Keep the comparison only if it was made with `now`, the production version."""
    from dgmd_pipeline.evaluation import review

    try:
        recorded = review.read(folder)
    except ChangedFile as damage:
        raise damage.of_version(entry.version) from damage
    compared_with = recorded.comparison.run if recorded.comparison else None
    if now is not None and compared_with == now.run_id:
        return recorded
    error = ""
    if now:
        earlier = f"version {recorded.comparison.version}" if recorded.comparison else "no version"
        error = (
            f"Version {entry.version} was compared with {earlier}, but production is version {now.version}. It cannot "
            f"be compared with production, because there are no validation records in {values.data_dir}."
        )
    benchmark = recorded.serving_benchmark and replace(recorded.serving_benchmark, production=None)
    return review.Review(None, error, benchmark, recorded.benchmark_error)
