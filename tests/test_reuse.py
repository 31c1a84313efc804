"""What a run with a change takes over from the run before, and what it says about that."""

import shutil

import pytest
from support import histories
from support.histories import START, copy_started

pytest_plugins = ["support.histories"]
REUSING = ("inspected", "tfrecord_training", "tfrecord_validation", "features_training", "features_validation")


@pytest.fixture(params=["by hand", "downloaded"])
def folder(request, started, served_bucket):
    """A copy of a finished DATA_DIR: its source and its settings."""
    with histories.folder_in_memory() as base:
        bucket = served_bucket if request.param == "downloaded" else None
        yield copy_started(started, base / "data", bucket), histories.settings_for(base / "data", bucket)


def worked(result):
    return {record.step: record.worked for record in result.records}


def test_only_new_image_files_are_opened_and_counted(folder):
    source, settings = folder
    source.put("mint/2", 10)
    source.put("mint/3", 11)
    opened = set()

    def watch(event, arguments):
        if event == "open":
            opened.update(path for path in source.images if str(arguments[0]).endswith(f"/{path}"))

    with histories.watched(watch):
        result = histories.run(settings)
    assert opened == {"mint/2", "mint/3"}
    counts, said = worked(result), result.summaries
    assert counts["inspected"] == 2
    assert said["inspected"].startswith("12 files (2 new, 10 reused)")
    for step in ("tfrecord", "features"):
        assert counts[f"{step}_training"] + counts[f"{step}_validation"] == 2
    if source.bucket:
        assert counts["raw"] == 2
        assert said["raw"].startswith("12 objects (2 new, 10 reused)")


def test_a_setting_opens_and_computes_nothing(folder):
    settings = folder[1]
    opened = []

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).endswith(tuple(START)):
            opened.append(arguments[0])

    with histories.watched(watch):
        result = histories.run(settings.model_copy(update={"num_shards": 3, "validation_pcnt": 0.5}))
    assert not opened
    assert {step: count for step, count in worked(result).items() if step in REUSING} == dict.fromkeys(REUSING[1:], 0)
    assert "(0 new, 5 reused)" in result.summaries["features_validation"]


@pytest.mark.parametrize(("verb", "done"), [("inspect", REUSING), ("convert", REUSING[1:]), ("extract", REUSING[3:])])
def test_a_forced_step_and_those_after_it_are_done_in_full(folder, verb, done):
    result = histories.run(folder[1], verb)
    counts = worked(result)
    assert {step for step in REUSING if counts.get(step)} == set(done)
    assert sum(counts[step] for step in done) == len(START) * (
        1 if verb == "extract" else 2 if verb == "convert" else 3
    )
    assert not [text for text in result.summaries.values() if "reused" in text]


@pytest.mark.parametrize("step", ["tfrecord", "features"])
def test_the_pieces_of_a_stopped_step_serve_images_that_move_to_the_other_split(started, step):
    with histories.folder_in_memory() as base:
        copy_started(started, base / "data", None)
        settings = histories.settings_for(base / "data").model_copy(update={"validation_pcnt": 0.4})
        for split in ("training", "validation"):
            shutil.rmtree(settings.data_dir / f"{step}_{split}")
        kill = histories.Kill(f"rename .draft-{step}_validation {step}_validation", 0)
        with histories.killed(kill, settings.data_dir):
            histories.run(settings)
        assert kill.came
        changed = settings.model_copy(update={"validation_pcnt": 0.2})
        counts = worked(histories.run(changed))
        assert (counts[f"{step}_training"], counts[f"{step}_validation"]) == (0, 0)
        found, expected = histories.contents(base / "data"), histories.run_from_nothing(changed, base / "x")
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("inspected/thumbnails", "The files are inspected again"),
        ("tfrecord_training/training-00000-of-00002.tfrecord", "its images are converted again"),
        ("features_training/features-00001-of-00002.npy", "its vectors are computed again"),
    ],
)
def test_damaged_files_are_made_again_and_named_once(folder, name, said, caplog):
    source, settings = folder
    path = settings.data_dir / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.unlink()
    path.write_bytes(content)
    source.put("mint/2", 10)
    changed = settings.model_copy(update={"validation_pcnt": 0.5})
    histories.run(changed)
    assert [message.count(said) for message in caplog.messages if said in message] == [1]
    found, expected = (
        histories.contents(settings.data_dir),
        histories.run_from_nothing(changed, settings.data_dir / "x"),
    )
    assert {step: found[step] for step in expected} == expected


def test_the_plan_says_what_is_reused_as_far_as_it_is_known(folder):
    source, settings = folder
    source.put("mint/2", 10)
    plan = histories.plan(settings)
    if source.bucket:
        assert plan["raw"] == "1 new"
    assert plan["inspected"] == "raw changes; 1 new, 10 reused"
    for step in REUSING[1:]:
        assert plan[step].endswith(" changes; reuses unchanged images")
    plan = histories.plan(settings.model_copy(update={"num_shards": 3, "image_fit": "crop"}))
    assert plan["tfrecord_training"].startswith("IMAGE_FIT stretch -> crop, NUM_SHARDS 2 -> 3, ")
    assert not [step for step in REUSING[1:] if "reuses" in plan[step]]
    assert "reuse" not in " ".join(histories.plan(settings, "inspect").values())
