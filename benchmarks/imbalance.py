"""The effect of BALANCE_LIMIT and CLASS_WEIGHTS on a head, on long-tailed real features.

The features of all clothing photographs are extracted once. Each repeat sets a test part aside, which keeps the natural
shares of the labels (`datasets.third_split`), makes the rest long-tailed, and trains the package's head on it.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import datasets, heads, measure, quality_report
from dgmd_pipeline import manifest
from dgmd_pipeline.data import balance, columns, labels, split
from dgmd_pipeline.training import dataset, feature_store

NAME = "imbalance"
TAILS = (None, 10, 50)  # size of the largest label / size of the smallest; None: the natural sizes
CUTS = {"1.15": 1.15, "unset": None}  # BALANCE_LIMIT
VALIDATION = 0.2


def measured(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each long tail and each combination of the two settings."""
    known = datasets.SETS["clothing"]
    source = datasets.originals(known.lay_out.__name__, known.lay_out)
    rows = datasets.inspected(source)
    vectors, names = everything(known, rows, source)
    found: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for repeat in range(repeats):
        kept, test = datasets.third_split(rows, repeat)
        asked = np.stack([vectors[row.path] for row in test])
        truth = np.array([names.index(row.label) for row in test])
        for ratio in TAILS:
            tail = long_tail(kept, ratio, repeat)
            for cut, limit in CUTS.items():
                for weighted in (True, False):
                    head, count, seconds = trained(tail, vectors, names, limit, weighted, repeat + 1)
                    figures = quality_report.figures(head.predict(asked, batch_size=1024, verbose=0), truth, names)
                    key = (f"1:{ratio}" if ratio else "as it is", cut, weighted)
                    entry = found.setdefault(key, {
                        "version": key[0], "BALANCE_LIMIT": cut, "CLASS_WEIGHTS": weighted, "figures": [],
                    })  # fmt: skip
                    entry["images"] = count
                    entry["figures"].append(figures | {"cpu_seconds": seconds})
                    print(f"  {repeat + 1}/{repeats} {key}: {figures}", file=sys.stderr, flush=True)
    return list(found.values())


def everything(
    known: datasets.DataSet, rows: Sequence[manifest.Image], source: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Extract the features of all images with the pipeline; return them by path, and the labels by index."""
    with measure.folder() as scratch:
        folder = Path(scratch)
        datasets.link(rows, source, folder / "raw")
        measure.run(
            sys.executable, "pipeline.py", "run", "--until", "extract",
            DATA_DIR=folder, BALANCE_LIMIT="", IMAGE_WIDTH=known.width, IMAGE_HEIGHT=known.height,
            BACKBONE=known.backbone, BACKBONE_WEIGHTS=known.weights(),
        )  # fmt: skip
        vectors: dict[str, np.ndarray] = {}
        for name in ("training", "validation"):
            values, _ = feature_store.load(folder / f"features_{name}")
            vectors |= zip(dataset.keys(folder / f"tfrecord_{name}"), np.array(values), strict=True)
        return vectors, labels.read_mapping(folder / "label_map" / "mapping.json")


def long_tail(rows: Sequence[manifest.Image], ratio: int | None, seed: int) -> list[manifest.Image]:
    """Keep a random part of each label: sizes fall geometrically from the largest to the smallest, by `ratio` in all.

    A label with fewer images keeps all of them. The order of the labels by size is unchanged.
    Source: Cui, Jia, Lin, Song and Belongie, "Class-Balanced Loss", CVPR 2019, section 5.1.
    """
    if ratio is None:
        return list(rows)
    of: dict[str, list[manifest.Image]] = defaultdict(list)
    for row in rows:
        of[row.label].append(row)
    order = sorted(of, key=lambda label: (-len(of[label]), label))
    largest = len(of[order[0]])
    random = np.random.default_rng(seed)
    kept: list[manifest.Image] = []
    for rank, label in enumerate(order):
        wanted = max(2, round(largest * ratio ** (-rank / (len(order) - 1))))
        kept += [of[label][position] for position in random.permutation(len(of[label]))[:wanted]]
    return sorted(kept)


def trained(
    rows: Sequence[manifest.Image],
    vectors: dict[str, np.ndarray],
    names: list[str],
    limit: float | None,
    weighted: bool,
    seed: int,
) -> tuple[Any, int, float]:
    """Balance, split and train as the steps do; return the head, its number of training images and its CPU seconds."""
    classes = np.array([names.index(row.label) for row in rows])
    hashes = pa.record_batch({"sha256": pa.array([row.sha256.encode() for row in rows])})
    kept = balance.balance(classes, limit, [hashes])
    balanced = list(compress(rows, kept))
    classes = classes[kept]
    weights = balance.class_weights(balance.count_classes(classes)) if weighted else {}
    groups = columns.ranks("split", (row.group.encode() for row in balanced))
    is_validation = split.split(classes, groups, VALIDATION).validation
    vectors_of = np.stack([vectors[row.path] for row in balanced])
    splits = [(vectors_of[chosen], classes[chosen]) for chosen in (~is_validation, is_validation)]
    learned = [row.group for row in compress(balanced, ~is_validation)]
    head, seconds = quality_report.timed(lambda: heads.train(*splits, learned, len(names), weights, seed))
    return head, len(learned), seconds
