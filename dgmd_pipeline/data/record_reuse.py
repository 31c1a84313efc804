"""Finds, in finished folders, the TFRecord shards and records that a new folder can reuse."""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.manifest import Fit, Shard
from dgmd_pipeline.workflow import files

log = logging.getLogger(__name__)
NEW = manifest.MISSING  # in place of a position: no stored record is reused


class StoredShard(NamedTuple):
    """A shard in a finished folder."""

    path: Path
    entry: Shard
    records: slice  # the part of `StoredRecords.records` that describes the shard


class StoredRecords:
    """The records in those finished folders whose images have the given size and fit."""

    def __init__(self, folders: Iterable[Path], width: int, height: int, fit: Fit) -> None:
        self.shards: list[StoredShard] = []
        records = [np.empty(0, manifest.RECORD)]
        count = 0
        for folder in folders:
            try:
                index, found = manifest.read_shard_index(folder), manifest.read_records(folder)
                intact = files.sha256(folder / manifest.RECORDS) == index.records_sha256
            except (PipelineError, OSError) as error:
                log.warning("The records of %s are not reused. %s", folder, error)
                continue
            if not intact:
                log.warning("The records of %s are not reused: %s is damaged", folder, manifest.RECORDS)
                continue
            if (index.width, index.height, index.fit) != (width, height, fit) or len(found) != index.images:
                continue
            records.append(found)
            for shard in index.shards:
                self.shards.append(StoredShard(folder / shard.file, shard, slice(count, count + shard.records)))
                count += shard.records
        self.records = np.concatenate(records)
        self.shard_of = np.repeat(np.arange(len(self.shards)), [shard.entry.records for shard in self.shards])

    def find(self, sha256: np.ndarray) -> np.ndarray:
        """Return the position of a record of each image file, or NEW: int64 [n].

        `sha256` (S32 [n]) are the hashes of the files.
        """
        return manifest.positions_of(sha256, self.records["sha256"])


class Reuse(NamedTuple):
    """The shards and records that a new folder reuses."""

    shards: dict[int, StoredShard]  # number of a new shard -> the stored shard that is equal to it
    # int64 [images]: the position of the reused record of each image, or NEW. Images of reused shards have NEW, too.
    positions: np.ndarray


def find_reusable(stored: StoredRecords, rows: Sequence[str], sha256: np.ndarray, shard_of: np.ndarray) -> Reuse:
    """Find the shards and records that a new folder can reuse, and check the SHA-256 of each stored shard that is used.

    `rows` are the digests `Shard.rows` of the new shards. `sha256` (S32 [images]) are the hashes of the image files.
    `shard_of` (int64 [images]) gives the number of the new shard that each image belongs to. Does not use damaged
    shards, and logs a warning for each.
    """
    if not len(stored.records):
        return Reuse({}, np.full(len(sha256), NEW))
    damaged: set[int] = set()
    while True:
        by_rows = {shard.entry.rows: number for number, shard in enumerate(stored.shards) if number not in damaged}
        shards = {number: by_rows[each] for number, each in enumerate(rows) if each in by_rows}
        positions = stored.find(sha256)
        positions[np.isin(shard_of, list(shards)) | np.isin(stored.shard_of[positions], list(damaged))] = NEW
        sources = {*shards.values(), *stored.shard_of[positions[positions != NEW]].tolist()}
        found = _damaged(stored, sorted(sources))
        if not found:
            return Reuse({number: stored.shards[each] for number, each in shards.items()}, positions)
        damaged |= found


def _damaged(stored: StoredRecords, numbers: Sequence[int]) -> set[int]:
    shards = [stored.shards[number] for number in numbers]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        intact = list(
            pool.map(lambda shard: files.is_intact(shard.path, shard.entry.bytes, shard.entry.sha256), shards)
        )
    damaged = {number for number, good in zip(numbers, intact, strict=True) if not good}
    for number in sorted(damaged):
        files.warn_of_damage(stored.shards[number].path, "its images are converted again")
    return damaged
