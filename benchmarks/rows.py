"""A million rows: the CPU time and memory of the steps that work on rows, and of a listing of the bucket.

The steps are the label map, balancing, splitting and the order of records, in one process, relative to reading
`images.csv` once, row by row, with Python's csv module. The split of two labels is compared with the split of a tenth
of the rows. Listing a bucket and comparing it with a folder is compared with a list of what botocore lists; another
process answers the requests.

    python -m benchmarks.rows [--repeats 3] [--rows 1000000] [--objects 1000000]
"""

import gc
import hashlib
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from http.server import ThreadingHTTPServer
from multiprocessing import Pipe, Process, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, TypeVar

from benchmarks import endpoint, measure, noop_run
from dgmd_pipeline import cli, environment, manifest
from dgmd_pipeline.data import balance, columns, labels, shards, split
from dgmd_pipeline.manifest import Example, Image, Rejected, SourceObject
from dgmd_pipeline.s3 import client, listing, sync

LABELS = 24
Result = TypeVar("Result")


class Cost(NamedTuple):
    """The cost of a call in its process."""

    seconds: float  # of CPU time
    peak: float  # memory, MiB


def main() -> None:
    options = measure.arguments(__doc__, repeats=3, rows=1_000_000, objects=1_000_000)
    environment.provide(environment.LIBRARY_DEFAULTS)  # as a run does
    with measure.folder() as name:
        few, many, two = (Path(name, each) for each in ("few", "many", "two"))
        for folder, rows, count in ((many, options.rows, LABELS), (few, options.rows // 10, 2), (two, options.rows, 2)):
            in_process(write_images, folder, rows, count)
        size = (many / "inspected.csv").stat().st_size / 2**20
        found = measured(options.repeats, ours=(row_steps, many), csv=(read_rows, many))
        found |= measured(options.repeats, few=(split_rows, few), two=(split_rows, two))
        found |= listing_costs(Path(name), options.objects, options.repeats)
    seconds = {name: [cost.seconds for cost in costs] for name, costs in found.items()}
    peaks = {name: [cost.peak for cost in costs] for name, costs in found.items()}
    sizes = [size] * options.repeats
    rows, objects = f"{options.rows:,} rows", f"listing {options.objects:,} objects and what changed"
    measure.show(
        claim(f"row steps, {rows}, CPU of reading them once", seconds["ours"], seconds["csv"], 5),
        # 2.1 of 175 MiB is less than half of the 772 MiB that tuples of all rows needed
        claim(f"row steps, {rows}, peak memory of the file's size", peaks["ours"], sizes, 2.1, " MiB"),
        claim(f"split, {rows}, 2 labels, times linear", seconds["two"], [10 * each for each in seconds["few"]], 1.1),
        claim(f"{objects}, CPU of botocore's listing", seconds["listing"], seconds["paginator"], 0.7),
        # 0.8 of botocore's 590 MiB is less than half of the 979 MiB that tuples and a dictionary of them needed
        claim(f"{objects}, peak memory of botocore's listing", peaks["listing"], peaks["paginator"], 0.8, " MiB"),
    )


def claim(what: str, over: list[float], under: list[float], goal: float, unit: str = " s") -> measure.Claim:
    figures = f"{measure.median(over, unit)} / {measure.median(under, unit)}"
    return measure.Claim(what, measure.ratios(over, under), goal, at_least=False, figures=figures)


def write_images(folder: Path, rows: int, labels: int) -> None:
    """Write `images.csv` with rows of single images; every fiftieth is a near-duplicate of the one before."""
    folder.mkdir()
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(rows)]

    def image(number: int) -> Image:
        label, own = f"label {number * labels // rows:03d}", hashes[number]
        group = min(own, hashes[number - 1]) if number % 50 == 1 else own
        return Image(f"{label}/photo_{number:08d}.jpeg", label, own, "JPEG", 640, 480, group)

    manifest.write(folder / "inspected.csv", Image, map(image, range(rows)))
    label_and_balance(folder)


def write_listing(folder: Path, objects: int) -> None:
    manifest.write(folder / manifest.LISTING, SourceObject, noop_run.sources(objects))
    manifest.write(folder / manifest.REJECTED, Rejected, [])


def read_rows(folder: Path) -> None:
    for _ in manifest.read(folder / "inspected.csv", Image):
        pass


def label_and_balance(folder: Path) -> None:
    counts = columns.count_labels(folder / "inspected.csv")
    labels.write_label_map(counts, [], 2, folder)
    indexes = {label: index for index, label in enumerate(sorted(counts))}
    balance.write_balanced(folder / "inspected.csv", indexes, None, folder)


def split_rows(folder: Path) -> None:
    split.write_splits(folder / "images.csv", 0.2, folder)


def row_steps(folder: Path) -> None:
    label_and_balance(folder)
    split_rows(folder)
    for name in ("training", "validation"):
        shards.record_order(manifest.read(folder / f"{name}.csv", Example))


def list_pages(_: Path) -> None:
    paginator = client.connect().get_paginator("list_objects_v2")
    assert [each for page in paginator.paginate(Bucket="bucket", Prefix="p/") for each in page["Contents"]]


def list_and_compare(folder: Path) -> None:
    found = listing.list_objects(client.connect(), "bucket", "p")
    changes = sync.compare_folder(folder, found.objects)
    assert changes and changes.reason == f"{len(found.objects):,} missing from the folder"


def serve(objects: int, port: Connection) -> None:
    noop_run.Bucket.objects = noop_run.sources(objects)
    server = ThreadingHTTPServer(("127.0.0.1", 0), noop_run.Bucket)
    port.send(server.server_port)
    server.serve_forever()


def listing_costs(folder: Path, objects: int, repeats: int) -> dict[str, list[Cost]]:
    in_process(write_listing, folder, objects)
    ours, theirs = Pipe()
    server = Process(target=serve, args=(objects, theirs), daemon=True)
    server.start()
    os.environ.update(endpoint.VARIABLES | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}"})
    found = measured(repeats, paginator=(list_pages, folder), listing=(list_and_compare, folder))
    server.terminate()
    return found


def measured(repeats: int, **calls: tuple[Callable[[Path], None], Path]) -> dict[str, list[Cost]]:
    """Make each call `repeats` times in alternating order, each time in a new process."""
    found: dict[str, list[Cost]] = {name: [] for name in calls}
    for number in range(repeats):
        for name, call in list(calls.items())[:: -1 if number % 2 else 1]:
            found[name].append(in_process(cost_of, *call))
            print(f"  {number + 1}/{repeats} {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def in_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call the function in a new process. Its peak memory begins with that of this process, which stays small so."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def cost_of(function: Callable[[Path], None], folder: Path) -> Cost:
    gc.set_threshold(cli.ROWS_BETWEEN_COLLECTIONS)
    before = time.process_time()
    function(folder)
    return Cost(time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
