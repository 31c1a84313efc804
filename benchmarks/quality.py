"""The quality of the models on real images, compared with usual methods: `make bench-quality`.

    python -m benchmarks.quality [--repeats 3] [--sets clothing,solar] [--before COMMIT]

For each data set and repeat, a test part is set aside at random (`datasets.third_split`), the pipeline runs on the rest
in a separate process, and the saved model predicts the test part from the original files. `rivals` train on exactly the
images of the pipeline's training split, and never use the validation split or the test part. `--before` measures only
the pipeline and writes quality_before.json, the reference of later runs, instead of QUALITY.md.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import datasets, heads, imbalance, lite0, measure, quality_report, rivals
from benchmarks.quality_report import OURS, timed
from dgmd_pipeline import manifest
from dgmd_pipeline.data import decoding, labels, shards
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.training import dataset, feature_store, features, networks, runtime
from dgmd_pipeline.training.backbones import is_frozen

if TYPE_CHECKING:
    import keras

FEATURE_RIVALS = {
    quality_report.LOGISTIC: rivals.logistic_regression,
    quality_report.RAW: rivals.logistic_regression_raw,
    "support vector machine": rivals.support_vector_machine,
}
FIT = Settings.model_fields["image_fit"].default
BATCH = 32  # images of one size in a prediction

Figures = dict[str, float]  # accuracy, f1, log_loss, expected_calibration_error, cpu_seconds
Answers = dict[str, tuple[np.ndarray, float]]  # method -> probabilities for the test part, CPU seconds


class Repeat(NamedTuple):
    """One repeat on a data set: the step folders in `folder`, and the test part."""

    known: datasets.DataSet
    folder: Path  # DATA_DIR
    source: Path  # of the original files
    test: list[manifest.Image]
    names: list[str]  # labels in the order of their indexes
    settings: dict[str, Any]  # variables of the pipeline

    @property
    def files(self) -> list[Path]:
        return [self.source / row.path for row in self.test]

    @property
    def truth(self) -> np.ndarray:
        return np.array([self.names.index(row.label) for row in self.test])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sets", default=",".join([*datasets.SETS, imbalance.NAME]))
    parser.add_argument("--before", metavar="COMMIT")
    options = parser.parse_args()
    found = quality_report.Found(repeats=options.repeats)
    begun = time.monotonic()
    runtime.start_tensorflow()
    for name in options.sets.split(","):
        print(f"{name} ...", flush=True)
        try:
            if name == imbalance.NAME:
                found.imbalance = imbalance.measured(options.repeats)
            else:
                found.sets[name], left_out = measured(name, options.repeats, alone=bool(options.before))
                found.left_out += left_out
        except datasets.Missing as error:
            found.left_out.append(f"{name}: {error}")
            print(f"  skipped: {error}", file=sys.stderr, flush=True)
        found.minutes = (time.monotonic() - begun) / 60
        if options.before:
            quality_report.write_before(found, options.before)
        else:
            quality_report.write(found)


def measured(name: str, repeats: int, alone: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the results on a data set, and what was skipped. `alone`: without the rivals."""
    known = datasets.SETS[name]
    weights = known.weights()
    source = datasets.originals(known.lay_out.__name__, known.lay_out)
    rows = datasets.inspected(source)
    variants = [each for each in known.variants if each.split("=")[0].lower() in Settings.model_fields]
    left_out = [f"{name}, {each}: this code has no such setting" for each in known.variants if each not in variants]
    methods: dict[str, list[Figures]] = {}
    counts: dict[str, int] = {}
    for repeat in range(repeats):
        with measure.folder() as scratch:
            laid = prepared(known, weights, rows, source, Path(scratch), repeat)
            answer = of_images if known.backbone == "cnn" else of_features
            answers = answer(laid, repeat, variants, alone)
            learned = list(manifest.read(laid.folder / "split" / "training.csv", manifest.Example))
            counts = {"training": len(learned), "test": len(laid.test), "labels": len(laid.names)}
        for method, (probabilities, seconds) in answers.items():
            figures = quality_report.figures(probabilities, laid.truth, laid.names) | {"cpu_seconds": seconds}
            methods.setdefault(method, []).append(figures)
            print(f"  {repeat + 1}/{repeats} {method}: {figures}", file=sys.stderr, flush=True)
    return {"title": known.title, "counts": counts, "methods": methods}, left_out


def prepared(
    known: datasets.DataSet, weights: str, rows: Sequence[manifest.Image], source: Path, folder: Path, repeat: int
) -> Repeat:
    """Prepare a repeat: run the pipeline up to the input of its training."""
    kept, test = datasets.third_split(rows, repeat)
    datasets.link(kept, source, folder / "raw")
    within = is_frozen(known.backbone)  # others train on records, or on features that are extracted here
    settings = {
        "DATA_DIR": folder, "IMAGE_WIDTH": known.width, "IMAGE_HEIGHT": known.height, "SEED": repeat + 1,
        "BACKBONE": known.backbone if within else "cnn", "BACKBONE_WEIGHTS": weights if within else "none",
    }  # fmt: skip
    pipeline(settings, "extract" if within else "convert")
    names = labels.read_mapping(folder / "label_map" / "mapping.json")
    return Repeat(known, folder, source, test, names, settings)


def pipeline(settings: dict[str, Any], until: str) -> float:
    """Run the pipeline; return its CPU seconds."""
    return measure.run(sys.executable, "pipeline.py", "run", "--until", until, **settings).seconds


def trainings(laid: Repeat, variants: Sequence[str]) -> Iterator[tuple[str, "keras.Model", float]]:
    """Train with the default settings and with each variant; yield name, saved model and CPU seconds."""
    for variant in ("", *variants):
        shutil.rmtree(laid.folder / "trained_model", ignore_errors=True)
        name, _, value = variant.partition("=")
        seconds = pipeline(laid.settings | ({name: value} if name else {}), "train")
        yield variant or OURS, networks.load(laid.folder / "trained_model" / "model.keras"), seconds


def of_features(laid: Repeat, repeat: int, variants: Sequence[str], alone: bool) -> Answers:
    """Predict with a head on a frozen network, and with the rivals that train on its features."""
    import keras

    size = (laid.known.height, laid.known.width)
    weights = laid.known.weights()
    if is_frozen(laid.known.backbone):
        network = networks.build_backbone(laid.known.backbone, weights, *size, Path("unused"))
        learned, _ = (feature_store.load(laid.folder / f"features_{split}") for split in ("training", "validation"))
        trained = list(trainings(laid, variants))
    else:
        network = lite0.build(Path(weights), *size)
        splits = extracted(laid.folder, "training", network), extracted(laid.folder, "validation", network)
        class_weights = manifest.read_json(laid.folder / "balanced" / "class_weights.json")
        by_index = {int(index): weight for index, weight in class_weights.items()}
        rows = shards.record_order(manifest.read(laid.folder / "split" / "training.csv", manifest.Example))
        groups = [row.group for row in rows]
        head, seconds = timed(lambda: heads.train(*splits, groups, len(laid.names), by_index, repeat + 1))
        learned, trained = splits[0], [(OURS, networks.assemble(network, head, FIT), seconds)]
    extractor = networks.assemble(network, keras.layers.Identity(), FIT)
    asked = [saved for _, saved, _ in trained] + ([] if alone else [extractor])
    given = predictions(asked, laid.files)
    answers: Answers = {name: (each, cpu) for (name, _, cpu), each in zip(trained, given, strict=False)}
    if alone:
        return answers
    test = given[-1]
    vectors, indexes = np.array(learned[0]), learned[1]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # one core each, to measure its CPU time
        due = {
            name: pool.submit(timed, partial(rival, vectors, indexes, test)) for name, rival in FEATURE_RIVALS.items()
        }
        return answers | {name: each.result() for name, each in due.items()}


def extracted(folder: Path, split: str, network: "keras.Model") -> tuple[np.ndarray, np.ndarray]:
    """Return the features of a split's records, from a network that the package does not have."""
    batches = list(dataset.read(folder / f"tfrecord_{split}").batch(16).as_numpy_iterator())
    vectors = np.concatenate(list(features.extract((images for images, _ in batches), network)))
    return vectors, np.concatenate([labels for _, labels in batches])


def of_images(laid: Repeat, repeat: int, variants: Sequence[str], alone: bool) -> Answers:
    """Predict with `cnn`, and with a rival that has the same CPU time."""
    trained = list(trainings(laid, variants))
    answers: Answers = {}
    for (name, _, seconds), given in zip(
        trained, predictions([saved for _, saved, _ in trained], laid.files), strict=True
    ):
        answers[name] = given, seconds
    if alone:
        return answers
    rows = list(manifest.read(laid.folder / "split" / "training.csv", manifest.Example))
    paths, indexes = [laid.source / row.path for row in rows], np.array([row.class_index for row in rows])
    size = (laid.known.width, laid.known.height)
    learned, test = (np.stack([resized(path, size) for path in each]) for each in (paths, laid.files))
    budget = answers[OURS][1]
    answers["plain Keras recipe"] = timed(lambda: rivals.plain_keras(learned, indexes, test, budget, repeat + 1))
    if laid.known.lay_out is datasets.demo_digits:
        values = [np.array([datasets.digit_of(path) for path in each]) for each in (paths, laid.files)]
        answers["SVC(gamma=0.001) on the 8 x 8 values"] = timed(
            lambda: rivals.digits_machine(values[0], indexes, values[1])
        )
    return answers


def resized(path: Path, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(decoding.open_rgb(path).resize(size))


def predictions(models: Sequence["keras.Model"], files: Sequence[Path]) -> list[np.ndarray]:
    """Return the predictions of each model for original files, opened like `predict` opens them.

    Images of one size are predicted together, which changes only the time.
    """
    answers: list[list[Any]] = [[None] * len(files) for _ in models]
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}

    def flush(held: list[tuple[int, np.ndarray]]) -> None:
        batch = np.stack([image for _, image in held])
        for network, rows in zip(models, answers, strict=True):
            for (position, _), row in zip(held, network.predict_on_batch(batch), strict=True):
                rows[position] = row

    for position, path in enumerate(files):
        image = np.asarray(decoding.open_rgb(path))
        held = waiting.setdefault(image.shape, [])
        held.append((position, image))
        if len(held) == BATCH:
            flush(waiting.pop(image.shape))
    for held in waiting.values():
        flush(held)
    return [np.stack(rows) for rows in answers]


if __name__ == "__main__":
    main()
