"""Writing TFRecords: compared with a full decode of the same files, in as many processes.

The baseline decodes JPEGs with libjpeg-turbo, without Pillow's copies. It does not resize, encode, compute checksums or
write.

    python -m benchmarks.writing [--repeats 11]
"""

import io
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice
from pathlib import Path

from PIL import Image

from benchmarks import dataset, measure
from dgmd_pipeline.data import inspection, shards
from dgmd_pipeline.manifest import Example, RawFile
from dgmd_pipeline.workflow import executors

WIDTH, HEIGHT = 256, 192
VARIANTS = (("jpeg", "simplejpeg's decode", None), ("png", "Pillow's decode", None))


def decode(paths: list[Path]) -> int:
    import simplejpeg

    for path in paths:
        data = path.read_bytes()
        if path.suffix == ".jpeg":
            simplejpeg.decode_jpeg(data)
        else:
            Image.open(io.BytesIO(data)).load()
    return len(paths)


def rows_of(files: Iterable[RawFile]) -> list[Example]:
    return [Example(file.path, file.label, 0, sha256(file.path.encode()).hexdigest(), "") for file in files]


def write(raw: Path, scratch: Path, count: int) -> Path:
    """Write the first `count` images as records and return their folder."""
    folder = scratch / "records"
    folder.mkdir()
    pool = executors.ProcessExecutor()
    shards.write(
        rows_of(islice(inspection.find(raw), count)), raw, folder, "training", 10, WIDTH, HEIGHT, "stretch", pool.map
    )
    pool.close()
    return folder


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=11).repeats
    raw = dataset.make(measure.WORK / "spice")
    pool = executors.ProcessExecutor()
    claims = []
    with measure.folder() as scratch:
        for suffix, of, goal in VARIANTS:
            files = [file for file in inspection.find(raw) if file.path.endswith(suffix)]
            rows, pieces = rows_of(files), dataset.pieces(raw, files, shards.PIECE_IMAGES)

            def ours(rows: list = rows) -> int:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                return shards.write(rows, raw, folder, "training", 10, WIDTH, HEIGHT, "stretch", pool.map).counts[
                    "images"
                ]

            def theirs(pieces: list = pieces) -> int:
                return sum(pool.map(decode, pieces))

            what = f"write TFRecords, {suffix.upper()}"
            claims.append(measure.images_per_second(what, goal, len(files), ours, theirs, of, repeats))
    pool.close()
    measure.show(*claims)


if __name__ == "__main__":
    main()
