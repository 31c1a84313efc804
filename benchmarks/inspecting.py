"""Inspecting: compared with SHA-256 and a decode by libjpeg-turbo to at least 64 pixels, in as many processes.

python -m benchmarks.inspecting [--repeats 5]
"""

import hashlib
import io
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks import dataset, measure
from dgmd_pipeline.data import inspection
from dgmd_pipeline.workflow import executors

VARIANTS = (("jpeg", "SHA-256 and simplejpeg's decode", 0.8), ("png", "SHA-256 and Pillow's decode", None))


def decode(paths: list[Path]) -> int:
    import simplejpeg

    for path in paths:
        data = path.read_bytes()
        hashlib.sha256(data).hexdigest()
        if path.suffix == ".jpeg":
            simplejpeg.decode_jpeg(data, min_height=64, min_width=64)
        else:
            Image.open(io.BytesIO(data)).load()
    return len(paths)


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=5).repeats
    raw = dataset.make(measure.WORK / "spice")
    pool = executors.ProcessExecutor()
    map_files = partial(pool.map, chunk=inspection.CHUNK)
    claims = []
    with measure.folder() as scratch:
        for suffix, of, goal in VARIANTS:
            files = [file for file in inspection.find(raw) if file.path.endswith(suffix)]
            pieces = dataset.pieces(raw, files, inspection.CHUNK)

            def ours(files: list = files) -> int:
                usable, _ = inspection.inspect(files, raw, Path(scratch), map_files)
                return len(usable)

            def theirs(pieces: list = pieces) -> int:
                return sum(pool.map(decode, pieces))

            what = f"inspect, {suffix.upper()}"
            claims.append(measure.images_per_second(what, goal, len(files), ours, theirs, of, repeats))
    pool.close()
    measure.show(*claims)


if __name__ == "__main__":
    main()
