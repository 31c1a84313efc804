"""Extracting features: compared with the forward pass alone, with frozen variables and images in memory.

Both process batches of the same size in parallel, one thread for each core, which is the fastest configuration.

    python -m benchmarks.extracting [--repeats 5] [--images 960]
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import dataset, measure
from benchmarks.writing import HEIGHT, WIDTH, write


def main() -> None:
    options = measure.arguments(__doc__, repeats=5, images=960)
    raw = dataset.make(measure.WORK / "spice")
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # as settings.load does for frozen backbones
    from dgmd_pipeline.training import dataset as training_dataset
    from dgmd_pipeline.training import extraction, feature_store, features, networks
    from dgmd_pipeline.workflow import executors

    with measure.folder() as scratch:
        source = write(raw, Path(scratch), options.images)
        network = extraction.Network("EfficientNetV2-B1", "none", HEIGHT, WIDTH, Path(scratch))
        backbone = networks.build_backbone(*network)
        forward, every = features.freeze(backbone), np.arange(options.images)
        batches = [x.numpy() for x in training_dataset.read_images(source, every).batch(features.BATCH)]

        def ours() -> int:
            folder, place = (Path(tempfile.mkdtemp(dir=scratch)) for _ in range(2))
            pieces = extraction.divide(source, feature_store.find_reusable(source, (), {}), place, {}, network)
            count = sum(extraction.extract_pieces(pieces, backbone, executors.in_threads))
            reuse = feature_store.find_reusable(source, [piece.target for piece in pieces], {})
            feature_store.write(folder, source, reuse, {}, backbone.output_shape[-1])
            return count

        def theirs() -> int:
            return sum(map(len, executors.in_threads(forward, batches)))

        of = "the forward pass alone"
        measure.show(measure.images_per_second("extract", 0.9, options.images, ours, theirs, of, options.repeats))


if __name__ == "__main__":
    main()
