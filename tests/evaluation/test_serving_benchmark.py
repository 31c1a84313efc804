"""Real models in real processes of their own."""

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
from dgmd_pipeline.training import networks as training_networks

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model's file, a larger one's, and what the small one says of PICTURES."""
    folder = tmp_path_factory.mktemp("models")
    networks = []
    for name, size in (("small", 16), ("large", 32)):
        backbone = training_networks.build_cnn(size, size)
        network = training_networks.assemble(
            backbone, training_networks.build_head(backbone.output_shape[-1], 3, 0.1), "stretch"
        )
        network.save(folder / f"{name}.keras")
        networks.append(network)
    return folder / "small.keras", folder / "large.keras", networks[0]


@pytest.fixture
def assess():
    with serving_benchmark.start_process() as process:
        yield partial(serving_benchmark.benchmark, process)


def test_a_saved_model_is_tried_in_a_process_of_its_own(saved, assess, tmp_path):
    small, _, network = saved
    found = assess(small, PICTURES, network.predict(PICTURES, verbose=0), tmp_path)
    assert found["predictions_equal"] and found["largest_difference"] < serving_benchmark.TOLERANCE
    assert found["parameters"] == network.count_params()
    assert found["bytes"] == small.stat().st_size
    assert 0 < found["latency_p50_ms"] <= found["latency_p95_ms"]
    assert found["load_seconds"] > 0 and found["images_per_second"] > 0 and found["batch"] == 8
    assert 10**8 < found["peak_memory_bytes"] < 10**10  # TensorFlow alone takes hundreds of megabytes
    assert "latency_ratio" not in found
    assert list(tmp_path.iterdir()) == []


def test_what_the_saved_model_says_of_original_files_is_compared_with_what_was_measured(saved, assess, tmp_path):
    small, _, network = saved
    recorded = network.predict(PICTURES, verbose=0)
    files = []
    for number, pixels in enumerate(PICTURES):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    (tmp_path / "7.png").unlink()
    recorded[3] = np.roll(recorded[3], 1)  # other labels were measured than the model gives
    recorded[5] = np.roll(recorded[5], 1)
    found = assess(small, PICTURES, recorded, tmp_path, originals=serving_benchmark.Originals(files, recorded))
    assert (found["served_images"], found["served_other_labels"]) == (7, 2)
    assert 0.01 < found["served_largest_difference"] <= 1


def test_another_model_is_timed_beside_it(saved, assess, tmp_path):
    small, large, network = saved
    found = assess(large, PICTURES, network.predict(PICTURES, verbose=0), tmp_path, small)
    assert not found["predictions_equal"]  # those of another model
    assert found["production_bytes"] == small.stat().st_size
    assert found["size_ratio"] == large.stat().st_size / small.stat().st_size
    assert found["latency_ratio"] > 0


def test_a_file_that_is_no_model_is_said(assess, tmp_path):
    path = tmp_path / "broken.keras"
    path.write_bytes(b"PK no model")
    with pytest.raises(PipelineError, match=r"could not use the model: it ended with 1: .*broken.keras"):
        assess(path, PICTURES, np.zeros((8, 3)), tmp_path)


def test_a_process_that_was_killed_before_it_is_asked_is_said(saved, tmp_path):
    with serving_benchmark.start_process() as process:
        process.kill()
        process.wait()
        with pytest.raises(
            PipelineError, match="ended with -9 \\(killed, most likely for want of memory\\): it said noth"
        ):
            serving_benchmark.benchmark(process, saved[0], PICTURES, np.zeros((8, 3)), tmp_path)


def test_memory_is_that_of_the_process_itself(saved, tmp_path):
    held = np.ones(2 * 10**9, np.uint8)  # more than TensorFlow takes with a small model
    with serving_benchmark.start_process() as process:
        found = serving_benchmark.benchmark(process, saved[0], PICTURES, np.zeros((8, 3)), tmp_path)
    assert found["peak_memory_bytes"] < held.nbytes


def test_a_process_that_nobody_asks_ends_with_whoever_has_started_it():
    code = """
import os
from dgmd_pipeline import assessment
block = assessment.clean_process()
process = block.__enter__()
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
    raise AssertionError("it is still there")


def test_the_process_sees_nothing_of_what_speeds_up_a_training(monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    monkeypatch.setenv("SOMETHING", "else")
    found = settings.serving_environment()
    assert "TF_NUM_INTRAOP_THREADS" not in found and found["SOMETHING"] == "else"
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "4")  # somebody's own
    assert settings.serving_environment()["TF_NUM_INTRAOP_THREADS"] == "4"
