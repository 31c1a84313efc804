"""Reads and writes folders of stored features, and reuses the vectors of finished folders.

A folder has one file of vectors for each shard of the records, for example `features-00000-of-00010.npy` (float32
[m, d]). The vectors are in the order of the records. `images.npy` (S32 [n]) contains the SHA-256 of each image file.
`labels.npy` (int64 [n]) contains the class index of each image. `index.json` lists the files.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training.features import LabeledFeatures
from dgmd_pipeline.training.vectors import ShardedVectors, VectorFile
from dgmd_pipeline.workflow import files

log = logging.getLogger(__name__)
IMAGES, LABELS = "images.npy", "labels.npy"
SCHEMA = 1  # version of the format of index.json
COPY_ROWS = 4096  # vectors that are copied at a time
IN_MEMORY_BYTES = 32_000_000  # if the vectors of a folder are larger, `load` maps them instead of reading them
Origin = Mapping[str, object]  # JSON values: all that a vector depends on, apart from its image


class FeatureShard(NamedTuple):
    """A file of vectors."""

    file: str  # name
    images: int
    bytes: int
    sha256: str  # 64 hexadecimal digits
    images_sha256: str  # SHA-256 of this file's part of images.npy; identifies the images that the vectors belong to


class _Stored(NamedTuple):
    """A file of vectors in a finished folder."""

    path: Path
    entry: FeatureShard
    images: np.ndarray  # S32 [n]


class _Copy(NamedTuple):
    """Vectors to copy from a stored file."""

    stored: _Stored
    rows: np.ndarray  # int64 [m]: positions in the stored file
    target: np.ndarray  # int64 [m]: positions in the new file


class Reuse(NamedTuple):
    """The vectors that a new folder reuses from finished folders, and the images whose vectors must be computed."""

    dimensions: int | None  # number of values in a reused vector; None if no vector is reused
    linked: dict[int, _Stored]  # number of a shard -> a stored file with exactly the shard's vectors
    copied: dict[int, list[_Copy]]  # number of a shard that is not in `linked` -> vectors to copy into its file
    new: np.ndarray  # int64, ascending: positions, among all records, of images without a stored vector
    new_bytes: int  # size of the records at the positions `new`
    shards: list[int]  # numbers of the shards that contain the positions `new`


def find_reusable(records: Path, previous: Iterable[Path], origin: Origin) -> Reuse:
    """Search the finished folders `previous` for the vectors of the images in `records`.

    Only folders with this origin are used. The SHA-256 of each used file is checked. Damaged files and folders are
    not used; each is logged as a warning.
    """
    rows, edges = manifest.read_records(records), _edges(records)
    stored = [each for folder in previous for each in _open(folder, origin)]
    damaged: set[Path] = set()
    while True:
        reuse = _match(rows, edges, [each for each in stored if each.path not in damaged])
        used = {each.path: each for each in reuse.linked.values()}
        used |= {copy.stored.path: copy.stored for copies in reuse.copied.values() for copy in copies}
        found = {path for path, each in used.items() if not _is_intact(each)}
        if not found:
            return reuse
        damaged |= found


def _edges(records: Path) -> list[tuple[int, int]]:
    """Return, for each shard, the position of its first record and the position after its last record."""
    counts = [shard.records for shard in manifest.read_shard_index(records).shards]
    return [*pairwise(np.cumsum([0, *counts]).tolist())]


def _open(folder: Path, origin: Origin) -> list[_Stored]:
    try:
        index = manifest.read_json(folder / manifest.INDEX)
        if index["schema"] != SCHEMA or index["origin"] != dict(origin):
            return []
        images = np.load(folder / IMAGES)
        entries = [FeatureShard(**entry) for entry in index["files"]]
        edges = np.cumsum([0, *(entry.images for entry in entries)])
        parts = np.split(images, edges[1:-1])
        if [_digest(part) for part in parts] != [entry.images_sha256 for entry in entries]:
            raise ValueError(f"{IMAGES} has changed")
        return [_Stored(folder / entry.file, entry, part) for entry, part in zip(entries, parts, strict=True)]
    except (PipelineError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("The features of %s are not reused. They are damaged (%s).", folder, type(error).__name__)
        return []


def _match(rows: np.ndarray, edges: Sequence[tuple[int, int]], stored: Sequence[_Stored]) -> Reuse:
    """Find the images of some records (manifest.RECORD [n]) in stored files."""
    by_images = {each.entry.images_sha256: each for each in stored}
    names = np.concatenate([np.empty(0, "S32"), *(each.images for each in stored)])
    sizes = [len(each.images) for each in stored]
    file_of, row_of = np.repeat(np.arange(len(stored)), sizes), np.concatenate([[0], *map(np.arange, sizes)])[1:]
    linked, copied, new, dimensions = {}, {}, [np.empty(0, np.int64)], None
    everywhere = manifest.positions_of(rows["sha256"], names)
    for number, (start, stop) in enumerate(edges):
        wanted = rows["sha256"][start:stop]
        if equal := by_images.get(_digest(wanted)):
            linked[number] = equal
            continue
        found = everywhere[start:stop]
        known = found != manifest.MISSING
        new.append(start + np.flatnonzero(~known))
        copied[number] = [
            _Copy(stored[each], row_of[found[at]], np.flatnonzero(at))
            for each in np.unique(file_of[found[known]]).tolist()
            if (at := known & (file_of[found] == each)).any()
        ]
    first = next(iter([*linked.values(), *(copy.stored for copies in copied.values() for copy in copies)]), None)
    if first is not None:
        dimensions = int(np.load(first.path, mmap_mode="r").shape[1])
    positions = np.concatenate(new)
    shards = [number for number, part in zip(copied, new[1:], strict=True) if len(part)]
    return Reuse(dimensions, linked, copied, positions, int(rows["length"][positions].sum()), shards)


def write(folder: Path, records: Path, reuse: Reuse, origin: Origin, dimensions: int) -> None:
    """Write a folder of features by linking and copying stored vectors.

    Raises ValueError if a record has no stored vector (see `reuse.new`), and OSError if the folder cannot be written.
    """
    if len(reuse.new):
        raise ValueError(f"{folder}: {len(reuse.new)} vectors are missing")
    record_table, edges = manifest.read_records(records), _edges(records)
    paths = [folder / f"features-{number:05d}-of-{len(edges):05d}.npy" for number in range(len(edges))]
    for number, stored in reuse.linked.items():
        files.link(stored.path, paths[number], paths[number].with_suffix(".part"))
    for number, copies in reuse.copied.items():
        start, stop = edges[number]
        file = VectorFile(paths[number], (stop - start, dimensions))
        for stored, rows, target in copies:
            vectors = np.load(stored.path, mmap_mode="r")
            for first in range(0, len(rows), COPY_ROWS):
                chunk = slice(first, first + COPY_ROWS)
                _write_runs(file, target[chunk], vectors[rows[chunk]])
    np.save(folder / LABELS, record_table["label"].astype(np.int64), allow_pickle=False)
    shards = {path.name: slice(*each) for path, each in zip(paths, edges, strict=True)}
    write_index(folder, np.ascontiguousarray(record_table["sha256"]), shards, origin, dimensions)


def write_index(
    folder: Path, images: np.ndarray, vectors: Mapping[str, slice], origin: Origin, dimensions: int
) -> None:
    """Write `images.npy` and `index.json` into a folder that already has the files of vectors.

    `vectors` maps the name of each file to its part of `images` (S32 [n]).
    """
    np.save(folder / IMAGES, images, allow_pickle=False)
    entries = [_entry(folder / name, images[each]) for name, each in vectors.items()]
    index = {"schema": SCHEMA, "origin": dict(origin), "images": len(images), "dimensions": dimensions}
    manifest.write_json(folder / manifest.INDEX, index | {"files": [entry._asdict() for entry in entries]})


def _entry(path: Path, images: np.ndarray) -> FeatureShard:
    return FeatureShard(path.name, len(images), path.stat().st_size, files.sha256(path), _digest(images))


def load(folder: Path) -> LabeledFeatures:
    """Open a folder of features. Raises PipelineError if a file is missing or damaged."""
    path = folder / manifest.INDEX
    try:
        entries = [FeatureShard(**entry) for entry in manifest.read_json(path)["files"]]
        parts = []
        for entry in entries:
            path = folder / entry.file
            parts.append(np.load(path, mmap_mode="r" if entry.images else None))  # an empty file cannot be mapped
        path = folder / LABELS
        labels = np.load(path)
        if [len(part) for part in parts] != [entry.images for entry in entries] or sum(map(len, parts)) != len(labels):
            raise ValueError("the numbers of vectors and labels are inconsistent")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise manifest.changed_file_error(path, error) from error
    vectors = ShardedVectors(parts)
    in_memory = sum(entry.bytes for entry in entries) <= IN_MEMORY_BYTES
    return LabeledFeatures(vectors[:] if in_memory else vectors, labels)


def _write_runs(file: VectorFile, rows: np.ndarray, vectors: np.ndarray) -> None:
    """Write vectors at ascending positions. Adjacent vectors are written together."""
    starts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for start, stop in pairwise(starts):
        if start < stop:
            file.write(int(rows[start]), vectors[start:stop])


def _is_intact(stored: _Stored) -> bool:
    intact = files.is_intact(stored.path, stored.entry.bytes, stored.entry.sha256)
    if not intact:
        files.warn_of_damage(stored.path, "its vectors are computed again")
    return intact


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
