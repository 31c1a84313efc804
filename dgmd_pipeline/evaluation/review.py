"""A candidate, production and the validation images -> a `Review`: the comparison and the serving benchmark."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import comparison, predictions, serving_benchmark
from dgmd_pipeline.evaluation.comparison import Comparison
from dgmd_pipeline.evaluation.predictions import Predictions
from dgmd_pipeline.evaluation.serving_benchmark import ServingBenchmark
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.serving import inputs
from dgmd_pipeline.training import dataset, networks

log = logging.getLogger(__name__)
COMPARISON, SERVING_BENCHMARK = "comparison.json", "assessment.json"
Part = TypeVar("Part")


class ValidationImages(NamedTuple):
    """The images of the validation split."""

    records: Path  # the folder of their records
    examples: Sequence[Example]  # in the order of the records
    raw: Path | None = None  # the folder of the original files, if it exists


class CandidateModel(NamedTuple):
    """A model to review, or production to compare it with."""

    path: Path  # of the Keras model
    labels: Sequence[str]  # by class index
    trained_on: frozenset[str]  # SHA-256 of the training images' files
    version: int | None = None  # None: not registered yet
    probabilities: np.ndarray | None = None  # float32 [n, classes], of all validation images; None: not predicted yet
    run: str = ""  # that made the model


class Review(NamedTuple):
    """What an operator needs to decide on a promotion."""

    comparison: Comparison | None
    comparison_error: str  # why there is no comparison; "" if there is no production version
    serving_benchmark: ServingBenchmark | None
    benchmark_error: str  # why there is no serving benchmark


def validation_images(folder: Path, rows: Iterable[Example], raw: Path | None = None) -> ValidationImages:
    """Return the images in a folder of records, given the rows of the split in any order.

    With `raw`, the folder of the original files, the serving benchmark also predicts a sample of these.
    """
    return ValidationImages(folder, shards.record_order(rows), raw)


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
            f"The model cannot be compared with version {production.version}: of {len(seen):,} validation images, one "
            f"of the two models was trained on {seen.sum():,}, and they do not both know the labels of the others."
        )
    candidate_predictions, production_predictions = (
        _select(predict(model, images), model.labels, images.examples, chosen) for model in (candidate, production)
    )
    return comparison.compare(
        candidate_predictions, production_predictions, production.version, production.run, left_out=int(seen.sum())
    )


def _select(
    probabilities: np.ndarray, labels: Sequence[str], examples: Sequence[Example], chosen: np.ndarray
) -> Predictions:
    """Return the predictions for the chosen images (bool [n]); the true class indexes are those of the model."""
    index_of = {label: index for index, label in enumerate(labels)}
    rows = [row for row, wanted in zip(examples, chosen, strict=True) if wanted]
    truth = np.array([index_of[row.label] for row in rows], np.int64)
    return Predictions(probabilities[chosen], truth, labels, [row.path for row in rows])


def predict(model: CandidateModel, images: ValidationImages) -> np.ndarray:
    """Return a model's probabilities (float32 [n, classes]) of all validation images.

    Raises PipelineError if the model cannot be loaded, or if the records do not hold the pixels that it would see when
    given the original files: its measured accuracy would be too low.
    """
    if model.probabilities is not None:
        return model.probabilities
    log.info("  version %s on %s validation images ...", model.version, f"{len(images.examples):,}")
    network = networks.load(model.path)
    _check_comparable(inputs.input_size(network), inputs.input_fit(network), images.records)
    return predictions.predict(network, dataset.read(images.records))[0]


def _check_comparable(size: tuple[int, int], fit: str, folder: Path) -> None:
    """Raise PipelineError unless a model of this size (height, width) and fit can be measured on the folder's records.

    The model resizes the records' pixels. If the records are larger and have the same fit, the result is what it would
    make of the original file. Padding and cropping to another aspect ratio would come on top of the records' own.
    """
    index = manifest.read_shard_index(folder)
    same_shape = size[0] * index.width == size[1] * index.height
    too_small = size[0] > index.height or size[1] > index.width
    if too_small or fit != index.fit or (fit != "stretch" and not same_shape):
        raise PipelineError(
            f"The model reads images of {size[1]} x {size[0]} pixels with IMAGE_FIT={fit}, and the validation records "
            f"hold {index.width} x {index.height} with IMAGE_FIT={index.fit}: its accuracy on them would be too low. "
            f"To make records for it, set IMAGE_WIDTH={size[1]} IMAGE_HEIGHT={size[0]} IMAGE_FIT={fit} and run "
            "`--until convert`."
        )


def review(
    candidate: CandidateModel,
    production: CandidateModel | None,
    images: ValidationImages,
    scratch: Path,
    environment: Mapping[str, str],
    before_timing: Callable[[Comparison | None], None] = lambda _: None,
) -> Review:
    """Compare a candidate with production, if there is one, and benchmark it.

    `scratch` is a folder for temporary files, `environment` that of the benchmark's process. `before_timing` is called
    with the comparison while that process starts; the benchmark waits until it returns.

    If production cannot be used, or the candidate fails in the process, the review says so: a trained model is worth
    keeping anyway.
    """
    with serving_benchmark.start_process(environment) as process:
        compared, error = None, ""
        if production is not None:
            production, error = _with_predictions(production, images)
        if production is not None:
            try:
                compared = compare(candidate, production, images)
            except PipelineError as failure:
                error = str(failure)
        candidate = candidate._replace(probabilities=predict(candidate, images))
        sample = np.stack([image for image, _ in islice(dataset.read(images.records), serving_benchmark.IMAGES)])
        before_timing(compared)
        try:
            benchmark = _benchmark(process, candidate, production, images, sample, scratch)
        except PipelineError as failure:
            return Review(compared, error, None, str(failure))
    return Review(compared, error, benchmark, "")


def _with_predictions(production: CandidateModel, images: ValidationImages) -> tuple[CandidateModel | None, str]:
    """Return production with its probabilities; or None, so that it is not timed either, and the reason."""
    try:
        return production._replace(probabilities=predict(production, images)), ""
    except PipelineError as error:
        return None, f"Version {production.version} cannot be used: {error}"


def _benchmark(
    process: serving_benchmark.Process,
    candidate: CandidateModel,
    production: CandidateModel | None,
    images: ValidationImages,
    sample: np.ndarray,
    scratch: Path,
) -> ServingBenchmark:
    """Benchmark a candidate on `sample`, the first of the images, and on a sample of the original files."""
    assert candidate.probabilities is not None  # noqa: S101 - `review` has predicted them
    model = "the model" if candidate.version is None else f"version {candidate.version}"
    beside = f", beside version {production.version}" if production else ""
    log.info("  benchmarking %s in a clean process%s ...", model, beside)
    originals = serving_benchmark.Originals()
    if images.raw is not None:  # records are in the order of a hash, so the first ones are a random sample
        files = [images.raw / row.path for row in images.examples[: serving_benchmark.ORIGINALS]]
        originals = serving_benchmark.Originals(files, candidate.probabilities[: len(files)])
    return serving_benchmark.benchmark(
        process,
        candidate.path,
        sample,
        candidate.probabilities[: len(sample)],
        scratch,
        production.path if production else None,
        originals,
    )


def write(found: Review, folder: Path) -> None:
    """Write `comparison.json` and `assessment.json` into `folder`."""
    compared, benchmark = found.comparison, found.serving_benchmark
    values: dict[str, dict[str, object]] = {
        COMPARISON: comparison.to_json(compared) if compared else {"missing": found.comparison_error},
        SERVING_BENCHMARK: serving_benchmark.to_json(benchmark) if benchmark else {"missing": found.benchmark_error},
    }
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(folder: Path) -> Review:
    """Return what `write` wrote. Raises PipelineError if a file is missing or was edited."""
    compared, comparison_error = _read_part(folder / COMPARISON, comparison.from_json)
    benchmark, benchmark_error = _read_part(folder / SERVING_BENCHMARK, serving_benchmark.from_json)
    return Review(compared, comparison_error, benchmark, benchmark_error)


def _read_part(path: Path, from_json: Callable[[Mapping[str, Any]], Part]) -> tuple[Part | None, str]:
    values = manifest.read_json(path)
    try:
        return (None, str(values["missing"])) if "missing" in values else (from_json(values), "")
    except (KeyError, TypeError) as error:
        raise manifest.changed_file_error(path, error) from error
