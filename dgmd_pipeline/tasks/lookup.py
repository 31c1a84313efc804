"""Functions with which commands read step folders and the registry."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.tasks import names
from dgmd_pipeline.workflow.run_context import RunResult
from dgmd_pipeline.workflow.success_file import Json, StepRecord, read_record

if TYPE_CHECKING:
    from dgmd_pipeline.evaluation.gates import Limits
    from dgmd_pipeline.evaluation.review import CandidateModel, Rivals, ValidationImages
    from dgmd_pipeline.evaluation.versions_so_far import VersionSummary
    from dgmd_pipeline.registry.store import Store
    from dgmd_pipeline.registry.versions import ModelState, ModelVersion
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)
REPORT = "report.html"  # file name in the folder of an evaluation
OF_DATA = "system/data/"  # prefix of the names of metrics that count images and labels
DATA_METRICS = ("images_training", "labels", "images_rejected")


def registered(data_dir: Path, result: RunResult) -> Json:
    """Return what `status.json` says about the registered version; {} if no version is registered."""
    version, measured = (read_record(data_dir / name) for name in (names.REGISTERED_MODEL, names.EVALUATION))
    if names.REGISTERED_MODEL not in result.fingerprints or not version or not measured:
        return {}
    known = version.counts | measured.counts
    shown = ("version", "accuracy", "difference", "low", "high", "verdict")
    return {name: known.get(name) for name in shown} | {"report": str(data_dir / names.EVALUATION / REPORT)}


def summary(data_dir: Path, version: int | None) -> list[str]:
    """Return sentences about the evaluation in a DATA_DIR. With a `version`, also name the command that promotes it."""
    from dgmd_pipeline.evaluation import summary

    measured = read_record(data_dir / names.EVALUATION)
    if measured is None:
        return []
    found = summary.from_counts(measured.counts)
    return summary.sentences(found, str(data_dir / names.EVALUATION / REPORT), version)


def store(settings: "Settings") -> "Store | None":
    """Return the MLflow store that is set, or else the embedded store; None if the embedded store does not exist yet.

    The schema of an SQLite database is upgraded if necessary. The check of the schema takes a second, because it
    imports MLflow.
    """
    from dgmd_pipeline.registry import store as registry_store

    folder = settings.data_dir / names.STORE
    if settings.mlflow_tracking_uri:
        found = registry_store.at(settings.mlflow_tracking_uri)
    elif folder.exists():
        found = registry_store.embedded(folder)
    else:
        return None
    registry_store.upgrade(found)
    return found


def missing_version(settings: Any, record: StepRecord) -> str | None:
    """Return a text if the registry no longer has the version that `record` names, else None.

    `record` is the record of a registration.

    This function does not import MLflow.
    """
    from dgmd_pipeline.registry import database
    from dgmd_pipeline.registry.existence import Registered, exists
    from dgmd_pipeline.registry.preflight import needs_plugin, request_options
    from dgmd_pipeline.settings import mlflow_variables

    variables = mlflow_variables()
    uri = variables.get("MLFLOW_REGISTRY_URI") or settings.mlflow_tracking_uri
    uri = uri or database.uri_of((settings.data_dir / names.STORE / "mlflow.db").resolve())
    wanted = Registered(record.counts["name"], record.counts["version"], record.inputs.get(names.TRAINED_MODEL, ""))
    if needs_plugin(variables) or exists(uri, wanted, request_options(variables)) is not False:  # unknown, or it exists
        return None
    return f"{wanted.name} version {wanted.version} is no longer in the registry"


def missing_registration(settings: "Settings") -> str | None:
    """Return a sentence if the registry no longer has the version that is recorded in DATA_DIR, else None."""
    record = read_record(settings.data_dir / names.REGISTERED_MODEL)
    if record is None or record.settings != settings.public(record.settings):  # the next run registers a version anyway
        return None
    text = missing_version(settings, record)
    return f"{text}: the next run registers the training again." if text else None


def candidate_model(store: "Store", name: str, version: "ModelVersion", folder: Path) -> "CandidateModel":
    """Download a registered version into `folder` and return it as a model to compare."""
    from dgmd_pipeline.evaluation import review
    from dgmd_pipeline.registry import versions

    fetched = versions.fetch(store, name, version, folder)
    return review.CandidateModel(**fetched._asdict(), run=version.run_id)


def production(settings: "Settings", folder: Path) -> "Rivals":
    """Download the production version into `folder`.

    Also download the most accurate former production version, if it is more accurate than production.
    """
    from dgmd_pipeline.evaluation.review import Rivals
    from dgmd_pipeline.registry import versions

    place = store(settings)
    state = versions.read(place, settings.model_name) if place else None
    if place is None or state is None or state.production is None:
        return Rivals()
    log.info("  version %d is production: fetching it to compare ...", state.production.version)
    return rivals(place, state, state.production, folder)


def versions_so_far(settings: "Settings", training: str) -> "list[VersionSummary]":
    """Return what the report shows of the registered versions, the oldest first.

    Versions of the training with the id `training` are left out. The list is empty if the registry cannot be read.
    Failed requests are not repeated.
    """
    from dgmd_pipeline.evaluation.versions_so_far import SHOWN, VersionSummary
    from dgmd_pipeline.registry import once, versions
    from dgmd_pipeline.registry.store import ACCURACY, TRAINING_ID

    try:
        place = store(settings)
        if place is None:
            return []
        with once.without_repetition():
            state = versions.read(place, settings.model_name)
            metrics = versions.run_metrics(place, settings.mlflow_experiment_name or settings.model_name)
    except PipelineError as error:  # the comparison with production also reports this error
        log.debug("The report does not show the versions so far: %s", error)
        return []
    found = []
    for version in [one for one in state.versions if one.tags.get(TRAINING_ID) != training][:SHOWN]:
        accuracy, of_run = version.tags.get(ACCURACY), metrics.get(version.run_id, {})
        # An older pipeline logged these metrics without the prefix.
        counts = (of_run.get(OF_DATA + name, of_run.get(name)) for name in DATA_METRICS)
        known = float(accuracy) if accuracy else None
        found.append(VersionSummary(version.version, version.created, known, *counts))
    return found[::-1]


def rivals(
    store: "Store", state: "ModelState", now: "ModelVersion", folder: Path, candidate: "ModelVersion | None" = None
) -> "Rivals":
    """Download the production version `now` into `folder`.

    Also download the most accurate former production version, if it is more accurate than `now`. `candidate` is the
    version that will be compared with these versions; None if it is not registered yet.
    """
    from dgmd_pipeline.evaluation.review import Rivals
    from dgmd_pipeline.registry import promotion

    current = candidate_model(store, state.name, now, folder / str(now.version))
    best = promotion.best_former(state, candidate)
    if best is None:
        return Rivals(current)
    try:
        return Rivals(current, candidate_model(store, state.name, best, folder / str(best.version)))
    except PipelineError as error:  # for example, somebody has deleted its files
        log.warning("Version %d, which was production before, is not compared: %s", best.version, error)
        return Rivals(current)


def promotion_limits(settings: "Settings") -> "Limits":
    """Return the settings that limit how much worse than production a version may be."""
    from dgmd_pipeline.evaluation.gates import Limits

    return Limits(settings.max_class_drop, settings.max_latency_ratio, settings.allow_lost_labels)


def validation_images(settings: "Settings") -> "ValidationImages | None":
    """Return the validation images in DATA_DIR; None if there are none, or if their records are outdated."""
    from dgmd_pipeline.evaluation import review

    records = settings.data_dir / f"{names.TFRECORD}_validation"
    split = settings.data_dir / names.SPLIT
    made, cut = read_record(records), read_record(split)
    if made is None or cut is None or made.inputs.get(names.SPLIT) != cut.identity:
        return None  # the records belong to an earlier split: a run is active or was interrupted
    return review.validation_images(records, manifest.read(split / "validation.csv", manifest.Example))
