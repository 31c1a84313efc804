"""A model, production and the validation pictures at hand -> what an operator decides from."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.data import shards
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import comparison, serving_benchmark
from dgmd_pipeline.evaluation import predictions as evaluation_predictions
from dgmd_pipeline.manifest import Example
from dgmd_pipeline.training import dataset, networks

log = logging.getLogger(__name__)
COMPARISON, SERVING_BENCHMARK = "comparison.json", "assessment.json"


class ValidationImages(NamedTuple):
    """The pictures of the validation side."""

    records: Path  # the folder of their records
    examples: Sequence[Example]  # in the order of the records
    raw: Path | None = None  # the folder of the original files, where it is at hand


class CandidateModel(NamedTuple):
    """A model."""

    path: Path  # of the Keras model
    labels: Sequence[str]  # of its outputs, in their order
    trained_on: frozenset[str]  # SHA-256 of the training images' files
    version: int | None = None
    probabilities: np.ndarray | None = None  # float32 [n, classes], of all pictures, where they are known
    run: str = ""  # that made it


class Review(NamedTuple):
    """What was found out about a model."""

    comparison: dict[str, Any] | None  # `comparison.compare`, and version and left_out; None: `missing` says why
    missing: str  # why there is no comparison
    assessment: dict[str, Any] | None  # `assessment.assess`; None: `untried` says why
    untried: str


def validation_images(folder: Path, rows: Iterable[Example], raw: Path | None = None) -> ValidationImages:
    """Return the pictures in the folder of records, whose rows (of the split) may come in any order.

    With `raw`, the folder of the original files, a model that is tried is also given a sample of these.
    """
    return ValidationImages(folder, shards.record_order(rows), raw)


def compare(here: CandidateModel, there: CandidateModel, known: ValidationImages) -> dict[str, Any]:
    """Compare two models on the pictures that neither was trained on and whose labels both have.

    Returns what `comparison.compare` does, with `version` and `run` (there's) and `left_out`, how many pictures one of
    them was trained on. Raises PipelineError where no picture is left.
    """
    trained_on = here.trained_on | there.trained_on
    shared = set(here.labels) & set(there.labels)
    seen = np.array([row.sha256 in trained_on for row in known.examples])
    chosen = np.array([row.label in shared for row in known.examples]) & ~seen
    if not chosen.any():
        raise PipelineError(
            f"It cannot be compared with version {there.version}: of {len(seen):,} validation images {seen.sum():,} "
            "were trained on by one of the two, and the labels of the others are not known to both."
        )
    truth = [row.label for row, wanted in zip(known.examples, chosen, strict=True) if wanted]
    one, other = (predictions(each, known)[chosen] for each in (here, there))
    found = comparison.compare(one, other, truth, here.labels, there.labels)
    return {"version": there.version, "run": there.run, "left_out": int(seen.sum()), **found}


def predictions(contender: CandidateModel, known: ValidationImages) -> np.ndarray:
    """Return the probabilities (float32 [n, classes]) of all pictures.

    Raises PipelineError where the model cannot be used, or where the records do not hold what it would make of the
    original files: it would look worse than it is.
    """
    if contender.probabilities is not None:
        return contender.probabilities
    log.info("  version %s on %s validation images ...", contender.version, f"{len(known.examples):,}")
    network = networks.load(contender.path)
    _check_comparable(networks.input_size(network), networks.input_fit(network), known.records)
    return evaluation_predictions.predict(network, dataset.read(known.records))[0]


def _check_comparable(size: tuple[int, int], fit: str, folder: Path) -> None:
    """Raise PipelineError unless a model of this size (height, width) and fit can be judged by the folder's records.

    Its own resizing gets the records' pixels. From larger ones of the same fit it makes what it would make of the
    original, but for bars and cuts: those of another aspect ratio come on top of the records' own.
    """
    index = manifest.read_shard_index(folder)
    there, its = (index.height, index.width), index.fit
    same_shape = size[0] * there[1] == size[1] * there[0]
    if size[0] > there[0] or size[1] > there[1] or fit != its or (fit != "stretch" and not same_shape):
        raise PipelineError(
            f"It reads images of {size[1]} x {size[0]} pixels with IMAGE_FIT={fit}, and the validation records hold "
            f"{there[1]} x {there[0]} with IMAGE_FIT={its}: on those it would look worse than it is. Records for it "
            f"are made with IMAGE_WIDTH={size[1]} IMAGE_HEIGHT={size[0]} IMAGE_FIT={fit} and `--until convert`."
        )


def review(
    candidate: CandidateModel,
    production: CandidateModel | None,
    known: ValidationImages,
    scratch: Path,
    environment: Mapping[str, str],
    meanwhile: Callable[[dict[str, Any] | None], None] = lambda _: None,
) -> Review:
    """Try a model and compare it with production, where there is one. `scratch` is a folder to write in,
    `environment` that of the process which uses the model as a service does.

    `meanwhile` is called with the comparison while the process starts in which the model is tried; what it does is done
    before anything is timed.
    What cannot be found out is said in the outcome: a model that is trained is worth keeping all the same.
    """
    with serving_benchmark.start_process(environment) as process:
        compared, missing = None, ""
        if production is not None:
            try:
                production = production._replace(probabilities=predictions(production, known))
            except PipelineError as error:
                missing = f"Version {production.version} cannot be used here: {error}"
                production = None  # nor be timed
        if production is not None:
            try:
                compared = compare(candidate, production, known)
            except PipelineError as error:
                missing = str(error)
        probabilities = predictions(candidate, known)
        some = np.stack([picture for picture, _ in islice(dataset.read(known.records), serving_benchmark.PICTURES)])
        meanwhile(compared)
        it = "the model" if candidate.version is None else f"version {candidate.version}"
        beside = f", beside version {production.version}" if production else ""
        log.info("  %s in a process of its own%s ...", it, beside)
        try:
            other = production and production.path
            tried = serving_benchmark.benchmark(
                process, candidate.path, some, probabilities[: len(some)], scratch, other, _sample(known, probabilities)
            )
        except PipelineError as error:
            return Review(compared, missing, None, str(error))
        return Review(compared, missing, tried, "")


def _sample(known: ValidationImages, probabilities: np.ndarray) -> serving_benchmark.Originals:
    """Return the first of the original files: the order of records is that of a hash, so they are a random sample."""
    if known.raw is None:
        return serving_benchmark.Originals()
    files = [known.raw / row.path for row in known.examples[: serving_benchmark.ORIGINALS]]
    return serving_benchmark.Originals(files, probabilities[: len(files)])


def write(found: Review, folder: Path) -> None:
    """Write `comparison.json` and `assessment.json` into `folder`."""
    for name, part, reason in (
        (COMPARISON, found.comparison, found.missing),
        (SERVING_BENCHMARK, found.assessment, found.untried),
    ):
        value = {"missing": reason} if part is None else part
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(folder: Path) -> Review:
    """Return what `write` wrote. Raises PipelineError where a file is gone or was edited."""
    parts = [manifest.read_json(folder / name) for name in (COMPARISON, SERVING_BENCHMARK)]
    values: list[Any] = []
    for part in parts:
        values += [None, part["missing"]] if "missing" in part else [part, ""]
    return Review(*values)
