"""Downloading 170 kB objects from a local endpoint: compared with s5cmd and boto3's `download_file` in 32 threads.

The endpoint is cheap (`endpoint.py`), so the client dominates the measurement. CPU time is measured in the client's
process, without Python's imports. Objects are written to memory (/dev/shm, if it exists), because creating a file
took 0.1 to 0.6 ms on the same disk. Results on the disk are reported separately.

    python -m benchmarks.downloading [--repeats 5]
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import dataset, endpoint, measure

MEMORY = Path("/dev/shm")  # noqa: S108
FETCH = "import sys; from benchmarks import downloading as d; print(*d.{}(sys.argv[1]))"


def ours(folder: str) -> tuple[float, float]:
    """Return CPU and wall-clock seconds of listing and downloading with the pipeline's functions."""
    import s3transfer.crt  # noqa: F401

    from dgmd_pipeline.s3 import client as s3_client
    from dgmd_pipeline.s3 import download, listing

    s3_client.connect()  # import its modules
    start, cpu = time.perf_counter(), time.process_time()
    client = s3_client.connect()
    objects = listing.list_objects(client, endpoint.BUCKET, endpoint.PREFIX).objects
    assert sum(1 for _ in download.download(client, endpoint.BUCKET, objects, Path(folder))) == dataset.FILES
    return time.process_time() - cpu, time.perf_counter() - start


def download_file(folder: str) -> tuple[float, float]:
    """Return CPU and wall-clock seconds of listing and downloading with boto3's `download_file`."""
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
        assert len(list(threads.map(fetch, keys))) == dataset.FILES
    return time.process_time() - cpu, time.perf_counter() - start


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=5).repeats
    raw = dataset.make(measure.WORK / "spice")
    with endpoint.serving(raw) as url:
        if MEMORY.is_dir():
            with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
                measure.show(*claims(url, scratch, repeats, "download"))
        with measure.folder() as scratch:
            measure.show(*claims(url, scratch, repeats, "download to the disk", with_goals=not MEMORY.is_dir()))


def claims(url: str, scratch: str, repeats: int, what: str, with_goals: bool = True) -> list[measure.Claim]:
    s5cmd = Path(sys.executable).with_name("s5cmd")
    where = endpoint.VARIABLES | {"AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
    wall: dict[str, list[float]] = {"ours": [], "download_file": [], "s5cmd": []}

    def python(name: str) -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            ran = measure.run(sys.executable, "-c", FETCH.format(name), folder, **where)
        cpu, seconds = map(float, ran.output.split())
        wall[name].append(seconds)
        return cpu / dataset.FILES * 1e3

    def go() -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            start = time.perf_counter()
            objects = f"s3://{endpoint.BUCKET}/{endpoint.PREFIX}/*"
            cpu = measure.run(s5cmd, "--log", "error", "cp", objects, f"{folder}/", **where).seconds
            wall["s5cmd"].append(time.perf_counter() - start)
            assert sum(len(files) for _, _, files in os.walk(folder)) == dataset.FILES
        return cpu / dataset.FILES * 1e3

    clients = {"ours": lambda: python("ours"), "download_file": lambda: python("download_file"), "s5cmd": go}
    cpu = measure.interleave(repeats, **clients)
    ms = {name: measure.median(values, " ms") for name, values in cpu.items()}
    speed = {name: measure.median([dataset.FILES / seconds for seconds in wall[name]], "/s") for name in wall}
    times_s5cmd = measure.ratios(cpu["ours"], cpu["s5cmd"])
    times_less = measure.ratios(cpu["download_file"], cpu["ours"])
    of_s5cmd = measure.ratios(wall["s5cmd"], wall["ours"])
    goals = (3, 1.5, 0.9) if with_goals else (None, None, None)
    return [
        measure.Claim(
            f"{what}, CPU for each object, times s5cmd's",
            times_s5cmd, goals[0], at_least=False, figures=f"{ms['ours']} / {ms['s5cmd']}",
        ),
        measure.Claim(
            f"{what}, CPU for each object, times less than `download_file`'s",
            times_less, goals[1], figures=f"{ms['download_file']} / {ms['ours']}",
        ),
        measure.Claim(
            f"{what}, objects/s, of s5cmd's", of_s5cmd, goals[2], figures=f"{speed['ours']} / {speed['s5cmd']}"
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
