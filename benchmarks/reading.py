"""Records to training batches (where no features are stored): against reading the same bytes and decoding them.

The baseline decodes with simplejpeg in as many threads as there are cores; it parses nothing, batches nothing and does
not shuffle.

    python -m benchmarks.reading [--repeats 7]
"""

import argparse
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import measure, pictures
from benchmarks.writing import write

BATCH = 128
ROUNDS = 3  # over the data in one measurement


def encoded(folder: Path) -> list[bytes]:
    """Return the JPEGs in the records of a folder, found by their first and last two bytes."""
    found = []
    for path in sorted(folder.glob("*.tfrecord")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            record = data[at + 12 : at + 12 + length]
            found.append(record[record.index(b"\xff\xd8\xff") : record.rindex(b"\xff\xd9") + 2])
            at += 16 + length
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    raw = pictures.make(measure.WORK / "spice")
    import simplejpeg
    import tensorflow as tf

    from dgmd_pipeline import records, workers

    threads = ThreadPoolExecutor(workers.cores())
    with measure.folder() as scratch:
        source = write(raw, Path(scratch), pictures.FILES)

        def ours() -> float:
            start = time.perf_counter()
            done = 0
            for epoch in range(ROUNDS):
                for x, _ in records.read(source, 1, epoch).batch(BATCH).prefetch(tf.data.AUTOTUNE):
                    done += len(x)
            assert done == ROUNDS * pictures.FILES
            return done / (time.perf_counter() - start)

        def theirs() -> float:
            start = time.perf_counter()
            done = 0
            for _ in range(ROUNDS):
                done += sum(1 for _ in threads.map(simplejpeg.decode_jpeg, encoded(source)))
            assert done == ROUNDS * pictures.FILES
            return done / (time.perf_counter() - start)

        ours(), theirs()
        found = measure.in_turns(repeats, ours=ours, theirs=theirs)
    figures = f"{measure.median(found['ours'])} images/s / {measure.median(found['theirs'])} of reading and decoding"
    speed = measure.ratios(found["ours"], found["theirs"])
    measure.show(measure.Claim("records to batches", speed, 0.8, figures=figures))


if __name__ == "__main__":
    main()
