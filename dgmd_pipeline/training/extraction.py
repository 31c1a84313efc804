"""Extracts feature vectors in pieces. A piece is a part of a shard. Each piece has a small folder for its vectors."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError, WorkerDied
from dgmd_pipeline.training import backbones, dataset, feature_store, features, networks
from dgmd_pipeline.training.feature_store import Origin, Reuse
from dgmd_pipeline.training.features import ParallelMap
from dgmd_pipeline.training.vectors import VectorFile
from dgmd_pipeline.workflow import files

if TYPE_CHECKING:
    import keras

# Maximum number of images in a piece. A core computes their vectors in 10 to 30 s. A run that is stopped loses the
# vectors of unfinished pieces.
PIECE_IMAGES = 1024
VECTORS = "features.npy"  # file in the folder of a piece


class Network(NamedTuple):
    """A frozen network, as `networks.build_frozen` builds it."""

    backbone: str
    weights: str
    height: int  # pixels
    width: int
    keras_home: Path


class Piece(NamedTuple):
    """Images of one shard. Their vectors are written into one folder."""

    target: Path  # the folder
    records: Path  # folder of shards
    positions: np.ndarray  # int64, ascending: positions of the images among all records
    origin: Origin  # see `feature_store.Origin`; origin["weights"] is the fingerprint of the weights
    network: Network


def divide(records: Path, reuse: Reuse, folder: Path, origin: Origin, network: Network) -> list[Piece]:
    """Divide the images without a stored vector (`reuse.new`) into pieces of at most PIECE_IMAGES images.

    Each piece gets a new folder below `folder`.
    """
    ends = np.cumsum([shard.records for shard in manifest.read_shard_index(records).shards])
    shard_of = np.searchsorted(ends, reuse.new, side="right")
    of_shards = [reuse.new[shard_of == number] for number in reuse.shards]
    parts = [part for each in of_shards for part in np.split(each, range(PIECE_IMAGES, len(each), PIECE_IMAGES))]
    run = uuid.uuid4().hex[:8]  # makes the folders' names unique, so that no piece of an earlier run is replaced
    targets = (folder / f"{run}-{number:06d}" for number in range(len(parts)))
    return [Piece(target, records, part, origin, network) for target, part in zip(targets, parts, strict=True)]


def extract_piece(piece: Piece) -> int:
    """Write the folder of a piece, and return the number of images.

    Several processes may compute the same piece at the same time (see `files.commit`). A process builds the network
    once. Raises PipelineError if the file of weights is not the same as at the start of the run.
    """
    return sum(extract_pieces([piece], _network(piece.network, piece.origin["weights"])))


def check(piece: Piece, outcome: int | WorkerDied) -> int:
    """Return the number of images of a piece. Raises PipelineError if its process died."""
    if isinstance(outcome, WorkerDied):
        raise PipelineError(
            f"Features of {piece.records} cannot be extracted: {outcome}. TensorFlow needs 1 to 2 GB of memory in each "
            "worker. Run again: finished pieces are kept."
        )
    return outcome


@lru_cache(maxsize=1)
def _network(network: Network, fingerprint: object) -> "keras.Model":
    if (found := backbones.weights_fingerprint(network.weights)) != fingerprint:
        raise PipelineError(
            f"BACKBONE_WEIGHTS={network.weights}: expected the weights of the run, with the fingerprint {fingerprint}, "
            f"found {found}. Provide every worker with the same file at this path."
        )
    return networks.build_frozen(*network, extracts=False)


def extract_pieces(pieces: Sequence[Piece], network: "keras.Model", map_batches: ParallelMap = map) -> Iterator[int]:
    """Write the folders of pieces. After each write, yield the number of written vectors.

    All pieces have the same folder of records. The images of all pieces go through the network as one stream.
    `map_batches` may compute batches in threads.
    """
    positions = np.concatenate([piece.positions for piece in pieces])
    images = dataset.read_images(pieces[0].records, positions).batch(features.BATCH).prefetch(2)
    blocks = features.extract(images, network, map_batches, few=len(positions) <= features.FEW)
    yield from write_pieces(pieces, blocks, int(network.output_shape[-1]))


def write_pieces(pieces: Iterable[Piece], blocks: Iterable[np.ndarray], dimensions: int) -> Iterator[int]:
    """Write the folders of pieces. Their vectors (float32 [n, dimensions]) come in blocks of any length.

    After each write, yields the number of written vectors. Only a few blocks are in memory. Raises ValueError if
    vectors are missing, and OSError if a folder cannot be written.
    """
    remaining, block = iter(blocks), np.empty((0, dimensions), np.float32)
    for piece in pieces:
        count, done = len(piece.positions), 0
        with files.commit(piece.target) as folder:
            file = VectorFile(folder / VECTORS, (count, dimensions))
            while done < count:
                if not len(block) and (block := next(remaining, block[:0])).size == 0:
                    raise ValueError(f"{piece.target}: expected {count} vectors, got {done}")
                taken, block = np.split(block, [count - done])
                file.write(done, taken)
                done += len(taken)
                yield len(taken)
            images = np.ascontiguousarray(manifest.read_records(piece.records)["sha256"][piece.positions])
            feature_store.write_index(folder, images, {VECTORS: slice(0, count)}, piece.origin, dimensions)
