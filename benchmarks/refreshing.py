"""The cost of 12 new images among 2,251 photograph-like ones, relative to a first run.

Costs are the CPU time of whole processes. The data steps (inspect, convert, extract) are measured up to `extract`. If
there are new images, the CPU time of a process that only starts TensorFlow and builds the frozen network is subtracted.
Each change is made to a copy of a finished DATA_DIR. In addition, 12 new images among 20,000 small ones are compared
with 12 among 2,000.

    python -m benchmarks.refreshing [--repeats 2]
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import dataset, measure

PIPELINE = measure.ROOT / "pipeline.py"
NEW = 12
START = (
    "from dgmd_pipeline.settings import load; from dgmd_pipeline.training import networks; s = load(); "
    "networks.build_frozen(s.backbone, s.backbone_weights, s.image_height, s.image_width, s.keras_home, True)"
)
LIGHT = {"BACKBONE": "MobileNetV3-Small", "IMAGE_WIDTH": 64, "IMAGE_HEIGHT": 48}
UNTIL_EXTRACT = ("run", "--until", "extract")


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=2).repeats
    raw = dataset.make(measure.WORK / "spice")
    with measure.folder() as scratch:
        claims = [*photographs(raw, Path(scratch), repeats), growth(Path(scratch), repeats)]
    measure.show(*claims)


def photographs(raw: Path, scratch: Path, repeats: int) -> list[measure.Claim]:
    """Compare runs after a change with a first run."""
    start = [cpu("-c", START, **measure.variables()) for _ in range(repeats)]
    first, whole = [], []
    for number in range(repeats):
        data_dir = without_new(raw, scratch / f"first{number}")
        first.append(cpu(PIPELINE, *UNTIL_EXTRACT, **measure.variables(DATA_DIR=data_dir)))
        whole.append(first[-1] + cpu(PIPELINE, "run", **measure.variables(DATA_DIR=data_dir)) - start[number])
    no_start = [0.0] * repeats
    changes: dict[str, tuple[Callable[[Path], object], dict[str, object], list[float]]] = {
        "12 new": (lambda folder: add_new(raw, folder), {}, start),
        "12 deleted": (lambda folder: [file.unlink() for file in some(folder / "raw")], {}, no_start),
        "12 changed": (change, {}, start),
        "VALIDATION_PCNT": (lambda _: None, {"VALIDATION_PCNT": 0.25}, no_start),
        "BALANCE_LIMIT": (lambda _: None, {"BALANCE_LIMIT": 1.3}, no_start),
        "NUM_SHARDS": (lambda _: None, {"NUM_SHARDS": 8}, no_start),
    }
    claims = []
    for what, (prepare, variables, started) in changes.items():
        data, everything = [], []
        for number in range(repeats):
            with tempfile.TemporaryDirectory(dir=scratch) as copy:
                folder = Path(copy, "data")
                shutil.copytree(scratch / f"first{number}", folder, symlinks=True)
                prepare(folder)
                data.append(cpu(PIPELINE, *UNTIL_EXTRACT, **measure.variables(DATA_DIR=folder, **variables)))
                rest = cpu(PIPELINE, "run", **measure.variables(DATA_DIR=folder, **variables)) - started[number]
                everything.append(data[-1] + rest)
        of = measure.median(first, " s")
        for name, goal, ours, theirs in (
            ("inspect, convert and extract", 0.05, subtract(data, started), subtract(first, start)),
            ("whole run", 0.4, everything, whole),
        ):
            figures = f"{measure.median(ours, ' s')} / {measure.median(theirs, ' s')}"
            title = f"{what}: {name}, CPU of the first run's"
            claims.append(measure.Claim(title, measure.ratios(ours, theirs), goal, at_least=False, figures=figures))
        print(f"  {what}: {data} of {of}", file=sys.stderr, flush=True)
    return claims


def growth(scratch: Path, repeats: int) -> measure.Claim:
    """Compare 12 new images among 20,000 with 12 among 2,000."""
    found: dict[int, list[float]] = {2_000: [], 20_000: []}
    for count, seconds in found.items():
        raw = dataset.make(measure.WORK / f"small-{count}", count, dataset.SMALL)
        data_dir = without_new(raw, scratch / f"small{count}")
        variables = measure.variables(DATA_DIR=data_dir, **LIGHT)
        cpu(PIPELINE, *UNTIL_EXTRACT, **variables)
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=scratch) as copy:
                folder = Path(copy, "data")
                shutil.copytree(data_dir, folder, symlinks=True)
                add_new(raw, folder)
                seconds.append(cpu(PIPELINE, *UNTIL_EXTRACT, **variables | {"DATA_DIR": folder}))
    figures = f"{measure.median(found[20_000], ' s')} / {measure.median(found[2_000], ' s')}"
    what = "12 new among 20,000 up to extract, CPU of 12 new among 2,000"
    return measure.Claim(what, measure.ratios(found[20_000], found[2_000]), 1.5, at_least=False, figures=figures)


def some(raw: Path) -> list[Path]:
    """Return 12 files, spread over all labels."""
    files = sorted(path for path in raw.rglob("*") if path.is_file() and path.name != dataset.MADE)
    return files[:: len(files) // NEW][:NEW]


def without_new(raw: Path, data_dir: Path) -> Path:
    """Make a DATA_DIR with all images but 12."""
    new = {path.relative_to(raw) for path in some(raw)}
    for path in raw.rglob("*"):
        if path.is_file() and path.name != dataset.MADE and path.relative_to(raw) not in new:
            put(path, data_dir / "raw" / path.relative_to(raw))
    return data_dir


def add_new(raw: Path, data_dir: Path) -> None:
    for path in some(raw):
        put(path, data_dir / "raw" / path.relative_to(raw))


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source.resolve(), target)  # noqa: PTH211 - thousands of them


def change(data_dir: Path) -> None:
    """Replace 12 files by copies of others with an additional byte, which decoders ignore."""
    for path in some(data_dir / "raw"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content + b"\n")


def subtract(values: list[float], others: list[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def cpu(*words: object, **variables: object) -> float:
    return measure.run(sys.executable, *words, **variables).seconds


if __name__ == "__main__":
    main()
