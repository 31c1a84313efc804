"""A saved model in a clean process -> how it behaves in operation: answers, load time, latency, throughput, memory.

The process knows nothing of the run: it gets the path of the model, pictures, and the paths of original files. Seconds
of different machines do not compare, so production is timed in the same process, in turns.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image

from dgmd_pipeline.data import decoding
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import networks, runtime

if TYPE_CHECKING:
    import keras

PICTURES = 32  # that it is tried on, also the size of the batch
SINGLES, SECONDS = 10, 2.0  # predictions of one picture that are timed: at least so many, and for so long
BATCHES = 2
TOLERANCE = 1e-3  # of probabilities: stored features went through another graph than the whole model does
ORIGINALS = 100  # files that are predicted at most, one by one: 3 CPU seconds with MobileNetV2
MINUTES = 10  # after which a model that has not answered will not


class Originals(NamedTuple):
    """Original image files, and what was measured from their records."""

    files: Sequence[Path] = ()
    recorded: np.ndarray = np.empty((0, 0), np.float32)  # probabilities, float [files, classes]


@contextlib.contextmanager
def start_process(environment: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """Give a process that starts TensorFlow, which takes seconds, and waits for `assess`; it ends with the block."""
    command = [sys.executable, "-m", __spec__.name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, env=environment, **pipes) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.kill()


def benchmark(
    process: "subprocess.Popen[bytes]",
    path: Path,
    pictures: np.ndarray,
    recorded: np.ndarray,
    scratch: Path,
    production: Path | None = None,
    originals: Originals = Originals(),  # noqa: B008  # immutable
) -> dict[str, Any]:
    """Try the model in the file `path` (.keras) in a `clean_process`, which ends by it; return what was measured.

    `pictures` is uint8 [n, height, width, 3], `recorded` the probabilities that are known for them, float [n, classes].
    `scratch` is a folder that may be written in.

    Returns plain values for JSON: load_seconds (the libraries' start aside); latency_p50_ms and latency_p95_ms of one
    picture; images_per_second in a batch of `batch`; bytes of the file; peak_memory_bytes of the process (TensorFlow
    included); parameters; predictions_equal, and the largest_difference of a probability. With `production`, the
    file of another model, also production_latency_p50_ms, latency_ratio, production_bytes and size_ratio: this
    model's figures over the other's.

    With `originals` also served_images, how many of the files could be read; served_other_labels, for how many of them
    the model names another label than was measured from the record; and served_largest_difference of a probability.

    Raises PipelineError where the model cannot be used there.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        task = Path(folder, "task.npz")
        models = [str(each.resolve()) for each in (path, production) if each]
        files = np.array([str(each.resolve()) for each in originals.files], np.str_)
        np.savez(
            task,
            pictures=pictures, recorded=recorded, models=np.array(models), files=files, of_files=originals.recorded,
        )  # fmt: skip
        said = b""
        try:
            _, said = process.communicate(os.fsencode(task.resolve()), timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            if not task.with_suffix(".json").exists():
                raise PipelineError(
                    f"In a process of its own the model did not answer within {MINUTES} minutes."
                ) from None
            process.kill()
        answer = task.with_suffix(".json")
        if not answer.exists():
            killed = " (killed, most likely for want of memory)" if process.returncode < 0 else ""
            last = (said.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:300]
            raise PipelineError(
                f"A process of its own could not use the model: it ended with {process.returncode}{killed}: {last}"
            )
        return json.loads(answer.read_text("utf-8"))


def _measure(task: Path) -> dict[str, Any]:
    """Do what `assess` promises, in this process."""
    with np.load(task, allow_pickle=False) as file:
        pictures, recorded = file["pictures"], file["recorded"]
        path, *others = map(Path, file["models"].tolist())
        originals = Originals([Path(each) for each in file["files"].tolist()], file["of_files"])
    start = time.perf_counter()
    network = networks.load(path)
    loaded = time.perf_counter() - start
    difference = float(np.abs(_predict(network, pictures) - recorded).max())
    batch = sum(_timed(network, pictures) for _ in range(BATCHES)) / BATCHES
    singles = [] if others else _in_turns(pictures, network)
    memory = _peak_memory()
    if others:
        singles = _in_turns(pictures, network, *map(networks.load, others))
    p50, p95 = (1e3 * float(np.quantile(singles[0], share)) for share in (0.5, 0.95))
    found = {
        "load_seconds": loaded,
        "latency_p50_ms": p50,
        "latency_p95_ms": p95,
        "images_per_second": len(pictures) / batch,
        "batch": len(pictures),
        "bytes": path.stat().st_size,
        "peak_memory_bytes": memory,
        "parameters": network.count_params(),
        "predictions_equal": difference <= TOLERANCE,
        "largest_difference": difference,
    }
    for other, seconds in zip(others, singles[1:], strict=True):
        median = 1e3 * float(np.median(seconds))
        found |= {
            "production_latency_p50_ms": median,
            "latency_ratio": p50 / median,
            "production_bytes": other.stat().st_size,
            "size_ratio": path.stat().st_size / other.stat().st_size,
        }
    if originals.files:
        # Originals can be large. Where the process dies of them, what it has measured is known by then.
        task.with_suffix(".json").write_text(json.dumps(found), "utf-8")
        found |= _served(network, originals)
    return found


def _served(network: "keras.Model", originals: Originals) -> dict[str, Any]:
    """Predict the original files as a service does, and compare with what was measured from their records."""
    read, differences, labels = 0, [0.0], 0
    for path, recorded in zip(originals.files, originals.recorded, strict=True):
        try:
            pixels = np.asarray(decoding.open_rgb(path))
        except (*decoding.DAMAGED, PIL.Image.DecompressionBombError):  # gone, or changed since: served_images says so
            continue
        found = network.predict_on_batch(pixels[np.newaxis])[0]
        read += 1
        labels += int(found.argmax() != recorded.argmax())
        differences.append(float(np.abs(found - recorded).max()))
    return {"served_images": read, "served_other_labels": labels, "served_largest_difference": max(differences)}


def _peak_memory() -> int:
    """Return the most that this process has held, in bytes."""
    # On Linux getrusage(2) begins with what the process held that has started this one: a whole training.
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text("ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _in_turns(pictures: np.ndarray, *networks: "keras.Model") -> list[list[float]]:
    """Return for each network the seconds of predictions of one picture; the networks take turns."""
    seconds: list[list[float]] = [[] for _ in networks]
    for network in networks:
        _predict(network, pictures[:1])  # traces
    end = time.perf_counter() + SECONDS * len(networks)
    for number, picture in enumerate(itertools.cycle(pictures)):
        if number >= SINGLES and time.perf_counter() > end:
            break
        for network, its in zip(networks, seconds, strict=True):
            its.append(_timed(network, picture[np.newaxis]))
    return seconds


def _timed(network: "keras.Model", pictures: np.ndarray) -> float:
    start = time.perf_counter()
    _predict(network, pictures)
    return time.perf_counter() - start


def _predict(network: "keras.Model", pictures: np.ndarray) -> np.ndarray:
    return network.predict(pictures, verbose=0)  # as MLflow's Keras models do


if __name__ == "__main__":
    runtime.start_tensorflow()
    if _asked := sys.stdin.buffer.read():  # nothing: whoever would have asked has ended
        _task = Path(os.fsdecode(_asked))
        _answer = json.dumps(_measure(_task))
        _task.with_suffix(".json").write_text(_answer, "utf-8")
    os._exit(0)  # Python would take TensorFlow apart for a second
