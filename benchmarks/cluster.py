"""A Dask cluster of two workers on this machine: compared with the local pool with two processes.

Needs the extra `cluster`.

    python -m benchmarks.cluster [--repeats 5] [--images 1500]
"""

import contextlib
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks import dataset, measure
from benchmarks.writing import HEIGHT, WIDTH, rows_of
from dgmd_pipeline.data import inspection, shards
from dgmd_pipeline.settings import provide_worker_defaults
from dgmd_pipeline.workflow import executors, lock
from dgmd_pipeline.workflow.cluster import ClusterExecutor


def main() -> None:
    from distributed import LocalCluster

    options = measure.arguments(__doc__, repeats=5, images=1500)
    raw = dataset.make(measure.WORK / "spice")
    files = list(islice(inspection.find(raw), options.images))
    rows = rows_of(files)
    workers = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with measure.folder() as scratch, lock.hold(Path(scratch)), workers:
        provide_worker_defaults()  # also resets what Dask's nannies set for this process
        cluster = ClusterExecutor(workers.scheduler_address, Path(scratch).resolve(), provide_worker_defaults)

        def inspect(pool: executors.Executor) -> int:
            map_files = partial(pool.map, chunk=inspection.CHUNK)
            return len(inspection.inspect(files, raw, Path(tempfile.mkdtemp(dir=scratch)), map_files)[0])

        def write(pool: executors.Executor) -> int:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            return shards.write(rows, raw, folder, "training", 10, WIDTH, HEIGHT, "stretch", pool.map).counts["images"]

        with contextlib.closing(executors.ProcessExecutor(2)) as local, contextlib.closing(cluster):
            measure.show(
                *(
                    measure.images_per_second(
                        f"{what} on a Dask cluster", 0.9, len(files), partial(function, cluster),
                        partial(function, local), "the local pool", options.repeats,
                    )
                    for what, function in (("inspect", inspect), ("write TFRecords", write))
                )
            )  # fmt: skip


if __name__ == "__main__":
    main()
