"""Evaluates a trained model: runs the other modules of this package in order, and writes their files and the report."""

import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.data import decoding, shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import (
    gates,
    label_suspects,
    leaks,
    metrics,
    plots,
    predictions,
    report,
    review,
    serving_benchmark,
)
from dgmd_pipeline.evaluation.comparison import Comparison
from dgmd_pipeline.evaluation.label_suspects import LabelSuspects
from dgmd_pipeline.evaluation.leaks import Leaks
from dgmd_pipeline.evaluation.metrics import Measurements
from dgmd_pipeline.evaluation.predictions import Predictions
from dgmd_pipeline.evaluation.review import Answers, CandidateModel, Review, Rivals, StoredFeatures, ValidationImages
from dgmd_pipeline.evaluation.versions_so_far import VersionSummary
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import dataset, feature_store, fine_tuning, train
from dgmd_pipeline.training.vectors import Vectors

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)
MEASURED = "dgmd.measured"  # tag with all figures of a version; MLflow's pages show every tag, so this is a single tag
BENCHMARK_FIGURES = (
    *("load_seconds", "latency_p50_ms", "latency_p95_ms", "images_per_second", "bytes", "peak_memory_bytes"),
    *("parameters", "predictions_equal"),
)


class EvaluationData(NamedTuple):
    """What a model is evaluated with. Paths are folders of finished steps unless stated otherwise."""

    model_name: str
    labels: Sequence[str]  # by class index
    trained_model: Path
    features: Sequence[Path] | None  # folders for training and validation; None: the backbone stores no features
    records: Path  # of the validation split
    split: Path
    raw: Path
    rejected: Path  # file
    balanced: Mapping[str, Mapping[str, int]]  # "before" or "after" balancing -> label -> number of images
    source: str  # URI of the images
    settings: Mapping[str, object]  # environment variable -> setting of the steps
    seconds: Sequence[tuple[str, float]]  # name and duration of each step before the evaluation
    versions: Sequence[VersionSummary]  # registered versions, the oldest first


class _Splits(NamedTuple):
    """The rows of the splits, and the stored features of their images. Both are in the order of the records."""

    training: Sequence[Example]
    validation: Sequence[Example]
    features: list[Vectors]  # float32 [n, d] of training and of validation; empty: no features are stored

    @property
    def both(self) -> tuple[Sequence[Example], Sequence[Example]]:
        return self.training, self.validation


def evaluate(
    data: EvaluationData,
    network: "keras.Model",
    production: Callable[[Path], Rivals],
    limits: gates.Limits,
    process: serving_benchmark.Process,
    folder: Path,
) -> dict[str, Any]:
    """Measure a model, compare it with production, benchmark it, and write the results and a report into `folder`.

    `production` downloads the versions that the model is compared with. Its argument is the folder for these versions.
    If it raises PipelineError, there is no comparison. The model is benchmarked in `process`. Work that only the report
    needs is done while `process` loads the model. While `process` measures times, the calling process is idle.

    Returns the counts for the step's record.
    """
    start = time.monotonic()
    process.load(data.trained_model / train.MODEL)
    splits = _read_splits(data)
    leaked = _find_leaks(splits, folder)
    stored = _stored_features(data, network, splits)
    measured, answers = _measure(data, network, splits, stored, leaked, folder)
    candidate = CandidateModel(
        path=data.trained_model / train.MODEL,
        labels=data.labels,
        trained_on=frozenset(row.sha256 for row in splits.training),
        answers=answers,
        trained_labels=frozenset(row.label for row in splits.training),
    )
    images = review.ValidationImages(data.records, splits.validation, data.raw, stored)
    content = cache(partial(_content, data, splits, measured, leaked, folder))
    found = _review(candidate, production, images, process, folder, lambda compared: _draw(folder, content(), compared))
    review.write(found, folder)
    decision = gates.decide(found, limits)
    gates.write(decision, folder)
    own = ("evaluation", time.monotonic() - start)
    report.write(folder, content()._replace(seconds=[*data.seconds, own]), found, decision)
    return measured.overall | _decided(decision, found.comparison)


def _decided(decision: gates.Decision, compared: Comparison | None) -> dict[str, Any]:
    """Return the part of the counts that describes the decision. `summary.from_counts` reads it."""
    counts: dict[str, Any] = {"verdict": decision.verdict, "failed": decision.failed}
    if compared:
        counts |= {"compared_with": compared.version, "difference": compared.difference}
        counts |= {"low": compared.low, "high": compared.high}
    return counts


def _draw(folder: Path, content: report.Content, compared: Comparison | None) -> None:
    log.info("  drawing the plots ...")
    report.draw(folder, content, compared)


def _read_splits(data: EvaluationData) -> _Splits:
    training, validation = (
        shards.record_order(manifest.read(data.split / f"{name}.csv", Example)) for name in ("training", "validation")
    )
    return _Splits(training, validation, [feature_store.load(folder)[0] for folder in data.features or ()])


def _stored_features(data: EvaluationData, network: "keras.Model", splits: _Splits) -> StoredFeatures | None:
    """Return the stored features that fit the head of the network; None if there are none."""
    if not splits.features or train.read(data.trained_model)[0].get("fine_tuned"):
        return None  # after fine-tuning, stored features do not fit the network
    return StoredFeatures(splits.features[1], network.get_layer("backbone"))


def _measure(
    data: EvaluationData,
    network: "keras.Model",
    splits: _Splits,
    stored: StoredFeatures | None,
    leaked: Leaks | None,
    folder: Path,
) -> tuple[Measurements, Answers]:
    """Predict the validation images and write the metrics. The large array of probabilities is freed at the end."""
    log.info("  predicting %s validation images ...", f"{len(splits.validation):,}")
    if stored:
        blocks = predictions.predict_head(network, stored.vectors)
    else:
        blocks = predictions.predict(network, dataset.read(data.records))
    probabilities = predictions.gather(blocks, len(splits.validation), len(data.labels))
    truth = np.array([row.class_index for row in splits.validation], np.int64)
    predicted = Predictions(probabilities, truth, data.labels, [row.path for row in splits.validation])
    positions = [leak.position for leak in leaked.pairs] if leaked else None
    return metrics.evaluate(predicted, folder, positions), review.answers([probabilities])


def _find_label_suspects(labels: Sequence[str], splits: _Splits, folder: Path) -> LabelSuspects | None:
    """Find and write likely wrong labels of both splits; None if no features are stored."""
    if not splits.features:
        return None
    log.info("  looking for wrong labels among %s images ...", f"{sum(map(len, splits.both)):,}")
    found = label_suspects.find(
        splits.features,
        [row.class_index for row in chain(*splits.both)],
        [row.group for row in chain(*splits.both)],
        [row.path for row in chain(*splits.both)],
        labels,
    )
    label_suspects.write(found, folder)
    return found


def _find_leaks(splits: _Splits, folder: Path) -> Leaks | None:
    """Find and write validation images with a near-duplicate in training; None if no features are stored."""
    if not splits.features:
        return None
    training, validation = splits.features
    log.info("  looking for near-duplicates of validation images in training ...")
    keys = [[row.path for row in rows] for rows in splits.both]
    labels = [[row.label for row in rows] for rows in splits.both]
    found = leaks.find(training, validation, keys, labels)
    leaks.write(found, folder)
    if found.pairs:
        log.warning(
            "%s of %s validation images have a near-duplicate among the training images; see %s of the evaluation",
            f"{len(found.pairs):,}", f"{found.compared:,}", leaks.TABLE,
        )  # fmt: skip
    return found


def _content(
    data: EvaluationData, splits: _Splits, measured: Measurements, leaked: Leaks | None, folder: Path
) -> report.Content:
    """Collect the content of the report. This includes the search for wrong labels."""
    suspects = _find_label_suspects(data.labels, splits, folder)
    about, history = train.read(data.trained_model)
    shown = suspects.suspects[: label_suspects.SHOWN] if suspects else []
    return report.Content(
        model_name=data.model_name,
        created=formatting.utc_now(),
        source=data.source,
        settings=data.settings,
        labels=data.labels,
        measured=measured,
        thumbnails=_thumbnails(data.raw, measured.misclassifications),
        suspects=suspects,
        suspect_thumbnails=_thumbnails(data.raw, shown),
        leaks=leaked,
        leak_thumbnails=decoding.thumbnails(data.raw, report.leak_keys(leaked), report.CARD),
        history=history,
        head=about.get("head"),
        counts=_class_counts(data.balanced, splits),
        rejected=list(manifest.read(data.rejected, manifest.Rejected)),
        seconds=data.seconds,
        versions=data.versions,
        fine_tuning=fine_tuning.describe(about["fine_tuning"]) if "fine_tuning" in about else "",
    )


def _thumbnails(raw: Path, rows: Iterable[metrics.Misclassification]) -> dict[int, np.ndarray]:
    return decoding.thumbnails(raw, {row.position: row.key for row in rows}, report.CARD)


def _class_counts(balanced: Mapping[str, Mapping[str, int]], splits: _Splits) -> list[plots.ClassCounts]:
    """Return how many images each label has before balancing, after balancing, and in each split."""
    before, after = balanced["before"], balanced["after"]
    training, validation = (Counter(row.label for row in rows) for rows in splits.both)
    return [
        plots.ClassCounts(label, before[label], after.get(label, 0), training[label], validation[label])
        for label in before
    ]


def _review(
    candidate: CandidateModel,
    production: Callable[[Path], Rivals],
    images: ValidationImages,
    process: serving_benchmark.Process,
    folder: Path,
    meanwhile: Callable[[Comparison | None], None],
) -> Review:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rivals, error = Rivals(), ""
        try:
            rivals = production(Path(scratch))
        except PipelineError as failure:
            error = str(failure)
        found = review.review(candidate, rivals, images, folder, process, meanwhile)
    found = found._replace(comparison_error=error or found.comparison_error)
    for problem in filter(None, (found.comparison_error, found.benchmark_error)):
        log.warning("%s The model is registered anyway. `promote` tries to add the missing measurement.", problem)
    return found


def metrics_of(folder: Path) -> dict[str, float]:
    """Return the metrics of a finished evaluation: name in MLflow -> value.

    They include the differences between the predictions for original files and the predictions for the records of these
    files, if the evaluation measured these differences.
    """
    found = manifest.read_json(folder / metrics.METRICS)
    if benchmark := review.read(folder).serving_benchmark:
        values = serving_benchmark.to_json(benchmark)
        found |= {name: value for name, value in values.items() if name.startswith("served_")}
    return {f"validation_{name}": value for name, value in found.items()}


def tags_of(folder: Path) -> dict[str, str]:
    """Return the tags that a finished evaluation gives to a version."""
    found = review.read(folder)
    accuracy = manifest.read_json(folder / metrics.METRICS)["accuracy"]
    figures: dict[str, float | None] = {"validation_accuracy": accuracy}
    if benchmark := found.serving_benchmark:
        figures |= {name: getattr(benchmark, name) for name in BENCHMARK_FIGURES}
        if benchmark.production:
            figures["latency_ratio"] = benchmark.production.latency_ratio
    if found.comparison:
        figures |= {"difference": found.comparison.difference, "compared_with": found.comparison.version}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    tags = {"accuracy": formatting.percent(accuracy), MEASURED: json.dumps(rounded)}
    return tags | gates.tags_of(folder)
