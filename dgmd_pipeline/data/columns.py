"""Operations on the columns of a manifest: numbering of labels, ranking by hashes, selection of rows."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from pyarrow import compute

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import Example, Image

BATCH_ROWS = 1_000  # rows that are converted to or from tuples at a time
_TYPES = pa.schema({
    "path": pa.binary(),
    "label": pa.binary(),
    "class_index": pa.int32(),
    "sha256": pa.binary(32),
    "group": pa.binary(),  # null if it is equal to `sha256`, as in most rows
})  # fmt: skip


class Examples(Sequence[Example]):
    """Rows that are stored in columns, in a quarter of the memory of tuples. Reading a row creates its tuple."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    @classmethod
    def of(cls, rows: Iterable[Example]) -> "Examples":
        """Store rows."""
        left = iter(rows)
        batches = iter(lambda: list(islice(left, BATCH_ROWS)), [])
        return cls(pa.Table.from_batches(map(_to_batch, batches), _TYPES))

    def sort(self, purpose: str) -> np.ndarray:
        """Sort the rows by the `ranks` of their content, then by path; return the ranks in this order."""
        hashes = (sha256.hex().encode() for chunk in self._table["sha256"].chunks for sha256 in chunk.to_pylist())
        by_path, found = compute.sort_indices(self._table["path"]).to_numpy(), ranks(purpose, hashes)
        positions = by_path[order(found[by_path])]
        for number, field in enumerate(_TYPES):  # one at a time, because copying all columns needs more memory
            self._table = self._table.set_column(number, field, self._table[number].take(pa.array(positions)))
        return found[positions]

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[Example]:
        for batch in self._table.to_batches(BATCH_ROWS):
            paths, labels, classes, hashes, groups = (column.to_pylist() for column in batch.columns)
            sha256 = [each.hex() for each in hashes]
            group = (own if each is None else manifest.decode(each) for each, own in zip(groups, sha256, strict=True))
            yield from map(Example, map(manifest.decode, paths), map(manifest.decode, labels), classes, sha256, group)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return Examples(self._table[index])
        position = range(len(self))[index]
        return next(iter(self[position : position + 1]))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # the pickled table of a slice would contain the rows of the whole table


def _to_batch(rows: Sequence[Example]) -> pa.RecordBatch:
    columns = (
        [manifest.encode(row.path) for row in rows],
        [manifest.encode(row.label) for row in rows],
        [row.class_index for row in rows],
        [bytes.fromhex(row.sha256) for row in rows],
        [None if row.group == row.sha256 else manifest.encode(row.group) for row in rows],
    )
    arrays = [pa.array(values, kind) for values, kind in zip(columns, _TYPES.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_TYPES)


class LabelNumbers(dict[bytes, int]):
    """Label -> number. Each new label gets the next number, from 0."""

    def of(self, labels: pa.BinaryArray) -> np.ndarray:
        """Return the number of each row's label: int32 [rows]."""
        found = labels.dictionary_encode()
        numbers = [self.setdefault(label, len(self)) for label in found.dictionary.to_pylist()]
        return np.array(numbers, np.int32)[found.indices.to_numpy()]

    @property
    def names(self) -> list[str]:
        """The labels in the order of their numbers."""
        return [manifest.decode(label) for label in self]


def count_labels(path: Path) -> Counter[str]:
    """Return the number of usable images of each label in an `images.csv`."""
    numbers = LabelNumbers()
    counts: Counter[int] = Counter()
    for batch in manifest.read_columns(path, Image, "label"):
        counts.update(dict(enumerate(np.bincount(numbers.of(batch["label"])).tolist())))
    return Counter({label: counts[number] for number, label in enumerate(numbers.names)})


def ranks(purpose: str, names: Iterable[bytes]) -> np.ndarray:
    """Return a pseudo-random rank of each name: uint64 [names, 2].

    A rank is the first half of the SHA-256 of the purpose and the name. The first column has the high 64 bits of the
    rank.
    """
    prefix = f"{purpose} ".encode()
    halves = bytearray()
    for name in names:
        halves += hashlib.sha256(prefix + name).digest()[:16]
    return np.frombuffer(halves, ">u8").reshape(-1, 2).astype(np.uint64)


def order(ranks: np.ndarray) -> np.ndarray:
    """Return the positions of ranks (uint64 [n, 2]) in ascending order: int64 [n]. Equal ranks keep their order."""
    return np.lexsort((ranks[:, 1], ranks[:, 0]))


def select(batches: Iterable[pa.RecordBatch], chosen: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the rows for which `chosen` (bool [rows of all batches]) is true."""
    first = 0
    for batch in batches:
        yield batch.filter(pa.array(chosen[first : first + batch.num_rows]))
        first += batch.num_rows
