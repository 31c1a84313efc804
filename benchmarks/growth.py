"""From 2,000 to 20,000 pictures: peak memory of a whole run, and what a picture costs in each data stage.

Small pictures (about 25 kB), because what grows faster than it should is made of rows, not of pixels. Memory is what
all processes of a run hold together (proportional set size), sampled. The cost is wall-clock seconds without what a
stage takes for the first 200 pictures (processes start, modules are imported): a picture of the 20,000 against one of
the 2,000; a ratio of 1 is linear. For the cost a second run ends before the first stage that needs TensorFlow, so that
its start is not measured beside them, and the stages' own records say how long they took. Those that work on rows alone
take milliseconds: each is done again several times, here, for the three sizes in turns, on what the runs have left.

    python -m benchmarks.growth [--repeats 2]
"""

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import endpoint, measure, pictures
from dgmd_pipeline import cli, settings, step, tasks

LEAST, FEW, MANY = 200, 2_000, 20_000
BY_PICTURES = ("raw", "inspected", "tfrecord_training")
BY_ROWS = (tasks.MapLabels, tasks.BalanceClasses, tasks.SplitImages)
TIMES = 61


def main() -> None:
    repeats = measure.arguments(__doc__, repeats=2).repeats
    gc.set_threshold(cli.ROWS_BETWEEN_COLLECTIONS)
    seconds: dict[int, list[dict[str, float]]] = {LEAST: [], FEW: [], MANY: []}
    with contextlib.ExitStack() as stack:
        folders = {count: Path(stack.enter_context(measure.folder()), "data") for count in seconds}

        def run(count: int) -> float:
            raw, data = pictures.make(measure.WORK / f"small-{count}", count, pictures.SMALL), folders[count]
            with endpoint.serving(raw) as url:
                where = endpoint.VARIABLES | {"AWS_ENDPOINT_URL": url}
                light = {"BACKBONE": "MobileNetV3-Small", "IMAGE_WIDTH": 128, "IMAGE_HEIGHT": 96}
                environment = measure.environment(**measure.variables(**where, **light, EPOCHS=3, DATA_DIR=data))
                shutil.rmtree(data, ignore_errors=True)
                peak = peak_of(environment)
                shutil.rmtree(data)
                peak_of(environment, "run", "--until", "convert")
            records = {name: json.loads((data / name / "_SUCCESS").read_text()) for name in BY_PICTURES}
            seconds[count].append({name: record["seconds"] for name, record in records.items()})
            return peak / 2**20

        found = measure.in_turns(repeats, least=lambda: run(LEAST), few=lambda: run(FEW), many=lambda: run(MANY))
        rows: dict[int, list[dict[str, float]]] = {count: [] for count in folders}
        for _ in range(TIMES):  # in turns: a machine's speed may change within seconds
            for count, data in folders.items():
                rows[count].append(rows_of(data))
    figures = f"{measure.median(found['many'])} / {measure.median(found['few'])} MiB"
    claims = [
        measure.Claim(
            "peak memory, times that of a tenth of the pictures",
            measure.ratios(found["many"], found["few"]), 1.15, at_least=False, figures=figures,
        )
    ]  # fmt: skip
    for measured in (seconds, rows):
        for stage in measured[FEW][0]:
            many, few, least = ([run[stage] for run in measured[count]] for count in (MANY, FEW, LEAST))
            dear = [(value - start) / (MANY - LEAST) for value, start in zip(many, least, strict=True)]
            cheap = [(value - start) / (FEW - LEAST) for value, start in zip(few, least, strict=True)]
            figures = " / ".join(measure.median(values, " s") for values in (many, few, least))
            what = f"cost of a picture, times linear: {stage}"
            claims.append(measure.Claim(what, measure.ratios(dear, cheap), 1.1, at_least=False, figures=figures))
    measure.show(*claims)


def rows_of(data: Path) -> dict[str, float]:
    """Return the seconds that each stage takes which works on the rows in `data` alone."""
    job = step.Job(settings.Settings(DATA_DIR=data))
    seconds = {}
    for kind in BY_ROWS:
        with tempfile.TemporaryDirectory(dir=data.parent) as draft:
            start = time.perf_counter()
            kind(job=job).work(Path(draft))
            seconds[kind.name] = time.perf_counter() - start
    return seconds


def peak_of(environment: dict[str, str], *words: str) -> int:
    """Run the pipeline and return the largest sum, in bytes, of what its processes held at one time."""
    peak = 0
    process = subprocess.Popen(
        [sys.executable, "pipeline.py", *words], cwd=measure.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        peak = max(peak, sum(map(held, family(process.pid))))
        time.sleep(0.2)
    assert process.stdout
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the pipeline ended with {process.returncode}:\n{output[-2000:]}")
    return peak


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            children = (path.read_text() for path in Path(f"/proc/{each}/task").glob("*/children"))
            found += [int(word) for text in children for word in text.split()]
    return found


def held(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
