"""A generated data set with the shape of the first deployment: photograph-like images in a folder for each label.

Every image is a part of one of scikit-learn's two sample photographs, with a random position, angle, distortion, tint,
illumination and sensor noise. A label is a region of a photograph and a tint, so a model can learn it. The same
arguments give the same files.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dgmd_pipeline.data import inspection
from dgmd_pipeline.manifest import RawFile
from dgmd_pipeline.workflow import executors

LABELS = 24
FILES = 2_251  # in the first deployment's bucket
MADE = "_made"  # written last, to mark the folder as complete


class Kind(NamedTuple):
    """Size and format of the files."""

    width: tuple[int, int]  # pixels, minimum and maximum; the height is three quarters of it
    quality: int  # of a JPEG
    png_width: int  # smaller: a PNG then has about as many bytes as a JPEG
    png_every: int = 10


SCRAPED = Kind(width=(640, 1600), quality=88, png_width=360)  # about 170 kB each
SMALL = Kind(width=(320, 320), quality=85, png_width=120)  # about 25 kB each, for sets of many thousands


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photograph) for photograph in load_sample_images().images]


@cache
def _noise() -> np.ndarray:
    """Noise with a standard deviation of 1, correlated over neighbours like a demosaiced sensor's."""
    white = np.random.default_rng(0).normal(size=(1700, 1700, 3)).astype(np.float32)
    return (white + np.roll(white, 1, 0) + np.roll(white, 1, 1)) / np.float32(3**0.5)


def _image(label: int, number: int, width: int) -> Image.Image:
    random = np.random.default_rng((label, number))
    photograph = _photographs()[label % 2]
    span = random.uniform(150, 330)
    place = divmod(label // 2, 4)
    centre = np.array([90 + 150 * place[1], 100 + 110 * place[0]]) + random.uniform(-60, 60, 2)
    turn = np.deg2rad(random.uniform(-25, 25))
    corners = span / 2 * np.array([[-1, -0.75], [-1, 0.75], [1, 0.75], [1, -0.75]]) * random.uniform(0.8, 1.1, (4, 2))
    corners = centre + corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    inside = corners.clip(0, np.array(photograph.size) - 1)
    height = width * 3 // 4
    bent = photograph.transform((width, height), Image.Transform.QUAD, inside.ravel(), Image.Resampling.BICUBIC)
    tint = random.uniform(0.8, 1.2, 3) * (1 + 0.15 * np.cos(label + np.array([0, 2, 4])))
    row, column = random.integers(0, 1700 - height), random.integers(0, 1700 - width)
    noise = _noise()[row : row + height, column : column + width] * np.float32(random.uniform(1.5, 6))
    shade = Image.fromarray(random.uniform(0.6, 1.3, (3, 4)).astype(np.float32)).resize((width, height))
    levels = np.asarray(bent, np.float32) * tint.astype(np.float32) * np.asarray(shade)[..., None] + noise
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _labels(files: int) -> np.ndarray:
    """Return the class index (int [files]) of each image: 84 to 98 images of each label, for FILES images."""
    shares = 98 - 14 * (np.arange(LABELS) / (LABELS - 1)) ** 2.33
    return np.searchsorted(np.cumsum(shares / shares.sum()), (np.arange(files) + 0.5) / files)


def _write(numbers: range, files: int, folder: Path, kind: Kind) -> int:
    labels = _labels(files)
    for number in numbers:
        label, index = int(labels[number]), number
        name = f"spice jar {label:02d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        if number % kind.png_every == kind.png_every - 1:
            _image(label, index, kind.png_width).save(folder / name / f"{name} photo_{index:05d}.png")
        else:
            width = int(np.random.default_rng(number).integers(*kind.width, endpoint=True))
            path = folder / name / f"{name} photo_{index:05d}.jpeg"
            _image(label, index, width).save(path, quality=kind.quality)
    return len(numbers)


def make(folder: Path, files: int = FILES, kind: Kind = SCRAPED) -> Path:
    """Fill `folder` with `files` images, `<label>/<file>`, unless it is complete, and return it.

    Exits if the pipeline would reject an image or group two of them as near-duplicates.
    """
    if (folder / MADE).exists():
        return folder
    print(f"making {files:,} images in {folder} ...", flush=True)
    pool = executors.ProcessExecutor()
    numbers = [range(start, min(start + 50, files)) for start in range(0, files, 50)]
    assert sum(pool.map(partial(_write, files=files, folder=folder, kind=kind), numbers)) == files
    map_files = partial(pool.map, chunk=inspection.CHUNK)
    with tempfile.TemporaryDirectory() as scratch:
        usable, rejected = inspection.inspect(inspection.find(folder), folder, Path(scratch), map_files)
    pool.close()
    by_group = sorted(usable, key=lambda image: image.group)
    groups = [[row.path for row in rows] for _, rows in groupby(by_group, lambda image: image.group)]
    if rejected or any(len(paths) > 1 for paths in groups):
        near_duplicates = [paths for paths in groups if len(paths) > 1]
        raise SystemExit(f"unusable data set: rejected {rejected[:3]}, near-duplicates {near_duplicates[:3]}")
    (folder / MADE).touch()
    return folder


def pieces(folder: Path, files: Sequence[RawFile], size: int) -> list[list[Path]]:
    """Return the paths of files in pieces of `size`, one for each call of a worker."""
    paths = [folder / file.path for file in files]
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def main() -> None:
    """Make a data set and print the sizes of its files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    make(options.folder, options.files, SMALL if options.small else SCRAPED)
    for suffix in ("jpeg", "png"):
        sizes = [path.stat().st_size for path in options.folder.glob(f"*/*.{suffix}")]
        print(
            f"{len(sizes):,} {suffix}: {np.mean(sizes) / 1e3:.0f} kB ({min(sizes) / 1e3:.0f} to {max(sizes) / 1e3:.0f})"
        )
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
