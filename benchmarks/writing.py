"""Writing TFRecords: against a full decode alone, in as many processes, of the same files.

JPEGs are decoded by libjpeg-turbo without Pillow's copies. Whatever else writing takes (resizing, encoding, checksums,
the disk) has no counterpart.

    python -m benchmarks.writing [--repeats 11]
"""

import io
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice
from pathlib import Path

from PIL import Image

from benchmarks import measure, pictures
from dgmd_pipeline.data import inspection, shards
from dgmd_pipeline.manifest import Example, RawFile
from dgmd_pipeline.workflow import executors

WIDTH, HEIGHT = 256, 192
WAYS = (("jpeg", "simplejpeg's decode", None), ("png", "Pillow's decode", None))


def bare(paths: list[Path]) -> int:
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
    """Write the first `count` pictures as records, and return where they are."""
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
    raw = pictures.make(measure.WORK / "spice")
    pool = executors.ProcessExecutor()
    claims = []
    with measure.folder() as scratch:
        for suffix, of, goal in WAYS:
            files = [file for file in inspection.find(raw) if file.path.endswith(suffix)]
            rows, pieces = rows_of(files), pictures.pieces(raw, files, shards.PIECE_IMAGES)

            def ours(rows: list = rows) -> int:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                return shards.write(rows, raw, folder, "training", 10, WIDTH, HEIGHT, "stretch", pool.map)["images"]

            def theirs(pieces: list = pieces) -> int:
                return sum(pool.map(bare, pieces))

            what = f"write TFRecords, {suffix.upper()}"
            claims.append(measure.images_per_second(what, goal, len(files), ours, theirs, of, repeats))
    pool.close()
    measure.show(*claims)


if __name__ == "__main__":
    main()
