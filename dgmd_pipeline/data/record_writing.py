"""Writes a piece of a shard: encodes new images, and copies stored records. Workers run this code."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dgmd_pipeline import manifest
from dgmd_pipeline.data import encoding, limits, tfrecord
from dgmd_pipeline.data.decoding import DAMAGED, describe
from dgmd_pipeline.errors import PipelineError, TooLittleMemory, WorkerDied
from dgmd_pipeline.manifest import INDEX, INDEX_SCHEMA, Example, Fit, Shard
from dgmd_pipeline.workflow import files

SHARD = "records.tfrecord"  # the only shard in the folder of a piece
COPY_BYTES = 1 << 20  # bytes read at a time
_EXCLUDE = (
    "Raise the memory limit of the pipeline, or exclude the image with a row in corrections.csv (docs/operating.md). "
    "Then run again."
)


class Piece(NamedTuple):
    """A part of a shard that a worker writes into one folder."""

    target: Path  # the folder
    shard: int  # number of the shard
    rows: Sequence[Example]
    records: np.ndarray  # manifest.RECORD [rows]; only the hashes and the label are known yet
    stored: np.ndarray  # manifest.RECORD [rows]: the stored record of the image; undefined if no record is stored
    sources: Sequence[Path | None]  # file of the shard with the stored record of each row; None: no record is stored
    raw: Path
    width: int
    height: int
    fit: Fit
    reserve_memory: limits.ReserveMemory


def write_piece(piece: Piece) -> int:
    """Write the folder of a piece, in the format of a finished folder with one shard. Return the number of images.

    Several processes may write the same piece at the same time (see `files.commit`).
    """
    with files.commit(piece.target) as folder:
        records = _write_records(piece, folder / SHARD)
        write_index(folder, records, {SHARD: slice(0, len(records))}, piece.width, piece.height, piece.fit)
    return len(piece.rows)


def _write_records(piece: Piece, path: Path) -> np.ndarray:
    """Write the records of a piece into a file and return them: manifest.RECORD [rows]."""
    written = piece.records.copy()
    unchanged = (piece.stored["row"] == written["row"]).tolist()
    lengths = []
    with path.open("wb") as file:
        output = _Output(file)
        for row, stored, source, same in zip(piece.rows, piece.stored, piece.sources, unchanged, strict=True):
            if source is not None and same:
                output.copy(source, int(stored["start"]), int(stored["length"]))
                lengths.append((stored["length"], stored["image"], stored["image_length"]))
            else:
                # Complete the file up to here. `check` counts its records to find the image at which a process died.
                output.close()
                image = _encode(piece, row) if source is None else _read_image(source, stored)
                frame = tfrecord.frame(tfrecord.serialize_example(_features(piece, row, image)))
                output.write(frame)
                lengths.append((len(frame), frame.index(image), len(image)))
        output.close()
    fields = np.array(lengths, np.int64).reshape(-1, 3)
    written["length"], written["image"], written["image_length"] = fields.T
    written["start"] = np.cumsum(fields[:, 0]) - fields[:, 0]
    return written


def check(piece: Piece, outcome: int | WorkerDied) -> Path:
    """Return the folder of a piece. Raises a PipelineError that names the image if the process of the piece died."""
    if isinstance(outcome, WorkerDied):
        files_of_attempts = [path for folder in files.attempts(piece.target) if (path := folder / SHARD).exists()]
        written = tfrecord.count(files_of_attempts[-1]) if files_of_attempts else 0
        path = piece.raw / piece.rows[min(written, len(piece.rows) - 1)].path
        raise PipelineError(f"{path} cannot be converted: {limits.explain(outcome)}. {_EXCLUDE}")
    return piece.target


def join(target: Path, parts: Sequence[Path], width: int, height: int, fit: Fit) -> Path:
    """Join the folders of a shard's parts into the folder `target`, remove the parts, and return the new folder.

    A single part is returned as it is.
    """
    if len(parts) == 1:
        return parts[0]
    records = []
    with files.commit(target) as folder:
        with (folder / SHARD).open("wb") as file:
            for part in parts:
                written = np.array(manifest.read_records(part))
                written["start"] += np.uint64(file.tell())
                records.append(written)
                with (part / SHARD).open("rb") as source:
                    shutil.copyfileobj(source, file, COPY_BYTES)
        joined = np.concatenate(records)
        write_index(folder, joined, {SHARD: slice(0, len(joined))}, width, height, fit)
    for part in parts:
        shutil.rmtree(part)
    return target


def write_index(
    folder: Path, records: np.ndarray, shards: Mapping[str, slice], width: int, height: int, fit: Fit
) -> dict[str, int]:
    """Write `records.npy` and `index.json` into a folder that has the shards, and return the counts in the index.

    `shards` maps the name of each file to its part of `records` (manifest.RECORD [n]).
    """
    np.save(folder / manifest.RECORDS, records, allow_pickle=False)
    entries = [_entry(folder / name, records[each]) for name, each in shards.items()]
    counts = {"images": len(records), "shards": len(shards), "bytes": sum(entry.bytes for entry in entries)}
    kind = {"format": encoding.FORMAT, "lossless": True}
    index = {"schema": INDEX_SCHEMA, "encoding": kind, "width": width, "height": height, "fit": fit}
    counted = {**counts, "records_sha256": files.sha256(folder / manifest.RECORDS)}
    text = json.dumps({**index, **counted, "files": [entry._asdict() for entry in entries]}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return counts


def _entry(path: Path, records: np.ndarray) -> Shard:
    return Shard(path.name, len(records), path.stat().st_size, files.sha256(path), rows_digest(records))


def rows_digest(records: np.ndarray) -> str:
    """Return `Shard.rows` for the records of a shard."""
    return hashlib.sha256(records["row"].tobytes()).hexdigest()


class _Output:
    """A file to which records are written. Adjacent records of another file are copied together."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._source: Path | None = None  # file of the records that are still to be copied
        self._start = self._stop = 0

    def copy(self, source: Path, start: int, length: int) -> None:
        """Append a part of another file.

        This method collects adjacent parts. A later call of `write` or `close`, or of `copy` with a part that is not
        adjacent, writes them.
        """
        if source != self._source or start != self._stop:
            self.close()
            self._source, self._start = source, start
        self._stop = start + length

    def write(self, content: bytes) -> None:
        """Append bytes."""
        self.close()
        self._file.write(content)
        self._file.flush()

    def close(self) -> None:
        """Copy the parts that `copy` has collected."""
        if self._source is None:
            return
        with self._source.open("rb") as source:
            source.seek(self._start)
            left = self._stop - self._start
            while left and (content := source.read(min(left, COPY_BYTES))):
                self._file.write(content)
                left -= len(content)
        self._file.flush()
        self._source = None


def _features(piece: Piece, row: Example, image: bytes) -> dict[str, bytes | int]:
    return {
        "image": image,
        "label": row.class_index,
        "width": piece.width,
        "height": piece.height,
        "key": row.path.encode("utf-8", "surrogateescape"),
    }


def _read_image(source: Path, stored: np.void) -> bytes:
    with source.open("rb") as file:
        file.seek(int(stored["start"]) + int(stored["image"]))
        return file.read(int(stored["image_length"]))


def _encode(piece: Piece, row: Example) -> bytes:
    path = piece.raw / row.path
    try:
        return encoding.encode(path, piece.width, piece.height, piece.fit, piece.reserve_memory)
    except TooLittleMemory as error:
        raise PipelineError(f"{path} cannot be converted: it {error}. {_EXCLUDE}") from None
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise PipelineError(
            f"{path} was readable when it was inspected, but is not readable now ({describe(error)}). "
            "Restore the file and run again. To restore a downloaded file, delete the folder raw. To accept the change "
            "instead, run with --force inspect."
        ) from error
