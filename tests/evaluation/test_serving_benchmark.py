"""Real models, in real processes where the process matters."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgmd_pipeline import settings
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.evaluation import serving_benchmark
from dgmd_pipeline.evaluation.serving_benchmark import ProductionBenchmark, ServedPredictions
from dgmd_pipeline.training import networks as training_networks

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model's file, a larger one's, and the small one's probabilities for IMAGES."""
    folder = tmp_path_factory.mktemp("models")
    networks = []
    for name, size in (("small", 16), ("large", 32)):
        backbone = training_networks.build_cnn(size, size)
        network = training_networks.assemble(
            backbone, training_networks.build_head(backbone.output_shape[-1], 3, 0.1), "stretch"
        )
        network.save(folder / f"{name}.keras")
        networks.append(network)
    return folder / "small.keras", folder / "large.keras", networks[0].predict(IMAGES, verbose=0)


@pytest.fixture(scope="module")
def measured(saved, tmp_path_factory):
    """The small model's benchmark beside the large one, started by a process that holds 2 GB, and its scratch folder.

    The last values are the CPU seconds of the process at the begin of `meanwhile` and at its end, when it has loaded
    the models and waits, and the answers in the scratch folder at that time.
    Original file 7 is missing.
    """
    small, large, recorded = saved
    files, scratch = original_files(tmp_path_factory.mktemp("originals")), tmp_path_factory.mktemp("scratch")
    files[7].unlink()
    seen = []

    def wait(process):
        times = [cpu_seconds(process)]
        while len(times) < 6 or times[-1] > times[-6]:  # half a second without work
            time.sleep(0.1)
            times.append(cpu_seconds(process))
        seen.append((times[0], times[-1], [path.name for path in scratch.rglob("*.json")]))

    held = np.ones(2 * 10**9, np.uint8)  # more than TensorFlow takes with a small model
    with serving_benchmark.start_process() as process:
        process.load(small)
        found = serving_benchmark.benchmark(process, IMAGES, recorded, scratch, large, files, partial(wait, process))
    del held
    return found, scratch, seen


def original_files(folder):
    files = [folder / f"{number}.png" for number in range(len(IMAGES))]
    for path, pixels in zip(files, IMAGES, strict=True):
        Image.fromarray(pixels).save(path)
    return files


def cpu_seconds(process):
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class InThisProcess(serving_benchmark.Process):
    """Answers as the benchmark's process does, without starting TensorFlow again."""

    returncode = 0

    def __init__(self, model):
        self.stdin = io.BytesIO()
        self.load(model)

    def communicate(self, timeout):
        self.stdin.seek(0)
        serving_benchmark._serve(io.TextIOWrapper(self.stdin))
        return b"", b""


def test_the_saved_model_is_measured_in_a_clean_process(saved, measured):
    found, scratch, _ = measured
    assert found.predictions_equal and found.largest_difference < serving_benchmark.TOLERANCE
    assert found.parameters == training_networks.load(saved[0]).count_params()
    assert found.bytes == saved[0].stat().st_size
    assert 0 < found.latency_p50_ms <= found.latency_p95_ms
    assert found.load_seconds > 0 and found.images_per_second > 0 and found.batch == 8
    assert list(scratch.iterdir()) == []


def test_the_process_loads_the_models_while_others_work_and_measures_afterwards(measured):
    ((before, after, answers),) = measured[2]
    assert after > before and answers == []


def test_the_peak_memory_is_that_of_the_process_itself(measured):
    assert 10**8 < measured[0].peak_memory_bytes < 2 * 10**9  # TensorFlow alone takes hundreds of megabytes


def test_predictions_for_original_files_are_compared_with_those_for_their_records(saved, measured, tmp_path):
    assert (measured[0].served.images, measured[0].served.other_labels) == (7, 0)
    others = saved[2].copy()
    others[[3, 5]] = np.roll(others[[3, 5]], 1, axis=1)
    network = training_networks.load(saved[0])
    served = serving_benchmark._predict_files(network, original_files(tmp_path), others)
    assert (served.images, served.other_labels) == (8, 2)
    assert 0.01 < served.largest_difference <= 1


def test_production_is_timed_beside_the_model(saved, measured):
    found, (small, large, _) = measured[0], saved
    assert found.production.bytes == large.stat().st_size
    assert found.production.size_ratio == small.stat().st_size / large.stat().st_size
    assert found.production.latency_ratio == pytest.approx(found.latency_p50_ms / found.production.latency_p50_ms)


def test_other_predictions_are_noticed_and_nothing_else_is_measured_without_other_files(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(serving_benchmark, "SECONDS", 0)
    _, large, recorded_of_small = saved
    found = serving_benchmark.benchmark(InThisProcess(large), IMAGES, recorded_of_small, tmp_path)
    assert not found.predictions_equal and found.largest_difference > serving_benchmark.TOLERANCE
    assert (found.production, found.served) == (None, None)


def test_a_process_that_dies_of_the_original_files_has_answered_before(saved, tmp_path, monkeypatch):
    def die(*_):
        raise MemoryError

    class Dying(InThisProcess):
        returncode = -9

        def communicate(self, timeout):
            with contextlib.suppress(MemoryError):
                super().communicate(timeout)
            return b"", b""

    monkeypatch.setattr(serving_benchmark, "SECONDS", 0)
    monkeypatch.setattr(serving_benchmark, "_predict_files", die)
    files = [tmp_path / "large.png"]
    found = serving_benchmark.benchmark(Dying(saved[0]), IMAGES, saved[2], tmp_path, files=files)
    assert found.predictions_equal and found.served is None


def test_json_values_are_read_again_and_keep_their_keys(measured):
    found = measured[0]
    values = json.loads(json.dumps(serving_benchmark.to_json(found)))
    assert serving_benchmark.from_json(values) == found
    assert isinstance(found.production, ProductionBenchmark) and isinstance(found.served, ServedPredictions)
    assert list(values) == [
        "load_seconds", "latency_p50_ms", "latency_p95_ms", "images_per_second", "batch", "bytes", "peak_memory_bytes",
        "parameters", "predictions_equal", "largest_difference", "production_latency_p50_ms", "latency_ratio",
        "production_bytes", "size_ratio", "served_images", "served_other_labels", "served_largest_difference",
    ]  # fmt: skip


def test_images_of_all_numbers_and_sizes_share_one_trace(saved, tmp_path):
    network = training_networks.load(saved[0])
    serving_benchmark._trace(network)
    path = tmp_path / "larger.png"
    Image.fromarray(IMAGES[0].repeat(2, axis=0)).save(path)
    for count in (8, 1):
        assert np.allclose(serving_benchmark._predict(network, IMAGES[:count]), saved[2][:count], atol=1e-5)
    served = serving_benchmark._predict_files(network, [path], saved[2][:1])
    assert served.images == 1
    assert network.predict_function.experimental_get_tracing_count() == 1


def test_an_unusable_file_is_reported_with_the_exit_code_and_the_error(tmp_path):
    path = tmp_path / "broken.keras"
    path.write_bytes(b"PK no model")
    with (
        serving_benchmark.start_process() as process,
        pytest.raises(PipelineError, match=r"could not be used in a clean process \(exit code 1\): .*broken.keras"),
    ):
        process.load(path)
        serving_benchmark.benchmark(process, IMAGES, np.zeros((8, 3)), tmp_path)


def test_a_process_that_was_killed_before_its_request_is_reported(saved, tmp_path):
    with serving_benchmark.start_process() as process:
        process.kill()
        process.wait()
        with pytest.raises(
            PipelineError, match="exit code -9, killed, probably because memory ran out\\): no error output"
        ):
            process.load(saved[0])
            serving_benchmark.benchmark(process, IMAGES, np.zeros((8, 3)), tmp_path)


def test_a_process_without_a_request_ends_with_its_parent():
    code = """
import os
from dgmd_pipeline.evaluation import serving_benchmark
process = serving_benchmark.start_process()
assert process.poll() is None
os.write(1, str(process.pid).encode())
os._exit(0)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    path = Path(f"/proc/{int(ran.stdout)}")
    for _ in range(600):
        if not path.exists() or "Z" in (path / "stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.1)
    raise AssertionError("the process still runs")


def test_the_process_does_not_inherit_the_settings_that_speed_up_training(monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    monkeypatch.setenv("SOMETHING", "else")
    found = settings.serving_environment()
    assert "TF_NUM_INTRAOP_THREADS" not in found and found["SOMETHING"] == "else"
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "4")  # the operator's own
    assert settings.serving_environment()["TF_NUM_INTRAOP_THREADS"] == "4"
