"""A piece of a shard -> its bytes: new images are encoded, and stored records are copied. Workers run this."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dgmd_pipeline.data import encoding, limits, tfrecord
from dgmd_pipeline.data.decoding import DAMAGED, describe
from dgmd_pipeline.errors import PipelineError, TooLittleMemory, WorkerDied
from dgmd_pipeline.manifest import Example, Fit

COPY_BYTES = 1 << 20  # read at a time
_EXCLUDE = (
    "Raise the memory limit of the pipeline, or exclude the image with a row in corrections.csv (docs/operating.md). "
    "Then run again."
)


class Piece(NamedTuple):
    """A part of a shard, for a worker to write."""

    raw: Path
    shard: Path
    part: Path  # the file to write; the shard itself for the first part
    rows: Sequence[Example]
    records: np.ndarray  # manifest.RECORD [rows]: hashes and label
    stored: np.ndarray  # manifest.RECORD [rows]: the stored record of the image; undefined where there is none
    sources: Sequence[Path | None]  # the shard with the stored record of each row; None: there is none
    width: int
    height: int
    fit: Fit
    reserve_memory: limits.ReserveMemory


def write_piece(piece: Piece) -> np.ndarray:
    """Write the records of a piece and return them: manifest.RECORD [rows], with positions in the piece's file."""
    written = piece.records.copy()
    unchanged = (piece.stored["row"] == written["row"]).tolist()
    lengths = []
    with piece.part.open("wb") as file:
        output = _Output(file)
        for row, stored, source, same in zip(piece.rows, piece.stored, piece.sources, unchanged, strict=True):
            if source is not None and same:
                output.copy(source, int(stored["start"]), int(stored["length"]))
                lengths.append((stored["length"], stored["image"], stored["image_length"]))
            else:
                output.close()  # if the process dies, `check` sees at which image
                image = _encode(piece, row) if source is None else _read_image(source, stored)
                frame = tfrecord.frame(tfrecord.serialize_example(_features(piece, row, image)))
                output.write(frame)
                lengths.append((len(frame), frame.index(image), len(image)))
        output.close()
    fields = np.array(lengths, np.int64).reshape(-1, 3)
    written["length"], written["image"], written["image_length"] = fields.T
    written["start"] = np.cumsum(fields[:, 0]) - fields[:, 0]
    return written


def check(piece: Piece, outcome: np.ndarray | WorkerDied) -> np.ndarray:
    """Return the records of a piece. Raises PipelineError with the image at which the process died, if it did."""
    if isinstance(outcome, WorkerDied):
        written = tfrecord.count(piece.part) if piece.part.exists() else 0
        path = piece.raw / piece.rows[min(written, len(piece.rows) - 1)].path
        raise PipelineError(f"{path} cannot be converted: {limits.explain(outcome)}. {_EXCLUDE}")
    return outcome


def join(shard: Path, parts: Iterable[tuple[Piece, np.ndarray]]) -> np.ndarray:
    """Append the parts of a shard to the first one. Return its records, given those of each part."""
    records = []
    with shard.open("ab") as file:
        for piece, written in parts:
            if piece.part != shard:
                written["start"] += np.uint64(file.tell())
                with piece.part.open("rb") as source:
                    shutil.copyfileobj(source, file, COPY_BYTES)
                piece.part.unlink()
            records.append(written)
    return np.concatenate(records)


class _Output:
    """A file to which records are written. Adjacent records of another file are copied at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._source: Path | None = None  # of the records that are still to be copied
        self._start = self._stop = 0

    def copy(self, source: Path, start: int, length: int) -> None:
        """Append a part of another file."""
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
        """Copy what is still to be copied."""
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
            f"{path} was readable when it was inspected, and is not any more ({describe(error)}). "
            "Restore the file (if it was downloaded, delete the folder raw) and run again. Or accept the change: run "
            "with --force inspect."
        ) from error
