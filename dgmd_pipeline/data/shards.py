"""Writes and checks the TFRecord shards of a split, and the index of the shards.

A record is a `tf.train.Example` with five features:

    image          bytes   the image, width x height pixels, as a lossless WebP (see `encoding`)
    label          int64   class index
    width, height  int64   pixels, of the stored image
    key            bytes   path of the image file below raw/ (the object's key without the bucket's prefix)

TensorFlow reads the records without this package: `tf.data.TFRecordDataset`, `tf.io.parse_single_example`,
`tf.io.decode_webp(image, channels=3)[0]`. `index.json` in the same folder names the encoding and the fit.
"""

import contextlib
import hashlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.data import limits, record_writing
from dgmd_pipeline.data.columns import Examples
from dgmd_pipeline.data.record_reuse import NEW, StoredRecords, find_reusable
from dgmd_pipeline.data.record_writing import SHARD, Piece
from dgmd_pipeline.errors import PipelineError, WorkerDied
from dgmd_pipeline.manifest import INDEX, Example, Fit, Shard, ShardIndex, read_shard_index
from dgmd_pipeline.workflow import files

# Images that a worker encodes in one call, as a piece of a shard. Pieces are smaller than shards, so that ten shards
# occupy more than ten cores, the last pieces end at about the same time, and a run that is stopped loses little.
PIECE_IMAGES = 256
LARGE_SHARD = 1_000_000_000  # bytes; if a shard is larger, `suggest_shards` suggests more shards
# Mean size, in bytes, of the shards that `suggest_shards` suggests. TensorFlow recommends "at least 10 MB+ and ideally
# 100 MB+". Source: tensorflow.org/tutorials/load_data/tfrecord
SHARD_BYTES = 200_000_000


class Written(NamedTuple):
    """What `write` wrote."""

    counts: dict[str, int]  # images, shards, bytes
    new: int  # images that were decoded and encoded; the records of the others were reused
    new_bytes: int  # size of the records of the new images

    @property
    def summary(self) -> str:
        """The result as a line for the log."""
        images = formatting.describe_reuse(self.counts["images"], "images", self.new)
        return f"{images} in {self.counts['shards']:,} shards, {self.counts['bytes'] / 1e6:,.1f} MB"


def write(
    rows: Iterable[Example],
    raw: Path,
    folder: Path,
    split: str,
    shards: int,
    width: int,
    height: int,
    fit: Fit,
    map: Callable[[Callable[[Piece], int], Sequence[Piece]], Iterable[int | WorkerDied]] = map,
    reserve_memory: limits.ReserveMemory = contextlib.nullcontext,
    previous: Iterable[Path] = (),
    pieces: Path | None = None,
) -> Written:
    """Write the images of `rows` into `folder`: `<split>-00000-of-00010.tfrecord` ..., `records.npy`, `index.json`.

    The images are read below `raw` and resized to `width` x `height` pixels (`encoding.resize`). A hash of the content
    assigns each image to one of the `shards` shards, so the shards differ in size and may be empty. The bytes do not
    depend on the order of `rows`, the number of processes, or `previous`.

    - `map` works like the builtin. It may call its function in other processes or on other machines. It yields the
      results (the numbers of images) in order, and a WorkerDied for a piece whose process died.
    - `reserve_memory` is entered with the number of bytes that an image needs while it is decoded and encoded.
    - `previous` are finished folders of shards. A stored shard with the same rows as a new shard is linked into
      `folder`. For the other new shards, images that are stored in `previous` are copied, and not encoded again.
    - `pieces` is the folder for the finished pieces, which are folders themselves. The pieces remain there. If this
      run is stopped, the next run can use them as `previous`. Without `pieces`, the finished pieces are removed.

    Raises PipelineError if an image is missing or no longer readable, or needs too much memory or time. Raises OSError
    if `folder` cannot be written.
    """
    ranks, examples = _ordered(rows)
    records = np.fromiter((_expected_record(row) for row in examples), manifest.RECORD, len(examples))
    shard_of = np.array([rank * shards >> 64 for rank in ranks[:, 0].tolist()], np.int64)
    slices = [slice(*each) for each in pairwise(np.searchsorted(shard_of, np.arange(shards + 1)).tolist())]
    stored = StoredRecords(previous, width, height, fit)
    rows_of_shards = [record_writing.rows_digest(records[each]) for each in slices]
    reuse = find_reusable(stored, rows_of_shards, records["sha256"], shard_of)
    names = [f"{split}-{number:05d}-of-{shards:05d}.tfrecord" for number in range(shards)]
    make = partial(Piece, raw=raw, width=width, height=height, fit=fit, reserve_memory=reserve_memory)
    with contextlib.nullcontext(pieces) if pieces else tempfile.TemporaryDirectory(dir=folder) as place:
        start = Path(place, uuid.uuid4().hex[:8])  # start of the names of pieces, different in each run
        todo: list[Piece] = []
        for number in sorted({*range(shards)} - {*reuse.shards}):
            each = slices[number]
            todo += _pieces(make, start, number, examples[each], records[each], reuse.positions[each], stored)
        outcomes = zip(todo, map(record_writing.write_piece, todo), strict=True)
        for number, parts in groupby(outcomes, key=lambda outcome: outcome[0].shard):
            finished = [record_writing.check(*part) for part in parts]
            found = record_writing.join(_place(start, number), finished, width, height, fit)
            records[slices[number]] = manifest.read_records(found)
            _link(found / SHARD, folder / names[number])
    for number, shard in reuse.shards.items():
        records[slices[number]] = stored.records[shard.records]
        _link(shard.path, folder / names[number])
    counts = record_writing.write_index(folder, records, dict(zip(names, slices, strict=True)), width, height, fit)
    new = (reuse.positions == NEW) & ~np.isin(shard_of, list(reuse.shards))
    return Written(counts, int(new.sum()), int(records["length"][new].sum()))


def _place(start: Path, *numbers: int) -> Path:
    """Return the folder of a shard or, with two numbers, of a part of a shard."""
    return start.with_name("-".join([start.name, *(f"{number:05d}" for number in numbers)]))


def _link(source: Path, target: Path) -> None:
    files.link(source, target, target.with_suffix(".part"))


def _expected_record(row: Example) -> tuple[bytes | int, ...]:
    """Return a `manifest.RECORD` with the fields that are known before it is written."""
    text = f"{row.sha256} {row.class_index} {row.path}"
    row_hash = hashlib.sha256(manifest.encode(text)).digest()[:16]
    return bytes.fromhex(row.sha256), row_hash, row.class_index, 0, 0, 0, 0


def _pieces(
    make: Callable[..., Piece],
    start: Path,
    shard: int,
    examples: Examples,
    records: np.ndarray,
    positions: np.ndarray,
    stored: StoredRecords,
) -> Iterator[Piece]:
    """Divide a shard into pieces of at most PIECE_IMAGES new images. `positions` are positions in `stored`, or NEW."""
    new = positions == NEW
    numbers = (np.cumsum(new) - new) // PIECE_IMAGES
    edges = pairwise(np.searchsorted(numbers, np.arange(numbers.max(initial=0) + 2)).tolist())
    for part, (first, stop) in enumerate(edges):
        each = slice(first, stop)
        sources = [
            None if position == NEW else stored.shards[stored.shard_of[position]].path
            for position in positions[each].tolist()
        ]
        found = stored.records[positions[each]] if len(stored.records) else np.zeros(stop - first, manifest.RECORD)
        yield make(_place(start, shard, part), shard, examples[each], records[each], found, sources)


def record_order(rows: Iterable[Example]) -> Examples:
    """Return the rows in the order of their records, which is also the order of stored features.

    A hash of the content determines the order, so the labels are mixed. This hash is independent of the hash that
    determines the split.
    """
    return _ordered(rows)[1]


def _ordered(rows: Iterable[Example]) -> tuple[np.ndarray, Examples]:
    """Return the ranks (`columns.ranks`) in ascending order, and the rows in this order."""
    examples = Examples.of(rows)
    return examples.sort("records"), examples


def estimate_bytes(images: int, width: int, height: int) -> int:
    """Return the approximate size of the shards of `images` photographs: 1.15 bytes a pixel.

    Measured at 256 x 192 pixels: 1.04 and 1.14 bytes a pixel (docs/measurements/records.md). Images of noise need up to
    3 bytes a pixel.
    """
    return round(images * width * height * 1.15)


def suggest_shards(sizes: Sequence[int]) -> int | None:
    """If a shard exceeds LARGE_SHARD, return how many shards of SHARD_BYTES would hold the same data.

    Otherwise, return None.
    """
    return round(sum(sizes) / SHARD_BYTES) if max(sizes) > LARGE_SHARD else None


def check(folder: Path, numbers: Iterable[int] | None = None) -> None:
    """Compare the SHA-256 of `records.npy` and of shards with the index; raise PipelineError for the first difference.

    `numbers` are the positions of the shards in the index; None checks all shards. `files.sha256` caches the hashes,
    so a later call in the same process does not read unchanged files again.
    """

    def find_problem(shard: Shard) -> str | None:
        path = folder / shard.file
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != shard.bytes:
            return f"{path} has {size:,} bytes, expected {shard.bytes:,} according to {INDEX}"
        intact = files.is_intact(path, shard.bytes, shard.sha256)
        return None if intact else f"{path} does not have the checksum (SHA-256) in {INDEX}"

    index = read_shard_index(folder)
    chosen = index.shards if numbers is None else [index.shards[number] for number in numbers]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for problem in (_find_problem_of_records(folder, index), *pool.map(find_problem, chosen)):
            if problem:
                raise PipelineError(
                    f"{problem}: it was changed or damaged after it was written. "
                    f"Delete the folder {folder} and run again."
                )


def _find_problem_of_records(folder: Path, index: ShardIndex) -> str | None:
    path = folder / manifest.RECORDS
    if not path.is_file():
        return f"{path} is missing"
    return None if files.sha256(path) == index.records_sha256 else f"{path} does not have the checksum in {INDEX}"
