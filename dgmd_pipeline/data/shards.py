"""Rows of a split <-> TFRecord shards and their index.

A record is a `tf.train.Example` with five features:

    image          bytes   the image, width x height pixels, as a lossless WebP (see `encoding`)
    label          int64   class index
    width, height  int64   pixels, of the stored image
    key            bytes   path of the source below raw/: the object's key below the bucket's prefix

TensorFlow reads the records without this package: `tf.data.TFRecordDataset`, `tf.io.parse_single_example`,
`tf.io.decode_webp(image, channels=3)[0]`. `index.json` in the same folder names the encoding and the fit.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.data import columns, encoding, limits, record_writing
from dgmd_pipeline.data.record_reuse import NEW, StoredRecords, find_reusable
from dgmd_pipeline.data.record_writing import Piece
from dgmd_pipeline.errors import PipelineError, WorkerDied
from dgmd_pipeline.manifest import INDEX, INDEX_SCHEMA, Example, Fit, Shard, ShardIndex, read_shard_index
from dgmd_pipeline.workflow import files

# Images that a worker encodes in one call. A piece is smaller than a shard, so that ten shards occupy more than ten
# cores and the last pieces end at about the same time.
PIECE_IMAGES = 256


class Written(NamedTuple):
    """What `write` wrote."""

    counts: dict[str, int]  # images, shards, bytes
    new: int  # images that were decoded and encoded; the records of the others were reused
    new_bytes: int  # of their records

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
    map: Callable[[Callable[[Piece], np.ndarray], Sequence[Piece]], Iterable[np.ndarray | WorkerDied]] = map,
    reserve_memory: limits.ReserveMemory = contextlib.nullcontext,
    previous: Iterable[Path] = (),
) -> Written:
    """Write the images of `rows` into `folder`: `<split>-00000-of-00010.tfrecord` ..., `records.npy`, `index.json`.

    The images are read below `raw` and resized to `width` x `height` pixels (`encoding.resize`). A hash of its content
    assigns an image to one of the `shards` shards, so the shards differ in size and may be empty. `previous` are
    finished folders of shards: a shard with equal rows is linked, and the record of an equal image file is copied. The
    bytes depend on the set of rows and on the images only, not on the order of `rows`, the number of processes, or
    `previous`. `map` works like the builtin. It may call its function for the pieces in other processes, and yields the
    results (manifest.RECORD [images of the piece]) in order; for a piece whose process died, a WorkerDied.
    `reserve_memory` is entered with the bytes that an image needs while it is decoded and encoded.
    Raises PipelineError where an image is missing or no longer readable, or needs too much memory or time, OSError
    where `folder` cannot be written.
    """
    ranks, examples = _ordered(rows)
    records = _expected_records(examples)
    shard_of = np.array([rank * shards >> 64 for rank in ranks[:, 0].tolist()], np.int64)
    slices = [slice(*each) for each in pairwise(np.searchsorted(shard_of, np.arange(shards + 1)).tolist())]
    digests = [hashlib.sha256(records["row"][each].tobytes()).hexdigest() for each in slices]
    names = [f"{split}-{number:05d}-of-{shards:05d}.tfrecord" for number in range(shards)]
    stored = StoredRecords(previous, width, height, fit)
    reuse = find_reusable(stored, digests, records["sha256"], shard_of)
    pieces: list[Piece] = []
    for number, rows_of_shard in enumerate(slices):
        path = folder / names[number]
        if number in reuse.shards:
            files.link(reuse.shards[number].path, path, path.with_suffix(".part"))
            records[rows_of_shard] = stored.records[reuse.shards[number].records]
        else:
            given = examples[rows_of_shard], records[rows_of_shard], reuse.positions[rows_of_shard]
            pieces += _pieces(path, *given, stored, raw, (width, height), fit, reserve_memory)
    outcomes = zip(pieces, map(record_writing.write_piece, pieces), strict=True)
    results = ((piece, record_writing.check(piece, outcome)) for piece, outcome in outcomes)
    slice_of = dict(zip(names, slices, strict=True))
    for shard, parts in groupby(results, key=lambda result: result[0].shard):
        records[slice_of[shard.name]] = record_writing.join(shard, parts)
    np.save(folder / manifest.RECORDS, records, allow_pickle=False)
    entries = [_entry(folder / name, each, digest) for name, each, digest in zip(names, slices, digests, strict=True)]
    counts = {"images": len(examples), "shards": shards, "bytes": sum(entry.bytes for entry in entries)}
    _write_index(folder, width, height, fit, counts, entries)
    new = (reuse.positions == NEW) & ~np.isin(shard_of, list(reuse.shards))
    return Written(counts, int(new.sum()), int(records["length"][new].sum()))


def _expected_records(examples: Sequence[Example]) -> np.ndarray:
    """Return the fields of the records that are known before they are written."""
    records = np.zeros(len(examples), manifest.RECORD)
    records["sha256"] = [bytes.fromhex(row.sha256) for row in examples]
    records["label"] = [row.class_index for row in examples]
    texts = (f"{row.sha256} {row.class_index} {row.path}" for row in examples)
    records["row"] = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16] for text in texts]
    return records


def _pieces(
    shard: Path,
    examples: Sequence[Example],
    records: np.ndarray,
    positions: np.ndarray,
    stored: StoredRecords,
    raw: Path,
    size: tuple[int, int],
    fit: Fit,
    reserve_memory: limits.ReserveMemory,
) -> Iterator[Piece]:
    """Divide a shard into pieces of at most PIECE_IMAGES new images. `positions` are those in `stored`, or NEW."""
    new = positions == NEW
    numbers = (np.cumsum(new) - new) // PIECE_IMAGES
    for first, stop in pairwise(np.searchsorted(numbers, np.arange(numbers.max(initial=0) + 2)).tolist()):
        each = slice(first, stop)
        sources = [
            None if position == NEW else stored.shards[stored.shard_of[position]].path
            for position in positions[each].tolist()
        ]
        part = shard if first == 0 else shard.with_suffix(f".part{first}")
        found = stored.records[positions[each]] if len(stored.records) else np.zeros(stop - first, manifest.RECORD)
        yield Piece(raw, shard, part, examples[each], records[each], found, sources, *size, fit, reserve_memory)


def _ordered(rows: Iterable[Example]) -> tuple[np.ndarray, list[Example]]:
    """Return the ranks (`columns.ranks`) in ascending order, and the rows in this order."""
    by_path = sorted(rows, key=attrgetter("path"))
    ranks = columns.ranks("records", (row.sha256.encode() for row in by_path))
    order = columns.order(ranks)
    return ranks[order], [by_path[position] for position in order.tolist()]


def record_order(rows: Iterable[Example]) -> list[Example]:
    """Return the rows in the order of their records, which is also the order of stored features.

    A hash of the content decides, so the labels are mixed. It is independent of the hash that decides the split.
    """
    return _ordered(rows)[1]


def estimate_bytes(images: int, width: int, height: int) -> int:
    """Return the approximate size of the shards of so many photographs: 1.15 bytes a pixel.

    Measured at 256 x 192 pixels: 1.04 and 1.14 bytes a pixel (docs/measurements/records.md). Noise needs up to 3.
    """
    return round(images * width * height * 1.15)


def check(folder: Path, numbers: Iterable[int] | None = None) -> None:
    """Compare the SHA-256 of `records.npy` and of shards with the index; raise PipelineError for the first difference.

    `numbers` are the positions of the shards in the index; None checks all. A file is read once in a run.
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


def _entry(path: Path, records: slice, digest: str) -> Shard:
    return Shard(path.name, records.stop - records.start, path.stat().st_size, files.sha256(path), digest)


def _write_index(
    folder: Path, width: int, height: int, fit: Fit, counts: dict[str, int], shards: Iterable[Shard]
) -> None:
    kind = {"format": encoding.FORMAT, "lossless": True}
    index = {"schema": INDEX_SCHEMA, "encoding": kind, "width": width, "height": height, "fit": fit}
    counted = {**counts, "records_sha256": files.sha256(folder / manifest.RECORDS)}
    text = json.dumps({**index, **counted, "files": [shard._asdict() for shard in shards]}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
