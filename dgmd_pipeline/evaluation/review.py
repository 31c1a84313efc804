"""Reviews a candidate: compares it with production on the validation images, and benchmarks how it serves."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import ChangedFile, PipelineError
from dgmd_pipeline.evaluation import comparison, predictions, serving_benchmark
from dgmd_pipeline.evaluation.comparison import Comparison
from dgmd_pipeline.evaluation.predictions import PredictedLabels
from dgmd_pipeline.evaluation.serving_benchmark import ServingBenchmark
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.serving import inputs
from dgmd_pipeline.training import dataset, networks
from dgmd_pipeline.training.vectors import Vectors

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)
COMPARISON, SERVING_BENCHMARK = "comparison.json", "assessment.json"
BEST = "best"  # key of comparison.json; its value is the comparison with `Rivals.best`; other keys are about production
Part = TypeVar("Part")


class StoredFeatures(NamedTuple):
    """The features of the validation images, in the order of the records, and the network that they come from."""

    vectors: Vectors  # float32 [n, d]
    backbone: "keras.Model"


class ValidationImages(NamedTuple):
    """The images of the validation split."""

    records: Path  # the folder of their records
    examples: Sequence[Example]  # in the order of the records
    raw: Path | None = None  # the folder of the original files; the serving benchmark predicts a sample of them
    features: StoredFeatures | None = None  # None: no features are stored, or fine-tuning has changed the backbone


class Answers(NamedTuple):
    """A model's predictions for the validation images."""

    predicted: np.ndarray  # int64 [n], class index of the most probable label
    first: np.ndarray  # float32 [m, classes], probabilities of the first `serving_benchmark.IMAGES` images


class CandidateModel(NamedTuple):
    """A model to review, or a version to compare it with."""

    path: Path  # of the Keras model
    labels: Sequence[str]  # by class index
    trained_on: frozenset[str]  # SHA-256 of the training images' files
    trained_labels: frozenset[str]  # labels of the training images; the model may have more outputs
    version: int | None = None  # None: not registered yet
    answers: Answers | None = None  # None: not predicted yet
    run: str = ""  # the run that made the model


class Rivals(NamedTuple):
    """The versions to compare a candidate with."""

    production: CandidateModel | None = None
    best: CandidateModel | None = None  # most accurate former production version, if more accurate than production


class LabelChanges(NamedTuple):
    """How the labels that a candidate was trained on differ from production's. Labels are sorted."""

    lost: Sequence[str]  # production was trained on these labels; the candidate cannot predict them
    emptied: Sequence[str]  # production was trained on these labels; the candidate was not, but it has outputs for them
    new: Sequence[str]  # only the candidate was trained on these labels


class Review(NamedTuple):
    """What an operator needs to decide on a promotion."""

    comparison: Comparison | None
    comparison_error: str  # why there is no comparison; "" if there is no production version
    serving_benchmark: ServingBenchmark | None
    benchmark_error: str  # why there is no serving benchmark
    label_changes: LabelChanges | None = None  # None: there is no production version, or it could not be fetched
    label_changes_error: str = ""  # why production's labels are unknown
    best: Comparison | None = None  # the comparison with `Rivals.best`; None: no such version, or an error


def validation_images(folder: Path, rows: Iterable[Example]) -> ValidationImages:
    """Return the images in a folder of records, given the rows of the split in any order."""
    return ValidationImages(folder, shards.record_order(rows))


def label_changes(candidate: CandidateModel, trained_before: frozenset[str]) -> LabelChanges:
    """Return how a candidate's labels differ from those that production was trained on."""
    gone = sorted(trained_before - candidate.trained_labels)
    return LabelChanges(
        lost=[label for label in gone if label not in candidate.labels],
        emptied=[label for label in gone if label in candidate.labels],
        new=sorted(candidate.trained_labels - trained_before),
    )


def compare(candidate: CandidateModel, production: CandidateModel, images: ValidationImages) -> Comparison:
    """Compare two models on the images that neither was trained on and whose labels both know.

    Raises PipelineError if no image is left, or production cannot be used (see `predict`).
    """
    trained_on = candidate.trained_on | production.trained_on
    shared = set(candidate.labels) & set(production.labels)
    seen = np.array([row.sha256 in trained_on for row in images.examples])
    chosen = np.array([row.label in shared for row in images.examples]) & ~seen
    if not chosen.any():
        raise PipelineError(
            f"The model cannot be compared with version {production.version}, because no validation image is suitable. "
            f"One or both of the models were trained on {seen.sum():,} of {len(seen):,} validation images. For the "
            "others, one or both of the models do not know the label."
        )
    labels, others = (
        _select(predict(model, images).predicted, model.labels, images.examples, chosen)
        for model in (candidate, production)
    )
    return comparison.compare(labels, others, production.version, production.run, left_out=int(seen.sum()))


def _select(
    predicted: np.ndarray, labels: Sequence[str], examples: Sequence[Example], chosen: np.ndarray
) -> PredictedLabels:
    """Return the predicted and the true labels of the chosen images (bool [n]) as the model's class indexes."""
    index_of = {label: index for index, label in enumerate(labels)}
    truth = [index_of[row.label] for row, wanted in zip(examples, chosen, strict=True) if wanted]
    return PredictedLabels(predicted[chosen], np.array(truth, np.int64), labels)


def answers(blocks: Iterable[np.ndarray]) -> Answers:
    """Return a model's answers to all validation images from blocks of its probabilities (float32 [m, classes])."""
    predicted: list[np.ndarray] = []
    first: list[np.ndarray] = []
    for block in blocks:
        predicted.append(block.argmax(axis=1))
        if sum(map(len, first)) < serving_benchmark.IMAGES:
            first.append(block[: serving_benchmark.IMAGES].copy())  # a slice would keep the block in memory
    return Answers(np.concatenate(predicted), np.concatenate(first)[: serving_benchmark.IMAGES])


def predict(model: CandidateModel, images: ValidationImages) -> Answers:
    """Return a model's answers to all validation images.

    If the features of the model's frozen network are stored, only the model's head runs.

    Raises PipelineError if the model cannot be loaded, or if its accuracy on the records would be too low because of
    their size or fit (see `_check_comparable`).
    """
    if model.answers is not None:
        return model.answers
    log.info("  version %s on %s validation images ...", model.version, f"{len(images.examples):,}")
    network = networks.load(model.path)
    _check_comparable(inputs.input_size(network), inputs.input_fit(network), images.records)
    if (stored := images.features) and networks.has_backbone(network, stored.backbone):
        return answers(predictions.predict_head(network, stored.vectors))
    return answers(predictions.predict(network, dataset.read(images.records)))


def _check_comparable(size: tuple[int, int], fit: str, folder: Path) -> None:
    """Raise PipelineError unless a model of this size (height, width) and fit can be measured on the folder's records.

    The model resizes the records. Its accuracy on the records is about the same as on the original files if three
    conditions are met:
    1. The records have the model's fit.
    2. The records are at least as large as the model's input.
    3. The records have the aspect ratio of the model's input, or the fit is "stretch". With another fit and another
       aspect ratio, each image would be padded or cropped twice: for the record and for the model.
    """
    index = manifest.read_shard_index(folder)
    same_shape = size[0] * index.width == size[1] * index.height
    too_small = size[0] > index.height or size[1] > index.width
    if too_small or fit != index.fit or (fit != "stretch" and not same_shape):
        raise PipelineError(
            f"The model expects images of {size[1]} x {size[0]} pixels with IMAGE_FIT={fit}. The images in the "
            f"validation records have {index.width} x {index.height} pixels with IMAGE_FIT={index.fit}. The model's "
            f"accuracy on them would be too low. To make suitable records, set IMAGE_WIDTH={size[1]} "
            f"IMAGE_HEIGHT={size[0]} IMAGE_FIT={fit} and run `--until convert`."
        )


def review(
    candidate: CandidateModel,
    rivals: Rivals,
    images: ValidationImages,
    scratch: Path,
    process: serving_benchmark.Process,
    meanwhile: Callable[[Comparison | None], None] = lambda _: None,
) -> Review:
    """Compare a candidate with its rivals, if there are any. Benchmark the candidate and production in `process`.

    `scratch` is a folder for temporary files. `meanwhile` is called with the comparison while the process loads
    the candidate.

    If production cannot be used, or the candidate fails in the process, the trained model is kept anyway. So this
    function does not raise PipelineError: the review contains the text of the error.
    """
    process.load(candidate.path)
    candidate = candidate._replace(answers=predict(candidate, images))
    labels = label_changes(candidate, rivals.production.trained_labels) if rivals.production else None
    production, compared, error = _compare(candidate, rivals.production, images)
    _, best, best_error = _compare(candidate, rivals.best, images)
    if best_error:
        log.warning("No comparison with the best former production version: %s", best_error)
    sample = np.stack([image for image, _ in islice(dataset.read(images.records), serving_benchmark.IMAGES)])
    try:
        benchmark = _benchmark(process, candidate, production, images, sample, scratch, partial(meanwhile, compared))
    except PipelineError as failure:
        return Review(compared, error, None, str(failure), labels, best=best)
    return Review(compared, error, benchmark, "", labels, best=best)


def _compare(
    candidate: CandidateModel, rival: CandidateModel | None, images: ValidationImages
) -> tuple[CandidateModel | None, Comparison | None, str]:
    """Return the rival with its answers, the comparison, and the error as text.

    The rival is None if it cannot predict. The comparison is None if there is an error. If `rival` is None, both are
    None.
    """
    if rival is None:
        return None, None, ""
    try:
        rival = rival._replace(answers=predict(rival, images))
    except ChangedFile as error:
        return None, None, str(error.of_version(rival.version))
    except PipelineError as error:
        return None, None, f"Version {rival.version} cannot be used: {error}"
    try:
        return rival, compare(candidate, rival, images), ""
    except PipelineError as error:
        return rival, None, str(error)


def _benchmark(
    process: serving_benchmark.Process,
    candidate: CandidateModel,
    production: CandidateModel | None,
    images: ValidationImages,
    sample: np.ndarray,
    scratch: Path,
    meanwhile: Callable[[], None],
) -> ServingBenchmark:
    """Benchmark a candidate on the records and the original files of the first images.

    `sample` has the pixels of these records.
    """
    assert candidate.answers is not None  # noqa: S101 - `review` has predicted them
    model = "the model" if candidate.version is None else f"version {candidate.version}"
    beside = f" and version {production.version}" if production else ""
    log.info("  benchmarking %s%s in a clean process ...", model, beside)
    files = []
    if images.raw is not None:  # records are in the order of a hash, so the first ones are a random sample
        files = [images.raw / row.path for row in images.examples[: len(sample)]]
    return serving_benchmark.benchmark(
        process,
        sample,
        candidate.answers.first,
        scratch,
        production.path if production else None,
        files,
        meanwhile,
    )


def write(found: Review, folder: Path) -> None:
    """Write `comparison.json` and `assessment.json` into `folder`. The label changes are not written."""
    compared, benchmark = found.comparison, found.serving_benchmark
    best: dict[str, object] = {BEST: comparison.to_json(found.best)} if found.best else {}
    values: dict[str, dict[str, object]] = {
        COMPARISON: comparison.to_json(compared) | best if compared else {"missing": found.comparison_error},
        SERVING_BENCHMARK: serving_benchmark.to_json(benchmark) if benchmark else {"missing": found.benchmark_error},
    }
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(folder: Path) -> Review:
    """Return the review that `write` wrote. Raises PipelineError if a file is missing or was edited."""
    compared, comparison_error = _read_part(folder / COMPARISON, comparison.from_json)
    best, _ = _read_part(folder / COMPARISON, _best_from_json)
    benchmark, benchmark_error = _read_part(folder / SERVING_BENCHMARK, serving_benchmark.from_json)
    return Review(compared, comparison_error, benchmark, benchmark_error, best=best)


def _best_from_json(values: Mapping[str, Any]) -> Comparison | None:
    return comparison.from_json(values[BEST]) if BEST in values else None


def _read_part(path: Path, from_json: Callable[[Mapping[str, Any]], Part]) -> tuple[Part | None, str]:
    values = manifest.read_json(path)
    try:
        return (None, str(values["missing"])) if "missing" in values else (from_json(values), "")
    except (KeyError, TypeError) as error:
        raise manifest.changed_file_error(path, error) from error
