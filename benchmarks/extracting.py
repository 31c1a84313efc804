"""Extracting features: against the bare forward pass, variables frozen to constants, on pictures already in memory.

Both send batches of the same size through it side by side, one thread a core: that is the fastest way to run it.

python -m benchmarks.extracting [--repeats 5] [--images 960]
"""

import argparse
import os
import shutil
import time
from pathlib import Path

from benchmarks import measure, pictures
from benchmarks.writing import HEIGHT, WIDTH, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=960)
    options = parser.parse_args()
    raw = pictures.make(measure.WORK / "spice")
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # as settings.load does for frozen backbones
    from dgmd_pipeline import features, model, records, tasks, workers

    with measure.folder() as scratch:
        source = write(raw, Path(scratch), options.images)
        backbone = model.build_backbone("EfficientNetV2-B1", "none", HEIGHT, WIDTH, Path(scratch))
        forward = features.freeze(backbone)
        batches = [x.numpy() for x, _ in records.read(source).batch(tasks.EXTRACTION_BATCH)]

        def ours() -> float:
            folder = Path(scratch, "features")
            folder.mkdir()
            start = time.perf_counter()
            batched = records.read(source).batch(tasks.EXTRACTION_BATCH).prefetch(2)
            assert (
                sum(features.extract(batched, options.images, backbone, folder, workers.in_threads)) == options.images
            )
            seconds = time.perf_counter() - start
            shutil.rmtree(folder)
            return options.images / seconds

        def theirs() -> float:
            start = time.perf_counter()
            assert sum(map(len, workers.in_threads(forward, batches))) == options.images
            return options.images / (time.perf_counter() - start)

        ours(), theirs()
        found = measure.in_turns(options.repeats, ours=ours, theirs=theirs)
    figures = f"{measure.median(found['ours'])} images/s / {measure.median(found['theirs'])} of the bare forward pass"
    measure.show(measure.Claim("extract", measure.ratios(found["ours"], found["theirs"]), 0.9, figures=figures))


if __name__ == "__main__":
    main()
