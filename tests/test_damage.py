"""Files of the step folders that were deleted, edited or damaged, and runs that were stopped."""

import re
import shutil
import signal
import time

import pytest
from conftest import COMMAND, run_in_own_mounts, run_pipeline
from support.pipeline import STEPS, client_of, folders, redone

TERMINATED = ("KILLED", "terminated; run the same command again to resume")


def shown_of_runs(variables):
    """The statuses and descriptions of the MLflow runs of a model, the newest first."""
    client = client_of(variables)
    experiment = client.get_experiment_by_name(variables["MODEL_NAME"])
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return [(run.info.status, run.data.tags.get("mlflow.note.content")) for run in runs]


@pytest.mark.slow
def test_without_mlflow_the_training_is_kept_and_the_next_run_only_registers(data, tmp_path):
    data_dir, variables = data
    before = folders(data_dir)
    trained = (data_dir / "trained_model").stat().st_ino
    away = {"MLFLOW_TRACKING_URI": "http://me:pa55word@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1}
    result = run_pipeline(tmp_path, **{**variables, **away})
    assert result.returncode == 30, result.stdout + result.stderr
    assert "warning: The MLflow server at http://127.0.0.1:9 cannot be reached" in result.stdout
    assert "The training is kept: the next run with the same images and settings uses it." in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert "pa55word" not in result.stdout + result.stderr
    variables["MODEL_NAME"] = "later"
    assert run_pipeline(tmp_path, **variables).returncode == 0
    assert redone(before, data_dir) == {"evaluation", "registered_model"}
    assert (data_dir / "trained_model").stat().st_ino == trained


@pytest.mark.parametrize(
    ("after", "sent", "shown"),
    [
        (" raw                  ...", signal.SIGTERM, [[]]),
        (" inspected            ...", signal.SIGINT, [[]]),
        (" trained_model        ...", signal.SIGTERM, [[], [TERMINATED]]),
        (" epoch 1/500", signal.SIGTERM, [[TERMINATED]]),
    ],
)
@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_nothing_half_made_and_the_next_one_ends_well(
    finished, tmp_path, after, sent, shown
):
    variables = {**finished[1], "DATA_DIR": tmp_path / "data", "MODEL_NAME": f"stopped{after.replace('/', ' of ')}"}
    process = run_pipeline(tmp_path, start=True, **{**variables, "EPOCHS": 500, "PATIENCE": 500})
    for line in process.stdout:
        if after in line:
            break
    time.sleep(0.3)
    process.send_signal(sent)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent], output
    assert "run the same command again to resume" in output
    before = shown_of_runs(variables)
    assert before in shown
    left = [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith((".draft", ".old"))]
    kept = {"raw", "inspected", "tfrecord_training"} if "raw" in after or "inspected" in after else {"trained_model"}
    assert set(left) <= {f".draft-{step}" for step in kept}
    result = run_pipeline(tmp_path, "--until", "train", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert shown_of_runs(variables) == [("FINISHED", None), *before]  # with other EPOCHS, it is another training
    expected = [".lock", ".mlflow-run", "status.json", *STEPS[:8]]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(expected)
    for step in STEPS[:7]:
        for path in (finished[0] / step).rglob("*"):
            if path.is_file() and path.name != "_SUCCESS":
                again = tmp_path / "data" / path.relative_to(finished[0])
                assert again.read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_mlflow_shows_that_a_training_failed_on_a_full_disk(finished, tmp_path):
    variables = {**finished[1], "DATA_DIR": tmp_path / "data", "MODEL_NAME": "full", "EPOCHS": 500, "PATIENCE": 500}
    script = f"""
mkdir data && mount -t tmpfs -o size=20m tmpfs data || exit 77
cp -r "$1"/. data
{COMMAND} --force train > log & run=$!
until grep -q ' epoch 1/500' log; do kill -0 $run || break; sleep 0.1; done
cat /dev/zero > data/full
wait $run; echo "code $?"; cat log
"""
    done = run_in_own_mounts(tmp_path, script, finished[0], **variables)
    assert done.stdout.startswith("code 30\n"), done.stdout + done.stderr
    assert " is full: trained_model needs more" in done.stdout
    assert shown_of_runs(variables) == [("FAILED", done.stdout.rpartition(" error: ")[2].strip())]


@pytest.mark.parametrize(
    ("file", "content", "step"),
    [
        ("raw/listing.csv", None, "inspect"),
        ("inspected/images.csv", "path,label\n", "label"),
        ("label_map/mapping.json", None, "train"),
        ("balanced/images.csv", None, "split"),
        ("balanced/class_weights.json", "{", "train"),
        ("split/training.csv", "path,label,class_index,sha256,group\na,b\n", "convert"),
    ],
)
def test_a_file_that_was_deleted_or_edited_inside_a_step_folder_is_named(data, tmp_path, file, content, step):
    data_dir, variables = data
    (data_dir / file).unlink()
    if content is not None:
        (data_dir / file).write_text(content)
    result = run_pipeline(tmp_path, "--force", step, "--until", step, **variables)
    assert result.returncode == 30, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert f"{data_dir / file}: " in result.stdout
    assert f"delete the folder {data_dir / file.split('/')[0]} and run again" in result.stdout


@pytest.mark.slow
def test_a_model_file_that_was_damaged_is_named(data, tmp_path):
    data_dir, variables = data
    (data_dir / "trained_model" / "model.keras").write_bytes(b"PK no model")
    for step in ("evaluate", "register"):
        result = run_pipeline(tmp_path, "--force", step, **{**variables, "MODEL_NAME": "damaged"})
        assert result.returncode == 30
        assert "Traceback" not in result.stdout + result.stderr
        assert f"delete the folder {data_dir / 'trained_model'} and run again" in result.stdout


@pytest.mark.slow
def test_a_training_whose_notes_are_damaged_begins_anew_and_an_embedded_store_that_is_gone_is_made_anew(data, tmp_path):
    data_dir, variables = data
    del variables["MLFLOW_TRACKING_URI"]
    variables = {**variables, "EPOCHS": 30, "PATIENCE": 30}
    process = run_pipeline(tmp_path, start=True, **variables)
    for line in process.stdout:
        if " epoch 1/30" in line:
            break
    process.kill()
    process.communicate()
    result = run_pipeline(tmp_path, "plan", **variables)
    assert re.search(
        r"trained_model .* EPOCHS 2 -> 30.*; continues a stopped training after epoch \d+$", result.stdout, re.M
    )
    (data_dir / ".draft-trained_model" / ".resume" / "training.npz").write_bytes(b"PK damaged")
    assert "continues a stopped training" not in run_pipeline(tmp_path, "plan", **variables).stdout
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Training starts again." in result.stdout
    assert " epoch 1/30" in result.stdout
    shutil.rmtree(data_dir / "mlflow")
    result = run_pipeline(tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mlflow/ is missing" in result.stdout
    assert "finished version 1, non-production" in result.stdout
