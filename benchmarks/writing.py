"""Writing TFRecords: against libjpeg-turbo's decode alone, at the scale that docs/design.md allows.

That is the smallest of 1, 1/2, 1/4 and 1/8 that leaves at least twice the size of the stored picture, in as many
processes, of the same files. Whatever else writing takes (resizing, encoding, checksums, the disk) has no counterpart.

    python -m benchmarks.writing [--repeats 5]
"""

import argparse
import io
import shutil
import time
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice
from pathlib import Path

from PIL import Image

from benchmarks import measure, pictures
from dgmd_pipeline import images, records, workers
from dgmd_pipeline.manifest import Example, RawFile

WIDTH, HEIGHT = 256, 192


def bare_jpeg(paths: list[Path]) -> int:
    import simplejpeg

    for path in paths:
        data = path.read_bytes()
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or (width >= 2 * WIDTH * f and height >= 2 * HEIGHT * f))
        simplejpeg.decode_jpeg(data, min_height=-(-height // factor), min_width=-(-width // factor))
    return len(paths)


def bare_png(paths: list[Path]) -> int:
    for path in paths:
        Image.open(io.BytesIO(path.read_bytes())).load()
    return len(paths)


def rows_of(files: Iterable[RawFile]) -> list[Example]:
    return [Example(file.path, file.label, 0, sha256(file.path.encode()).hexdigest(), "") for file in files]


def write(raw: Path, scratch: Path, count: int) -> Path:
    """Write the first `count` pictures as records, and return where they are."""
    folder = scratch / "records"
    folder.mkdir()
    pool = workers.Pool()
    records.write(rows_of(islice(images.find(raw), count)), raw, folder, "training", 10, WIDTH, HEIGHT, pool.map)
    pool.close()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    raw = pictures.make(measure.WORK / "spice")
    pool = workers.Pool()
    claims = []
    with measure.folder() as scratch:
        for suffix, bare, goal, against in (
            ("jpeg", bare_jpeg, 0.7, "simplejpeg's decode"),
            ("png", bare_png, None, "Pillow's decode"),
        ):
            files = [file for file in images.find(raw) if file.path.endswith(suffix)]
            rows = rows_of(files)
            paths = [raw / file.path for file in files]
            pieces = [
                paths[start : start + records.PIECE_IMAGES] for start in range(0, len(paths), records.PIECE_IMAGES)
            ]

            def ours(rows: list = rows) -> float:
                folder = Path(scratch, "records")
                folder.mkdir()
                start = time.perf_counter()
                assert records.write(rows, raw, folder, "training", 10, WIDTH, HEIGHT, pool.map)["images"] == len(rows)
                seconds = time.perf_counter() - start
                shutil.rmtree(folder)
                return len(rows) / seconds

            def theirs(bare=bare, pieces: list = pieces, count: int = len(files)) -> float:
                start = time.perf_counter()
                assert sum(pool.map(bare, pieces)) == count
                return count / (time.perf_counter() - start)

            ours(), theirs()  # processes start, files come into memory
            found = measure.in_turns(repeats, ours=ours, theirs=theirs)
            figures = f"{measure.median(found['ours'])} images/s / {measure.median(found['theirs'])} of {against}"
            speed = measure.ratios(found["ours"], found["theirs"])
            claims.append(measure.Claim(f"write TFRecords, {suffix.upper()}", speed, goal, figures=figures))
    pool.close()
    measure.show(*claims)


if __name__ == "__main__":
    main()
