"""A trained model and the folders of a run -> the folder of its evaluation."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.data import decoding, shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import gates, label_suspects, leaks, metrics, plots, predictions, report, review
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import dataset, features, fine_tuning, train

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)
BENCHMARK_TAGS = (
    *("load_seconds", "latency_p50_ms", "latency_p95_ms", "images_per_second", "bytes", "peak_memory_bytes"),
    "parameters",
)  # of a version


class EvaluationData(NamedTuple):
    """What a model is evaluated with. Paths are folders of finished steps unless said otherwise."""

    model_name: str
    labels: Sequence[str]  # by class index
    trained_model: Path
    features: Sequence[Path] | None  # of training and validation; None where the backbone stores none
    records: Path  # of the validation split
    split: Path
    raw: Path
    rejected: Path  # file
    balanced: Mapping[str, Any]  # counts of the balancing
    source: str  # URI of the images
    settings: Mapping[str, Any]  # that the folders were made with, by variable
    seconds: Sequence[tuple[str, float]]  # of each step


def evaluate(
    data: EvaluationData,
    network: "keras.Model",
    production: Callable[[Path], review.CandidateModel | None],
    limits: gates.Limits,
    environment: Mapping[str, str],
    folder: Path,
) -> dict[str, Any]:
    """Measure a model, compare it with production, benchmark it, and write everything with a report into `folder`.

    `production` downloads the production version into a folder and returns it, or None where there is none; where it
    raises PipelineError, the comparison is missing. `environment` is that of a process that serves a model.
    Returns the counts for the record.
    """
    about, history = train.read(data.trained_model)
    splits = [list(manifest.read(data.split / f"{name}.csv", Example)) for name in ("training", "validation")]
    images = review.validation_images(data.records, splits[1], data.raw)
    probabilities, truth = _predict(data, network, bool(about.get("fine_tuned")))
    suspects = _label_suspects(data, splits, folder)
    leaked = _leaks(data, splits[0], images.examples, folder)
    positions = [leak.position for leak in leaked.leaks] if leaked else None
    keys = [row.path for row in images.examples]
    measured = metrics.evaluate(probabilities, truth, data.labels, keys, folder, positions)

    def thumbnails(rows: Sequence[Any]) -> Any:
        return decoding.thumbnails(data.raw, {row.position: row.key for row in rows}, report.CARD)

    content = report.Content(
        model_name=data.model_name,
        created=formatting.utc_now(),
        source=data.source,
        settings=data.settings,
        labels=data.labels,
        measured=measured,
        thumbnails=thumbnails(measured.mistakes),
        suspects=suspects,
        suspect_thumbnails=thumbnails(suspects.suspects[: label_suspects.SHOWN]) if suspects else {},
        leaks=leaked,
        leak_thumbnails=decoding.thumbnails(data.raw, report.pairs(leaked), report.CARD),
        history=history,
        head=about.get("head"),
        counts=_class_counts(data.balanced, splits),
        rejected=list(manifest.read(data.rejected, manifest.Rejected)),
        seconds=data.seconds,
        fine_tuning=fine_tuning.describe(about["fine_tuning"]) if "fine_tuning" in about else "",
    )
    trained_on = frozenset(row.sha256 for row in splits[0])
    candidate = review.CandidateModel(
        data.trained_model / train.MODEL, data.labels, trained_on, probabilities=probabilities
    )
    found = _review(candidate, production, images, environment, folder, partial(report.draw, folder, content))
    review.write(found, folder)
    report.write(folder, content, report.Outcome(gates.check_gates(*found, limits), *found))
    return measured.overall | ({"difference": found.comparison["difference"]} if found.comparison else {})


def _predict(data: EvaluationData, network: "keras.Model", fine_tuned: bool) -> Any:
    if data.features and not fine_tuned:  # else the stored features are those of another network
        vectors, truth = features.load(data.features[1])
        return predictions.predict_head(network, vectors), truth
    return predictions.predict(network, dataset.read(data.records))


def _label_suspects(
    data: EvaluationData, splits: Sequence[Sequence[Example]], folder: Path
) -> label_suspects.Found | None:
    """Judge the labels by the stored features; None where there are none."""
    if not data.features:
        return None
    rows = [row for split in splits for row in shards.record_order(split)]
    parts = [features.load(each)[0] for each in data.features]
    given, groups, keys = zip(*((row.class_index, row.group, row.path) for row in rows), strict=True)
    found = label_suspects.find(parts, given, groups, keys, data.labels)
    label_suspects.write(found, folder)
    return found


def _leaks(
    data: EvaluationData, training: Sequence[Example], validation: Sequence[Example], folder: Path
) -> leaks.Found | None:
    """Look for validation images with a near-duplicate in training; None where no features are stored."""
    if not data.features:
        return None
    splits = [shards.record_order(training), validation]
    vectors = [features.load(each)[0] for each in data.features]
    keys, labels = [[row.path for row in rows] for rows in splits], [[row.label for row in rows] for rows in splits]
    found = leaks.find(vectors[0], vectors[1], keys, labels)
    leaks.write(folder, found.leaks)
    if found.leaks:
        log.warning(
            "%s of %s validation images have a near-duplicate among the training images; see %s of the evaluation",
            f"{len(found.leaks):,}", f"{found.compared:,}", leaks.TABLE,
        )  # fmt: skip
    return found


def _class_counts(balanced: Mapping[str, Any], splits: Sequence[Sequence[Example]]) -> list[plots.ClassCounts]:
    """Return how many images each label has: found, kept, in each split."""
    before, after = balanced["before"], balanced["after"]
    counts = [Counter(row.label for row in rows) for rows in splits]
    return [
        plots.ClassCounts(label, before[label], after.get(label, 0), *(c[label] for c in counts)) for label in before
    ]


def _review(
    candidate: review.CandidateModel,
    production: Callable[[Path], review.CandidateModel | None],
    images: review.ValidationImages,
    environment: Mapping[str, str],
    folder: Path,
    meanwhile: Callable[[dict[str, Any] | None], None],
) -> review.Review:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        current, missing = None, ""
        try:
            current = production(Path(scratch))
        except PipelineError as error:
            missing = str(error)
        found = review.review(candidate, current, images, folder, environment, meanwhile)
    found = found._replace(missing=missing or found.missing)
    for problem in filter(None, (found.missing, found.untried)):
        log.warning("%s The model is registered all the same; `promote` will ask for what is missing.", problem)
    return found


def metrics_of(folder: Path) -> dict[str, float]:
    """Return the metrics of a finished evaluation, by their name in MLflow.

    Among them is how predictions for original files differ from those for their records, where that was measured.
    """
    benchmark = review.read(folder).assessment or {}
    served = {name: value for name, value in benchmark.items() if name.startswith("served_")}
    return {
        f"evaluation_{name}": value
        for name, value in {**manifest.read_json(folder / metrics.METRICS), **served}.items()
    }


def tags_of(folder: Path) -> dict[str, str]:
    """Return the tags of a version that an evaluation has found."""
    found = review.read(folder)
    accuracy = manifest.read_json(folder / metrics.METRICS)["accuracy"]
    tags = {"dgmd.validation_accuracy": f"{accuracy:.4f}"}
    if found.assessment:
        tags |= {f"dgmd.{name}": f"{found.assessment[name]:.6g}" for name in BENCHMARK_TAGS}
        tags["dgmd.predictions_equal"] = str(found.assessment["predictions_equal"])
    if found.comparison:
        tags["dgmd.difference"] = f"{found.comparison['difference']:.4f}"
        tags["dgmd.compared_with"] = str(found.comparison["version"])
    return tags
