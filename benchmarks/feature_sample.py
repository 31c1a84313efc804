"""Make tests/support/clothing_features.npz: features of 2,000 clothing photographs, small enough for the repository.

    python -m benchmarks.feature_sample

The file has numbers derived from the photographs, and no image: `codes` (int8 [2000, 256]), `step` (float32) and
`labels` (int8 [2000]). `codes * step` are the centred coordinates of MobileNetV2's features (ImageNet weights,
256 x 192) along their first 256 principal components, rounded to multiples of the standard deviation of all
coordinates. Rows are in random order.

Accuracy with 600 rows for training and 1,300 for testing: logistic regression 77.4 % (C = 0.03), a head with the
whitening of 2026-11-25 69.7 to 70.9 % (three seeds).
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks import datasets, measure
from dgmd_pipeline.training import feature_store

TARGET = measure.ROOT / "tests" / "support" / "clothing_features.npz"
ROWS, DIMENSIONS = 2_000, 256


def main() -> None:
    name, known = "clothing", datasets.SETS["clothing"]
    source = datasets.originals(name, known.lay_out)
    with measure.folder() as scratch:
        datasets.link(datasets.inspected(source), source, Path(scratch, "raw"))
        measure.run(
            sys.executable, "pipeline.py", "run", "--until", "extract",
            DATA_DIR=scratch, BACKBONE=known.backbone, BACKBONE_WEIGHTS=known.weights(),
            BALANCE_LIMIT="", IMAGE_WIDTH=known.width, IMAGE_HEIGHT=known.height,
        )  # fmt: skip
        splits = [feature_store.load(Path(scratch, f"features_{split}")) for split in ("training", "validation")]
        vectors, labels = (np.concatenate([split[part] for split in splits]) for part in (0, 1))
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **reduced(vectors, labels))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


def reduced(vectors: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of the file for features (float32 [n, d]) and labels (int64 [n])."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    chosen = np.random.default_rng(0).permutation(len(labels))[:ROWS]
    coordinates = centred[chosen] @ directions[:, : -DIMENSIONS - 1 : -1]
    step = coordinates.std()
    codes = np.round(coordinates / step).clip(-127, 127).astype(np.int8)
    return {"codes": codes, "step": np.float32(step), "labels": labels[chosen].astype(np.int8)}


if __name__ == "__main__":
    main()
