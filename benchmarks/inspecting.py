"""Inspecting: against SHA-256 and libjpeg-turbo's decode to a shortest side of at least 64, in as many processes.

python -m benchmarks.inspecting [--repeats 5]
"""

import argparse
import hashlib
import io
import time
from pathlib import Path

from PIL import Image

from benchmarks import measure, pictures
from dgmd_pipeline import images, workers

PIECE = images.PIECE


def bare_jpeg(paths: list[Path]) -> int:
    import simplejpeg

    for path in paths:
        data = path.read_bytes()
        hashlib.sha256(data).hexdigest()
        simplejpeg.decode_jpeg(data, min_height=64, min_width=64)
    return len(paths)


def bare_png(paths: list[Path]) -> int:
    for path in paths:
        data = path.read_bytes()
        hashlib.sha256(data).hexdigest()
        Image.open(io.BytesIO(data)).load()
    return len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    raw = pictures.make(measure.WORK / "spice")
    pool = workers.Pool()
    claims = []
    with measure.folder() as scratch:
        for suffix, bare, goal, against in (
            ("jpeg", bare_jpeg, 0.8, "SHA-256 and simplejpeg's decode"),
            ("png", bare_png, None, "SHA-256 and Pillow's decode"),
        ):
            files = [file for file in images.find(raw) if file.path.endswith(suffix)]
            paths = [raw / file.path for file in files]
            pieces = [paths[start : start + PIECE] for start in range(0, len(paths), PIECE)]

            def ours(files: list = files) -> float:
                start = time.perf_counter()
                usable, rejected = images.inspect(files, raw, Path(scratch), pool.map)
                assert len(usable) == len(files) and not rejected
                return len(files) / (time.perf_counter() - start)

            def theirs(bare=bare, pieces: list = pieces, count: int = len(files)) -> float:
                start = time.perf_counter()
                assert sum(pool.map(bare, pieces)) == count
                return count / (time.perf_counter() - start)

            ours(), theirs()  # processes start, files come into memory
            found = measure.in_turns(repeats, ours=ours, theirs=theirs)
            figures = f"{measure.median(found['ours'])} images/s / {measure.median(found['theirs'])} of {against}"
            speed = measure.ratios(found["ours"], found["theirs"])
            claims.append(measure.Claim(f"inspect, {suffix.upper()}", speed, goal, figures=figures))
    pool.close()
    measure.show(*claims)


if __name__ == "__main__":
    main()
