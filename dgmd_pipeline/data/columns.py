"""Columns of a manifest -> what steps decide about its rows: numbers of labels, ranks of contents, a selection."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dgmd_pipeline import manifest
from dgmd_pipeline.manifest import Image


class LabelNumbers(dict[bytes, int]):
    """Numbers labels in the order of their first row."""

    def of(self, labels: pa.BinaryArray) -> np.ndarray:
        """Return the number of each row's label: int32 [rows]."""
        found = labels.dictionary_encode()
        numbers = [self.setdefault(label, len(self)) for label in found.dictionary.to_pylist()]
        return np.array(numbers, np.int32)[found.indices.to_numpy()]

    @property
    def names(self) -> list[str]:
        """The labels, by their number."""
        return [manifest.decode(label) for label in self]


def count_labels(path: Path) -> Counter[str]:
    """Return the number of usable images of each label in an `images.csv`."""
    numbers = LabelNumbers()
    counts: Counter[int] = Counter()
    for batch in manifest.read_columns(path, Image, "label"):
        counts.update(dict(enumerate(np.bincount(numbers.of(batch["label"])).tolist())))
    return Counter({label: counts[number] for number, label in enumerate(numbers.names)})


def ranks(purpose: str, names: Iterable[bytes]) -> np.ndarray:
    """Return a pseudo-random place in an order for each name, another one for each purpose: uint64 [names, 2].

    It is half of a SHA-256, the high bits first. Only the name decides it: the other rows and the machine do not.
    """
    prefix = f"{purpose} ".encode()
    halves = bytearray()
    for name in names:
        halves += hashlib.sha256(prefix + name).digest()[:16]
    return np.frombuffer(halves, ">u8").reshape(-1, 2).astype(np.uint64)


def order(ranks: np.ndarray) -> np.ndarray:
    """Return the positions of ranks (uint64 [n, 2]) in ascending order: int64 [n]. Equal ones keep their order."""
    return np.lexsort((ranks[:, 1], ranks[:, 0]))


def select(batches: Iterable[pa.RecordBatch], chosen: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the rows for which `chosen` (bool [rows of all batches]) is true."""
    first = 0
    for batch in batches:
        yield batch.filter(pa.array(chosen[first : first + batch.num_rows]))
        first += batch.num_rows
