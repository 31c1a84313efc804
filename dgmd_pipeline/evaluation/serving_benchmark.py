"""Benchmarks a saved model in a clean process: its predictions, load time, latency, throughput and memory.

The process has nothing of the training in memory: it loads the model from its file, as a service does. The process also
times the production model, because times from different machines are not comparable. The two models predict
alternately.
"""

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.serving import inputs
from dgmd_pipeline.training import networks, runtime

if TYPE_CHECKING:
    import keras

IMAGES = 32  # images of a benchmark; the model predicts their records and their original files
# Each model predicts single images until SECONDS have passed, but at least MIN_SINGLES and at most MAX_SINGLES times.
MIN_SINGLES, MAX_SINGLES = 20, 100
SECONDS = 1.0
# Predictions are equal if no probability differs by more than TOLERANCE. Small differences occur: the process runs the
# whole model, but the evaluation may run only the head on stored features.
TOLERANCE = 1e-3
TIMEOUT_MINUTES = 10
# Keras imports these libraries if they are installed. The process prevents the imports. This saves 1.3 CPU seconds and
# 150 MB.
UNUSED = ("matplotlib", "pandas", "sklearn")


class Process(subprocess.Popen[bytes]):
    """A process that loads one model (`load`) and then runs one benchmark (`benchmark`).

    It ends after the benchmark, after its `with` block, after `end`, or when its parent ends.
    """

    loading = False  # whether `load` was called

    def load(self, path: Path) -> None:
        """Let the process load the model in the file `path` (.keras). Further calls have no effect."""
        if not self.loading:
            self.loading = True
            self.send(path)

    def send(self, path: Path) -> None:
        """Send a path to the process as a line of its standard input."""
        assert self.stdin is not None  # noqa: S101 - `start_process` opens a pipe
        with contextlib.suppress(BrokenPipeError):  # the process has died; `communicate` returns its error output
            self.stdin.write(json.dumps(str(path.resolve())).encode() + b"\n")
            self.stdin.flush()

    def __exit__(self, *details: Any) -> None:
        self.kill()
        super().__exit__(*details)

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.__exit__(None, None, None)


@dataclass(frozen=True)
class ProductionBenchmark:
    """Production's figures, and the ratios of the model's figures to production's."""

    latency_p50_ms: float  # median time to predict one image
    latency_ratio: float
    bytes: int  # size of the file
    size_ratio: float


@dataclass(frozen=True)
class ServedPredictions:
    """Predictions for original files, compared with those for their records."""

    images: int  # files that could be read
    other_labels: int  # files for which the model predicts another label than for their record
    largest_difference: float  # largest difference of a probability between a file and its record, 0 to 1


@dataclass(frozen=True)
class ServingBenchmark:
    """How a saved model serves."""

    load_seconds: float  # CPU time to load the model, without the import of the libraries
    latency_p50_ms: float  # median time to predict one image
    latency_p95_ms: float
    images_per_second: float  # throughput in batches of `batch` images
    batch: int
    bytes: int  # size of the model's file
    peak_memory_bytes: int  # of the process, with TensorFlow
    parameters: int
    predictions_equal: bool  # whether no probability differs by more than TOLERANCE from the expected one
    largest_difference: float  # largest difference of a probability from the expected one, 0 to 1
    production: ProductionBenchmark | None = None  # None if there is no production model to time
    served: ServedPredictions | None = None  # None if there were no original files


def start_process(environment: Mapping[str, str] | None = None) -> Process:
    """Start a process that imports TensorFlow and then waits for `benchmark`. The import takes seconds."""
    command = [sys.executable, "-m", __spec__.name]
    root = Path(__file__).parents[2]
    return Process(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def benchmark(
    process: Process,
    images: np.ndarray,
    recorded: np.ndarray,
    scratch: Path,
    production: Path | None = None,
    files: Sequence[Path] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> ServingBenchmark:
    """Benchmark a model in a clean process.

    `process`: a process from `start_process` whose method `load` was called. Each benchmark needs a new process.
    `images`: uint8 [n, height, width, 3].
    `recorded`: the probabilities that are expected for the images, float [n, classes].
    `scratch`: an existing folder for temporary files.
    `production`: the file of another model. Both models are timed alternately.
    `files`: the original files of the images. If there are any, the model predicts them, too.
    `meanwhile`: is called while the process loads the model. The process measures throughput and latency after
    `meanwhile` has returned, so that the call does not disturb the measurement.

    Raises PipelineError if the model cannot be used in the process, or if the process does not answer within
    TIMEOUT_MINUTES.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        task = Path(folder, "task.npz")
        answer = task.with_suffix(".json")
        np.savez(
            task,
            images=images,
            recorded=recorded,
            production=np.array([str(production.resolve())] if production else [], np.str_),
            files=np.array([str(each.resolve()) for each in files], np.str_),
        )
        stderr = b""
        try:
            stderr = _exchange(process, task, meanwhile)
        except subprocess.TimeoutExpired:
            process.kill()
            if not answer.exists():
                raise PipelineError(
                    f"The model did not answer within {TIMEOUT_MINUTES} minutes in a clean process."
                ) from None
        if not answer.exists():
            raise PipelineError(_explain_failure(process.returncode, stderr.decode(errors="replace")))
        return from_json(json.loads(answer.read_text("utf-8")))


def _exchange(process: Process, task: Path, meanwhile: Callable[[], None]) -> bytes:
    """Send the path of a task, and return the error output of the process when it has ended.

    The process measures times after `meanwhile` has returned and `communicate` has closed the pipe. Raises
    TimeoutExpired.
    """
    process.send(task)
    meanwhile()
    return process.communicate(timeout=60 * TIMEOUT_MINUTES)[1]


def _explain_failure(code: int, stderr: str) -> str:
    killed = ", killed, probably because memory ran out" if code < 0 else ""
    last = (stderr.strip().splitlines() or ["no error output"])[-1][:300]
    return f"The model could not be used in a clean process (exit code {code}{killed}): {last}"


def to_json(found: ServingBenchmark) -> dict[str, object]:
    """Return a benchmark as the values of assessment.json. Values that were not measured are left out."""
    values = asdict(found)
    production, served = values.pop("production"), values.pop("served")
    if production:
        ratios = {"latency_ratio", "size_ratio"}
        values |= {name if name in ratios else f"production_{name}": value for name, value in production.items()}
    if served:
        values |= {f"served_{name}": value for name, value in served.items()}
    return values


def from_json(values: Mapping[str, Any]) -> ServingBenchmark:
    """Return a benchmark from the values of assessment.json. Raises TypeError for other values."""
    own = dict(values)
    production, served = None, None
    if "latency_ratio" in own:
        production = ProductionBenchmark(
            latency_p50_ms=own.pop("production_latency_p50_ms"),
            latency_ratio=own.pop("latency_ratio"),
            bytes=own.pop("production_bytes"),
            size_ratio=own.pop("size_ratio"),
        )
    if "served_images" in own:
        names = ("images", "other_labels", "largest_difference")
        served = ServedPredictions(*(own.pop(f"served_{name}") for name in names))
    return ServingBenchmark(**own, production=production, served=served)


class _Loaded(NamedTuple):
    """A model that was loaded from its file and traced."""

    path: Path
    network: "keras.Model"
    seconds: float  # CPU time of the loading


def _load(path: Path) -> _Loaded:
    start = time.process_time()
    network = networks.load(path)
    seconds = time.process_time() - start
    _trace(network)
    return _Loaded(path, network, seconds)


def _measure(loaded: _Loaded, task: Path, wait_until_idle: Callable[[], object]) -> ServingBenchmark:
    """Run the benchmark that `benchmark` wrote to `task`, in this process.

    `wait_until_idle` returns when nothing else runs that could disturb latency and throughput.
    """
    with np.load(task, allow_pickle=False) as file:
        images, recorded = file["images"], file["recorded"]
        others, files = ([Path(each) for each in file[name].tolist()] for name in ("production", "files"))
    network, path = loaded.network, loaded.path
    # The first call takes longer. The next one does not, although it has another number of images.
    _predict(network, images[:1])
    wait_until_idle()
    predicted, batch_seconds = _predict_timed(network, images)
    memory = _peak_memory()  # before another model is loaded
    difference = float(np.abs(predicted - recorded).max())
    rivals = [_load(other).network for other in others]
    for rival in rivals:
        _predict(rival, images[:1])
    singles = _time_alternately(images, network, *rivals)
    p50, p95 = (1e3 * float(np.quantile(singles[0], share)) for share in (0.5, 0.95))
    found = ServingBenchmark(
        load_seconds=loaded.seconds,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        images_per_second=len(images) / batch_seconds,
        batch=len(images),
        bytes=path.stat().st_size,
        peak_memory_bytes=memory,
        parameters=network.count_params(),
        predictions_equal=difference <= TOLERANCE,
        largest_difference=difference,
    )
    for other, seconds in zip(others, singles[1:], strict=True):
        median, size = 1e3 * float(np.median(seconds)), other.stat().st_size
        found = replace(found, production=ProductionBenchmark(median, p50 / median, size, found.bytes / size))
    if files:
        # Original files can be large. If the process dies of them, the parent still gets this answer.
        _answer(task, found)
        found = replace(found, served=_predict_files(network, files, recorded))
    return found


def _predict_files(network: "keras.Model", files: Sequence[Path], recorded: np.ndarray) -> ServedPredictions:
    """Read original files as a service does, predict them, and compare with the predictions for their records."""
    pixels, rows = [], []
    for row, path in enumerate(files):
        with contextlib.suppress(OSError, inputs.InvalidImage):  # deleted or changed since; not counted
            pixels.append(inputs.read(path.read_bytes(), network))
            rows.append(row)
    if not pixels:
        return ServedPredictions(0, 0, 0.0)
    found, expected = _predict(network, np.stack(pixels)), recorded[rows]
    other_labels = int((found.argmax(axis=1) != expected.argmax(axis=1)).sum())
    return ServedPredictions(len(pixels), other_labels, float(np.abs(found - expected).max()))


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    # On Linux, the value of getrusage(2) starts at the memory of the parent process, which has trained a model.
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text("ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _trace(network: "keras.Model") -> None:
    """Trace the function that `predict` calls, for any number and size of images.

    Otherwise Keras would trace the function again for each new number or size. Each trace takes 0.7 CPU seconds.
    """
    import tensorflow as tf

    network.make_predict_function()
    network.predict_function.get_concrete_function([tf.TensorSpec(network.input_shape, tf.uint8)])


def _time_alternately(images: np.ndarray, *networks: "keras.Model") -> list[list[float]]:
    """Return for each network the seconds that each prediction of one image takes. The networks predict alternately."""
    seconds: list[list[float]] = [[] for _ in networks]
    end = time.perf_counter() + SECONDS
    for number, image in enumerate(itertools.islice(itertools.cycle(images), MAX_SINGLES)):
        if number >= MIN_SINGLES and time.perf_counter() > end:
            break
        for network, of_network in zip(networks, seconds, strict=True):
            of_network.append(_predict_timed(network, image[np.newaxis])[1])
    return seconds


def _predict_timed(network: "keras.Model", images: np.ndarray) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    predicted = _predict(network, images)
    return predicted, time.perf_counter() - start


def _predict(network: "keras.Model", images: np.ndarray) -> np.ndarray:
    return network.predict(images, verbose=0)  # the call that MLflow's Keras models make


def _answer(task: Path, found: ServingBenchmark) -> None:
    task.with_suffix(".json").write_text(json.dumps(to_json(found)), "utf-8")


def _serve(requests: TextIO) -> None:
    """Load the model that the first line names, and run the benchmark that the second line names."""
    if not (model := requests.readline()):
        return  # the parent has exited
    loaded = _load(Path(json.loads(model)))
    if line := requests.readline():
        task = Path(json.loads(line))
        _answer(task, _measure(loaded, task, requests.read))  # the parent closes the pipe when it is idle


if __name__ == "__main__":
    # If memory runs out while this process waits, Linux kills this process and not the training.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")
    for _name in UNUSED:
        sys.modules[_name] = None  # type: ignore[assignment]  # None: an import of it raises ImportError
    runtime.start_tensorflow()
    _serve(sys.stdin)
    os._exit(0)  # the teardown of TensorFlow takes a second
