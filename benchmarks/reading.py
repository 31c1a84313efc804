"""Records to training batches (for a training without stored features): compared with reading and decoding the bytes.

The baseline decodes with Pillow, with one thread for each core. It does not parse, batch or shuffle.

    python -m benchmarks.reading [--repeats 7]
"""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from benchmarks import dataset, measure
from benchmarks.writing import write

BATCH = 128
ROUNDS = 3  # passes over the data in one measurement


def encoded(folder: Path) -> list[bytes]:
    """Return the WebP files in the records of a folder. Each begins with RIFF and its length."""
    found = []
    for path in sorted(folder.glob("*.tfrecord")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            start = data.index(b"RIFF", at + 12, at + 12 + length)
            found.append(data[start : start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")])
            at += 16 + length
    return found


def decode(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=7).repeats
    raw = dataset.make(measure.WORK / "spice")
    import tensorflow as tf

    from dgmd_pipeline.training import dataset as training_dataset
    from dgmd_pipeline.workflow import machine

    threads = ThreadPoolExecutor(machine.cores())
    with measure.folder() as scratch:
        source = write(raw, Path(scratch), dataset.FILES)

        def ours() -> int:
            epochs = (
                training_dataset.read(source, 1, epoch).batch(BATCH).prefetch(tf.data.AUTOTUNE)
                for epoch in range(ROUNDS)
            )
            return sum(len(x) for epoch in epochs for x, _ in epoch)

        def theirs() -> int:
            rounds = (threads.map(decode, encoded(source)) for _ in range(ROUNDS))
            return sum(1 for decoded in rounds for _ in decoded)

        images = ROUNDS * dataset.FILES
        of = "reading and decoding"
        measure.show(measure.images_per_second("records to batches", 0.8, images, ours, theirs, of, repeats))


if __name__ == "__main__":
    main()
