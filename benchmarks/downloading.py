"""Downloading 170 kB objects from a local endpoint: against s5cmd and against boto3's `download_file` in 32 threads.

The endpoint costs next to nothing (`endpoint.py`), so that what is measured is the client. CPU time is that of the
client's process without its imports: s5cmd's whole one, which has none.

    python -m benchmarks.downloading [--repeats 5]
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import endpoint, measure, pictures

FETCH = "import sys; from benchmarks import downloading as d; print(*d.{}(sys.argv[1]))"


def ours(folder: str) -> tuple[float, float]:
    """Return CPU and wall seconds of listing and downloading as the pipeline does it."""
    import s3transfer.crt  # noqa: F401

    from dgmd_pipeline import bucket

    bucket.connect()  # imports what it needs
    start, cpu = time.perf_counter(), time.process_time()
    client = bucket.connect()
    objects, _ = bucket.list_objects(client, endpoint.BUCKET, endpoint.PREFIX)
    assert sum(1 for _ in bucket.download(client, endpoint.BUCKET, objects, Path(folder))) == pictures.FILES
    return time.process_time() - cpu, time.perf_counter() - start


def download_file(folder: str) -> tuple[float, float]:
    """Return CPU and wall seconds of listing and downloading with boto3's own function."""
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=32)
    boto3.client("s3", config=config)
    start, cpu = time.perf_counter(), time.process_time()
    client = boto3.client("s3", config=config)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=endpoint.BUCKET, Prefix=endpoint.PREFIX)
    keys = [item["Key"] for page in pages for item in page["Contents"]]

    def fetch(key: str) -> None:
        path = Path(folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(endpoint.BUCKET, key, str(path))

    with ThreadPoolExecutor(32) as threads:
        assert len(list(threads.map(fetch, keys))) == pictures.FILES
    return time.process_time() - cpu, time.perf_counter() - start


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=5).repeats
    raw = pictures.make(measure.WORK / "spice")
    s5cmd = Path(sys.executable).with_name("s5cmd")
    with measure.folder() as scratch, endpoint.serving(raw) as url:
        where = endpoint.VARIABLES | {"AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
        wall: dict[str, list[float]] = {"ours": [], "download_file": [], "s5cmd": []}

        def python(name: str) -> float:
            folder = tempfile.mkdtemp(dir=scratch)
            ran = measure.run(sys.executable, "-c", FETCH.format(name), folder, **where)
            shutil.rmtree(folder)
            cpu, seconds = map(float, ran.output.split())
            wall[name].append(seconds)
            return cpu / pictures.FILES * 1e3

        def go() -> float:
            folder = tempfile.mkdtemp(dir=scratch)
            start = time.perf_counter()
            cpu = measure.run(
                s5cmd, "--log", "error", "cp", f"s3://{endpoint.BUCKET}/{endpoint.PREFIX}/*", f"{folder}/", **where
            ).seconds
            wall["s5cmd"].append(time.perf_counter() - start)
            assert sum(len(files) for _, _, files in os.walk(folder)) == pictures.FILES
            shutil.rmtree(folder)
            return cpu / pictures.FILES * 1e3

        cpu = measure.in_turns(
            repeats, ours=lambda: python("ours"), download_file=lambda: python("download_file"), s5cmd=go
        )
    ms = {name: measure.median(values, " ms") for name, values in cpu.items()}
    speed = {name: measure.median([pictures.FILES / seconds for seconds in wall[name]], "/s") for name in wall}
    measure.show(
        measure.Claim(
            "download, CPU for each object, times s5cmd's",
            measure.ratios(cpu["ours"], cpu["s5cmd"]), 3, at_least=False, figures=f"{ms['ours']} / {ms['s5cmd']}",
        ),
        measure.Claim(
            "download, CPU for each object, times less than `download_file`'s",
            measure.ratios(cpu["download_file"], cpu["ours"]), 1.5, figures=f"{ms['download_file']} / {ms['ours']}",
        ),
        measure.Claim(
            "download, objects/s, of s5cmd's",
            measure.ratios(wall["s5cmd"], wall["ours"]), 0.9, figures=f"{speed['ours']} / {speed['s5cmd']}",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
