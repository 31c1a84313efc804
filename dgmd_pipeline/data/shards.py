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
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dgmd_pipeline.data import encoding, limits, tfrecord
from dgmd_pipeline.data.decoding import DAMAGED, describe
from dgmd_pipeline.errors import PipelineError, TooLittleMemory, WorkerDied
from dgmd_pipeline.manifest import INDEX, INDEX_SCHEMA, Example, Fit, Shard, read_shard_index

# Images that a worker writes in one call. A piece is smaller than a shard, so that ten shards occupy more than ten
# cores and the last pieces end at about the same time.
PIECE_IMAGES = 256
_EXCLUDE = (
    "Raise the memory limit of the pipeline, or exclude the image with a row in corrections.csv (docs/operating.md). "
    "Then run again."
)


class _Piece(NamedTuple):
    """A part of a shard, for a worker to write."""

    raw: Path
    shard: Path
    part: Path  # the file to write; the shard itself for the first part
    rows: Sequence[Example]
    width: int
    height: int
    fit: Fit
    reserve_memory: limits.ReserveMemory


def write(
    rows: Iterable[Example],
    raw: Path,
    folder: Path,
    split: str,
    shards: int,
    width: int,
    height: int,
    fit: Fit,
    map: Callable[[Callable[[_Piece], int], Iterable[_Piece]], Iterable[int | WorkerDied]] = map,
    reserve_memory: limits.ReserveMemory = contextlib.nullcontext,
) -> dict[str, int]:
    """Write the images of `rows` into `folder`: `<split>-00000-of-00010.tfrecord` ... and `index.json`.

    The images are read below `raw` and resized to `width` x `height` pixels (`encoding.resize`). There are `shards`
    shards, or as many as images if those are fewer. The bytes depend on the set of rows and on the images only, not on
    the order of `rows` or the number of processes. `map` works like the builtin. It may call its function for the
    pieces in other processes, and yields the results (numbers of images) in order; for a piece whose process died, a
    WorkerDied. `reserve_memory` is entered with the bytes that an image needs while it is decoded and encoded.
    Returns the counts: images, shards, bytes. Raises PipelineError where an image is missing or no longer readable, or
    needs too much memory or time, OSError where `folder` cannot be written.
    """
    ordered = record_order(rows)
    shards = min(shards, len(ordered))
    pieces = []
    for number in range(shards):
        start, stop = (len(ordered) * edge // shards for edge in (number, number + 1))
        shard = folder / f"{split}-{number:05d}-of-{shards:05d}.tfrecord"
        for first in range(start, stop, PIECE_IMAGES):
            part = shard if first == start else shard.with_suffix(f".part{first - start}")
            piece_rows = ordered[first : min(first + PIECE_IMAGES, stop)]
            pieces.append(_Piece(raw, shard, part, piece_rows, width, height, fit, reserve_memory))
    results = ((piece, _count(piece, done)) for piece, done in zip(pieces, map(_write_piece, pieces), strict=True))
    written = [_join(shard, parts) for shard, parts in groupby(results, key=lambda result: result[0].shard)]
    counts = {"images": len(ordered), "shards": shards, "bytes": sum(shard.bytes for shard in written)}
    _write_index(folder, width, height, fit, counts, written)
    return counts


def record_order(rows: Iterable[Example]) -> list[Example]:
    """Return the rows in the order of their records, which is also the order of stored features.

    A hash of the content decides, so the labels are mixed. It is independent of the hash that decides the split.
    """
    return sorted(rows, key=lambda row: (hashlib.sha256(f"records {row.sha256}".encode()).digest(), row.path))


def estimate_bytes(images: int, width: int, height: int) -> int:
    """Return the approximate size of the shards of so many photographs: 1.15 bytes a pixel.

    Measured at 256 x 192 pixels: 1.04 and 1.14 bytes a pixel (docs/measurements/records.md). Noise needs up to 3.
    """
    return round(images * width * height * 1.15)


def check(folder: Path) -> None:
    """Compare the size and the SHA-256 of every shard with the index; raise PipelineError for the first difference."""

    def find_problem(shard: Shard) -> str | None:
        path = folder / shard.file
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != shard.bytes:
            return f"{path} has {size:,} bytes, expected {shard.bytes:,} according to {INDEX}"
        if _digest(path) != shard.sha256:
            return f"{path} does not have the checksum (SHA-256) in {INDEX}"
        return None

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for problem in pool.map(find_problem, read_shard_index(folder).shards):
            if problem:
                raise PipelineError(
                    f"{problem}: it was changed or damaged after it was written. "
                    f"Delete the folder {folder} and run again."
                )


def _write_piece(piece: _Piece) -> int:
    with piece.part.open("wb") as file:
        for row in piece.rows:
            features: dict[str, bytes | int] = {
                "image": _encode(piece, row),
                "label": row.class_index,
                "width": piece.width,
                "height": piece.height,
                "key": row.path.encode("utf-8", "surrogateescape"),
            }
            file.write(tfrecord.frame(tfrecord.serialize_example(features)))
            file.flush()  # if the process dies, `_count` sees at which image
    return len(piece.rows)


def _count(piece: _Piece, done: int | WorkerDied) -> int:
    """Return the number of images in a piece. Raises PipelineError with the file at which the process died."""
    if isinstance(done, WorkerDied):
        written = tfrecord.count(piece.part) if piece.part.exists() else 0
        path = piece.raw / piece.rows[min(written, len(piece.rows) - 1)].path
        raise PipelineError(f"{path} cannot be converted: {limits.explain(done)}. {_EXCLUDE}")
    return done


def _encode(piece: _Piece, row: Example) -> bytes:
    path = piece.raw / row.path
    try:
        return encoding.encode(path, piece.width, piece.height, piece.fit, piece.reserve_memory)
    except TooLittleMemory as error:
        raise PipelineError(f"{path} cannot be converted: it {error}. {_EXCLUDE}") from None
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise PipelineError(
            f"{path} was readable when it was inspected, and is not any more ({describe(error)}). "
            "Restore the file (if it was downloaded, delete the folder raw) and run again. Or accept the change: run "
            "with --force inspect."
        ) from error


def _join(shard: Path, parts: Iterable[tuple[_Piece, int]]) -> Shard:
    """Append the parts of a shard (pieces and their numbers of images) to the first one."""
    images = 0
    for piece, count in parts:
        images += count
        if piece.part != shard:
            with piece.part.open("rb") as source, shard.open("ab") as file:
                shutil.copyfileobj(source, file)
            piece.part.unlink()
    return Shard(shard.name, images, shard.stat().st_size, _digest(shard))


def _write_index(
    folder: Path, width: int, height: int, fit: Fit, counts: dict[str, int], shards: Iterable[Shard]
) -> None:
    kind = {"format": encoding.FORMAT, "lossless": True}
    index = {"schema": INDEX_SCHEMA, "encoding": kind, "width": width, "height": height, "fit": fit}
    text = json.dumps({**index, **counts, "files": [shard._asdict() for shard in shards]}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
