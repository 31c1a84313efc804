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
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
from PIL import Image

from dgmd_pipeline import encoding
from dgmd_pipeline.encoding import Fit
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.images import DAMAGED
from dgmd_pipeline.manifest import Example

if TYPE_CHECKING:
    import tensorflow as tf

INDEX = "index.json"
SCHEMA = 2  # of the records and their index; raised when either changes
PIECE_IMAGES = (
    256  # smaller than a shard may be: ten shards keep more than ten cores busy, and the last ones end together
)
SHARDS_AT_ONCE = 16  # read side by side in shuffled reading; fixed, so that the order is the same on every machine
SHUFFLE_BYTES = 128 * 2**20  # encoded pictures held for shuffling; stored order mixes labels already


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
    ordered = order(rows)
    shards = min(shards, len(ordered))
    pieces = []
    for number in range(shards):
        start, stop = (len(ordered) * edge // shards for edge in (number, number + 1))
        shard = folder / f"{side}-{number:05d}-of-{shards:05d}.tfrecord"
        for first in range(start, stop, PIECE_IMAGES):
            chosen = ordered[first : min(first + PIECE_IMAGES, stop)]
            part = shard if first == start else shard.with_suffix(f".part{first - start}")
            pieces.append(_Piece(raw, shard, part, chosen, width, height, fit))
    entries: list[dict[str, Any]] = []
    done = zip(pieces, map(_write_piece, pieces), strict=True)
    for shard, parts in groupby(done, key=lambda each: each[0].shard):
        images = 0
        for piece, count in parts:
            images += count
            if piece.part != shard:
                with piece.part.open("rb") as source, shard.open("ab") as file:
                    shutil.copyfileobj(source, file)
                piece.part.unlink()
        size, digest = shard.stat().st_size, _digest(shard)
        entries.append({"file": shard.name, "records": images, "bytes": size, "sha256": digest})
    counts = {"images": len(ordered), "shards": shards, "bytes": sum(entry["bytes"] for entry in entries)}
    kind = {"format": encoding.FORMAT, "lossless": True}
    index = {"schema": SCHEMA, "encoding": kind, "width": width, "height": height, "fit": fit}
    text = json.dumps({**index, **counts, "files": entries}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return counts


def order(rows: Iterable[Example]) -> list[Example]:
    """Return the rows in the order of their records, which is that of `read` without a seed and of stored features.

    It mixes labels: it is that of a hash that says nothing about the label, nor about the split, which another hash
    decided.
    """
    return sorted(rows, key=lambda row: (hashlib.sha256(f"records {row.sha256}".encode()).digest(), row.path))


def bytes_of(images: int, width: int, height: int) -> int:
    """Return about how many bytes so many photographs take, 1.15 for each pixel.

    Measured at 256 x 192: 1.04 and 1.14 for each pixel (docs/measurements/records.md). Noise needs up to 3.
    """
    return round(images * width * height * 1.15)


def read(folder: Path, seed: int | None = None, epoch: int = 0, chosen: np.ndarray | None = None) -> "tf.data.Dataset":
    """Open what `write` wrote: a dataset of (picture uint8 [height, width, 3], label int64 []), every image once.

    Without `seed` the order is that of the files, always, and of `keys`. With it the shards and the records in them are
    shuffled: in the same order whenever it is read, in this process or another, and in another one for another `epoch`
    or seed (TensorFlow adds the seed that is set globally). Pictures are decoded in parallel; the caller batches.
    `chosen` (bool [images], in the order of the files) says which images to read, all where it is None.
    Raises PipelineError where there is no readable index; a damaged record is TensorFlow's DataLossError.
    """
    import tensorflow as tf

    index = _index(folder)
    shape = (index["height"], index["width"], 3)
    schema = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}

    def decode(record: Any) -> tuple[Any, Any]:
        features = tf.io.parse_single_example(record, schema)
        picture = tf.io.decode_webp(features["image"], channels=3)[0]  # of the frames that it might have
        return tf.ensure_shape(picture, shape), features["label"]

    random = None if seed is None else np.random.default_rng((seed, epoch))
    records = _records(folder, index, random, chosen).map(
        decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    options = tf.data.Options()
    # Its thread sleeps for 10 ms, then twice as long each time, and the end of the data waits until it wakes up: every
    # other pass over them took up to 10 s longer. What it tunes, the number of threads, is all cores without it.
    options.autotune.enabled = False
    count = index["images"] if chosen is None else int(chosen.sum())
    return records.apply(tf.data.experimental.assert_cardinality(count)).with_options(options)


def size(folder: Path) -> tuple[int, int]:
    """Return the height and width of the images in pixels."""
    index = _index(folder)
    return index["height"], index["width"]


def fit(folder: Path) -> Fit:
    """Return how the images were fitted to their size."""
    return _index(folder)["fit"]


def keys(folder: Path) -> list[str]:
    """Return the path below raw/ of each record, in the order in which `read` without a seed gives the pictures."""
    import tensorflow as tf

    schema = {"key": tf.io.FixedLenFeature([], tf.string)}
    records = _records(folder, _index(folder), None).batch(1024)
    batches = records.map(lambda batch: tf.io.parse_example(batch, schema)["key"]).as_numpy_iterator()
    return [key.decode("utf-8", "surrogateescape") for batch in batches for key in batch]


def check(folder: Path) -> None:
    """Compare every shard's size and SHA-256 with the index; raise PipelineError naming the first that differs."""

    def problem(entry: dict[str, Any]) -> str | None:
        path = folder / entry["file"]
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{path} has {size:,} bytes where {INDEX} says {entry['bytes']:,}"
        if _digest(path) != entry["sha256"]:
            return f"{path} does not have the checksum (SHA-256) that {INDEX} says"
        return None

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for found in pool.map(problem, _index(folder)["files"]):
            if found:
                raise PipelineError(
                    f"{found}: it was changed or damaged after it was written. "
                    f"Delete the folder {folder} and run again."
                )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(
    folder: Path, index: dict[str, Any], random: np.random.Generator | None, chosen: np.ndarray | None = None
) -> "tf.data.Dataset":
    import tensorflow as tf

    def opened(path: Any, first: Any) -> "tf.data.Dataset":
        """Open a file whose first record has the position `first` among all."""
        records = tf.data.TFRecordDataset(path)
        if chosen is None:
            return records
        numbered = records.enumerate(first).filter(lambda position, _: tf.gather(chosen, position))
        return numbered.map(lambda _, record: record)

    entries = index["files"]
    firsts = np.cumsum([0, *(entry["records"] for entry in entries)])
    order = np.arange(len(entries))
    if random is not None:
        random.shuffle(order)
    paths = [str(folder / entries[number]["file"]) for number in order]
    files = tf.data.Dataset.from_tensor_slices((tf.constant(paths, tf.string), firsts[order]))
    if random is None:
        return files.flat_map(opened)
    buffer = SHUFFLE_BYTES * index["images"] // max(index["bytes"], 1)
    # Without the last argument each reading of the same dataset has another order.
    return files.interleave(opened, SHARDS_AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).shuffle(
        max(min(buffer, index["images"]), 1), seed=int(random.integers(2**63)), reshuffle_each_iteration=False
    )


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        schema = index["schema"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        raise PipelineError(
            f"{path} is missing or is not an index of records. Delete the folder {folder} and run again."
        ) from None
    if schema != SCHEMA:
        raise PipelineError(
            f"{path} has schema {schema}, this version reads {SCHEMA}. Delete the folder {folder} and run again."
        )
    return index


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
            file.write(_frame(_example(features)))
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


def _example(features: dict[str, bytes | int]) -> bytes:
    """Serialise a `tf.train.Example`: bytes as a BytesList of one, an integer (>= 0) as an Int64List of one.

    Written out because importing TensorFlow for it costs every worker 3.6 s and 700 MB, and because protobuf promises
    no stable bytes. Source: protobuf.dev/programming-guides/encoding, tensorflow/core/example/{example,feature}.proto.
    """
    entries: list[bytes] = []
    for name, value in sorted(features.items()):
        kind, content = (1, _field(1, value)) if isinstance(value, bytes) else (3, _field(1, _varint(value)))
        entries += _field(1, *_field(1, name.encode()), *_field(2, *_field(kind, *content)))
    return b"".join(_field(1, *entries))


def _field(number: int, *content: bytes) -> tuple[bytes, ...]:
    """Return the parts of a field around those of its content: the picture is copied once, not at every level."""
    return (_varint(number << 3 | 2) + _varint(sum(map(len, content))), *content)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _frame(record: bytes) -> bytes:
    """Length, its checksum, the record, its checksum. Source: "TFRecords format details", tensorflow.org/tutorials."""
    length = struct.pack("<Q", len(record))
    return length + _checksum(length) + record + _checksum(record)


def _checksum(content: bytes) -> bytes:
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
