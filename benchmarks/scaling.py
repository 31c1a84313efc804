"""From 2,000 to 20,000 images: peak memory of a whole run, and the cost of an image in each data step.

The images are small (about 25 kB), because superlinear costs come from rows, not from pixels. Memory is the sampled
proportional set size of all processes of a run. The cost of an image is wall-clock time, without the time for the
first 200 images. A ratio compares this cost at 20,000 images with the cost at 2,000; 1 is linear.

Each step runs again on the folders of a finished run, in a separate process for each size. In a shared process, rows
are scattered in the heap, and a row of 20,000 costs up to a fifth more. Each run with 20,000 images is between ten runs
with 2,000, five before and five after, because a machine's speed may change within seconds.

    python -m benchmarks.scaling [--repeats 2] [--images 3] [--rows 21]
"""

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks import dataset, endpoint, measure
from dgmd_pipeline import cli, settings
from dgmd_pipeline.tasks import data
from dgmd_pipeline.workflow import folders, run_context

LEAST, FEW, MANY = 200, 2_000, 20_000
BY_IMAGES = {
    "raw": data.DownloadImages,
    "inspected": data.InspectImages,
    "tfrecord_training": partial(data.WriteTFRecords, split="training"),
}
BY_ROWS = {"label_map": data.MapLabels, "balanced": data.BalanceClasses, "split": data.SplitImages}
AROUND = MANY // FEW // 2


def main() -> None:
    arguments = measure.arguments(__doc__, repeats=2, images=3, rows=21)
    with contextlib.ExitStack() as stack:
        environments = {}
        for count in (LEAST, FEW, MANY):
            raw = dataset.make(measure.WORK / f"small-{count}", count, dataset.SMALL)
            where = endpoint.VARIABLES | {"AWS_ENDPOINT_URL": stack.enter_context(endpoint.serving(raw))}
            light = {"BACKBONE": "MobileNetV3-Small", "IMAGE_WIDTH": 128, "IMAGE_HEIGHT": 96}
            data = Path(stack.enter_context(measure.folder()), "data")
            environments[count] = measure.environment(**measure.variables(**where, **light, EPOCHS=3, DATA_DIR=data))
        peak_of(environments[LEAST])
        peaks = measure.interleave(
            arguments.repeats,
            few=lambda: peak_of(environments[FEW], "run", "--force", "download"),
            many=lambda: peak_of(environments[MANY], "run", "--force", "download"),
        )
        costs = [cost(environments, step, arguments.images) for step in BY_IMAGES]
        costs += [cost(environments, step, arguments.rows) for step in BY_ROWS]
    figures = f"{measure.median(peaks['many'])} / {measure.median(peaks['few'])} MiB"
    what = "peak memory, times that of a tenth of the images"
    ratios = measure.ratios(peaks["many"], peaks["few"])
    measure.show(measure.Claim(what, ratios, 1.15, at_least=False, figures=figures), *costs)


def cost(environments: dict[int, dict[str, str]], step: str, repeats: int) -> measure.Claim:
    """Measure the cost of an image in a step at MANY images, relative to FEW."""
    found: dict[int, list[float]] = {LEAST: [], FEW: [], MANY: []}
    with contextlib.ExitStack() as stack:
        processes = {count: stack.enter_context(process(environments[count])) for count in found}

        def seconds(count: int) -> float:
            return processes[count].submit(seconds_of, step).result()

        for count in found:
            seconds(count)  # import modules, start processes
        for number in range(repeats):
            before = [(seconds(LEAST), seconds(FEW)) for _ in range(AROUND)]
            found[MANY].append(seconds(MANY))
            after = [(seconds(LEAST), seconds(FEW)) for _ in range(AROUND)]
            for count, values in zip((LEAST, FEW), zip(*before, *after, strict=True), strict=True):
                found[count].append(statistics.mean(values))
            print(f"  {number + 1}/{repeats} {step}: {found[MANY][-1]:.4g}", file=sys.stderr, flush=True)
    cost_at_many = [(many - least) / (MANY - LEAST) for many, least in zip(found[MANY], found[LEAST], strict=True)]
    cost_at_few = [(few - least) / (FEW - LEAST) for few, least in zip(found[FEW], found[LEAST], strict=True)]
    figures = " / ".join(measure.median(values, " s") for values in reversed(found.values()))
    what = f"cost of an image, times linear: {step}"
    return measure.Claim(what, measure.ratios(cost_at_many, cost_at_few), 1.1, at_least=False, figures=figures)


@contextlib.contextmanager
def process(environment: dict[str, str]):
    """Start a process with the run context of these variables."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin, initargs=(environment,)) as worker:
        yield worker
        worker.submit(end).result()


def begin(environment: dict[str, str]) -> None:
    global context
    os.environ.update(environment)
    gc.set_threshold(cli.ROWS_BETWEEN_COLLECTIONS)
    # Forced, because the steps would reuse what is in their folders.
    forced = dict.fromkeys(("inspected", "tfrecord_training"), "benchmark")
    context = run_context.RunContext(settings.Settings(), forced=forced)


def end() -> None:
    context.executor.close()


def seconds_of(step: str) -> float:
    """Do the work of a step again, in another folder; return its seconds."""
    data_dir = context.settings.data_dir
    with tempfile.TemporaryDirectory(dir=data_dir.parent) as folder:
        draft = Path(folder, "draft")
        (draft / folders.RESUME).mkdir(parents=True)
        of = context
        if step == "raw":  # with the existing folder, nothing would be downloaded
            elsewhere = context.settings.model_copy(update={"data_dir": Path(folder, "data")})
            of = run_context.RunContext(elsewhere, context.executor)
        with run_context.activate(of):
            start = time.perf_counter()
            (BY_IMAGES | BY_ROWS)[step]().work(draft)
            return time.perf_counter() - start


def peak_of(environment: dict[str, str], *words: str) -> float:
    """Run the pipeline and return the peak memory of all its processes together, in MiB."""
    peak = 0
    process = subprocess.Popen(
        [sys.executable, "pipeline.py", *words], cwd=measure.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        peak = max(peak, sum(map(memory_of, process_tree(process.pid))))
        time.sleep(0.2)
    assert process.stdout
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the pipeline ended with exit code {process.returncode}:\n{output[-2000:]}")
    return peak / 2**20


def process_tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            children = (path.read_text() for path in Path(f"/proc/{each}/task").glob("*/children"))
            found += [int(word) for text in children for word in text.split()]
    return found


def memory_of(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
