"""A row with a side <-> a TFRecord: writing and reading stand side by side and share one schema.

A record is a `tf.train.Example` with five features:

    image          bytes   the image, width x height pixels, as a lossless WebP (see `encoding`)
    label          int64   class index
    width, height  int64   pixels, of the stored picture
    key            bytes   the source's path below raw/, that is the object's key below the bucket's prefix

TensorFlow reads them without this package: `tf.data.TFRecordDataset`, `tf.io.parse_single_example`,
`tf.io.decode_webp(image, channels=3)[0]`. `index.json` beside them names the encoding and the fit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dgmd_pipeline.data import encoding, tfrecord
from dgmd_pipeline.data.decoding import DAMAGED
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import INDEX, INDEX_SCHEMA, Example, Fit, Shard, read_shard_index

PIECE_IMAGES = (
    256  # smaller than a shard may be: ten shards keep more than ten cores busy, and the last ones end together
)


class _Piece(NamedTuple):
    """What a worker needs to write a part of a shard."""

    raw: Path
    shard: Path  # that the part will belong to
    part: Path  # to write; the first one becomes the shard
    rows: list[Example]
    width: int
    height: int
    fit: Fit


def write(
    rows: Iterable[Example],
    raw: Path,
    folder: Path,
    side: str,
    shards: int,
    width: int,
    height: int,
    fit: Fit,
    map: Callable[[Callable[[_Piece], int], Iterable[_Piece]], Iterable[int]] = map,
) -> dict[str, int]:
    """Write the pictures of `rows` into `folder`: `<side>-00000-of-00010.tfrecord` ... and `index.json`.

    Images are read below `raw` and fitted to `width` x `height` pixels (`encoding.fitted`). There are `shards` shards,
    or as many as images if those are fewer. The bytes depend on the set of rows and the images alone: not on the order
    of `rows` or how many processes work. `map` is like the builtin one; it may call the function for its pieces in
    other processes, and yields in order what comes back, numbers of images.
    Returns the counts: images, shards, bytes. Raises PipelineError where a picture is gone or no longer readable,
    OSError where `folder` cannot be written.
    """
    ordered = record_order(rows)
    shards = min(shards, len(ordered))
    pieces = []
    for number in range(shards):
        start, stop = (len(ordered) * edge // shards for edge in (number, number + 1))
        shard = folder / f"{side}-{number:05d}-of-{shards:05d}.tfrecord"
        for first in range(start, stop, PIECE_IMAGES):
            chosen = ordered[first : min(first + PIECE_IMAGES, stop)]
            part = shard if first == start else shard.with_suffix(f".part{first - start}")
            pieces.append(_Piece(raw, shard, part, chosen, width, height, fit))
    written: list[Shard] = []
    done = zip(pieces, map(_write_piece, pieces), strict=True)
    for shard, parts in groupby(done, key=lambda each: each[0].shard):
        images = 0
        for piece, count in parts:
            images += count
            if piece.part != shard:
                with piece.part.open("rb") as source, shard.open("ab") as file:
                    shutil.copyfileobj(source, file)
                piece.part.unlink()
        written.append(Shard(shard.name, images, shard.stat().st_size, _digest(shard)))
    counts = {"images": len(ordered), "shards": shards, "bytes": sum(each.bytes for each in written)}
    kind = {"format": encoding.FORMAT, "lossless": True}
    index = {"schema": INDEX_SCHEMA, "encoding": kind, "width": width, "height": height, "fit": fit}
    text = json.dumps({**index, **counts, "files": [each._asdict() for each in written]}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return counts


def record_order(rows: Iterable[Example]) -> list[Example]:
    """Return the rows in the order of their records, which is that of `read` without a seed and of stored features.

    It mixes labels: it is that of a hash that says nothing about the label, nor about the split, which another hash
    decided.
    """
    return sorted(rows, key=lambda row: (hashlib.sha256(f"records {row.sha256}".encode()).digest(), row.path))


def estimate_bytes(images: int, width: int, height: int) -> int:
    """Return about how many bytes so many photographs take, 1.15 for each pixel.

    Measured at 256 x 192: 1.04 and 1.14 for each pixel (docs/measurements/records.md). Noise needs up to 3.
    """
    return round(images * width * height * 1.15)


def check(folder: Path) -> None:
    """Compare every shard's size and SHA-256 with the index; raise PipelineError naming the first that differs."""

    def problem(shard: Shard) -> str | None:
        path = folder / shard.file
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != shard.bytes:
            return f"{path} has {size:,} bytes where {INDEX} says {shard.bytes:,}"
        if _digest(path) != shard.sha256:
            return f"{path} does not have the checksum (SHA-256) that {INDEX} says"
        return None

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for found in pool.map(problem, read_shard_index(folder).shards):
            if found:
                raise PipelineError(
                    f"{found}: it was changed or damaged after it was written. "
                    f"Delete the folder {folder} and run again."
                )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_piece(piece: _Piece) -> int:
    with piece.part.open("wb") as file:
        for row in piece.rows:
            features: dict[str, bytes | int] = {
                "image": _encode(piece.raw / row.path, piece.width, piece.height, piece.fit),
                "label": row.class_index,
                "width": piece.width,
                "height": piece.height,
                "key": row.path.encode("utf-8", "surrogateescape"),
            }
            file.write(tfrecord.frame(tfrecord.serialize_example(features)))
    return len(piece.rows)


def _encode(path: Path, width: int, height: int, fit: Fit) -> bytes:
    try:
        return encoding.encode(path, width, height, fit)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise PipelineError(
            f"{path} was a readable picture when it was inspected and is not any more "
            f"({type(error).__name__}: {error}). Put it back (a downloaded one by deleting "
            "the folder raw), or, where pictures were put there by hand, delete the folder inspected; and run again."
        ) from error
