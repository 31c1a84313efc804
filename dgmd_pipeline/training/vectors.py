"""Feature vectors in `.npy` files, read from the disk when they are used."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Vectors(Protocol):
    """Feature vectors (float32 [n, d]), with some of the methods of a NumPy array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of vectors, followed by the shape of a vector."""

    def __len__(self) -> int:
        """Return the number of vectors."""

    def __getitem__(self, rows: "slice | np.ndarray", /) -> np.ndarray:
        """Return some of the vectors, in memory or mapped from disk."""


class ShardedVectors:
    """The concatenated vectors of several arrays. Only requested vectors are read into memory."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """Concatenate one or more arrays [n1, d], [n2, d], ... of the same type. They may be mapped from disk."""
        self._parts = parts
        self._edges = np.cumsum([0, *map(len, parts)])
        self.shape: tuple[int, ...] = (int(self._edges[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        """Return the vectors at `rows`, in this order. `rows` is a slice, positions (int [m]) or a mask (bool [n])."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"a position is outside of {len(self)} vectors")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        part_of = np.searchsorted(self._edges, rows, side="right") - 1
        for number in np.unique(part_of):
            at = part_of == number
            found[at] = self._parts[number][rows[at] - self._edges[number]]
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Return all vectors in memory."""
        del copy
        return np.asarray(self[:], dtype)


class VectorFile:
    """A new `.npy` file of float32 vectors. Vectors can be written at any position."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        """Create the file for an array with this shape, [n, ...]. Vectors that are not written are 0."""
        self._path = path
        self._row_bytes = 4 * int(np.prod(shape[1:]))
        with path.open("wb") as file:
            # The file is written without a memory map, because mapped pages would count as memory of this process.
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            self._first = file.tell()
            file.truncate(self._first + self._row_bytes * shape[0])

    def write(self, position: int, vectors: np.ndarray) -> None:
        """Write consecutive vectors, float [m, ...], starting at `position`."""
        with self._path.open("r+b") as file:
            file.seek(self._first + position * self._row_bytes)
            file.write(vectors.astype("<f4", copy=False).tobytes())
