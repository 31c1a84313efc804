import json
import os
from pathlib import Path

import luigi
import pytest

from dgmd_pipeline.errors import PipelineError, SettingsError, Stopped
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.workflow import disk, folders, planning, success_file
from dgmd_pipeline.workflow.run_context import RunContext, activate
from dgmd_pipeline.workflow.step import Step, StepResult, UpstreamChange


class First(Step):
    name, verb = "first", "begin"
    params = ("epochs",)

    def work(self, draft):
        (draft / "epochs").write_text(str(self.settings.epochs))
        return StepResult({"things": 1}, images=7)


class Second(Step):
    name, verb = "second", "go on"
    params = ("batch_size",)
    runtime_params = ("seed",)

    def requires(self):
        return {"first": First()}

    def work(self, draft):
        (draft / "copy").write_text((self.input()["first"].path / "epochs").read_text())
        return StepResult({"things": 2})


class Third(Step):
    name = "third"

    def requires(self):
        return {"first": First(), "second": Second()}

    def work(self, draft):
        return StepResult()


def go(data_dir, last=Third, forced=None, **settings):
    """Plan, run, and return the plan as {step: (state, reason)} and the steps that worked."""
    context = RunContext(
        Settings(DATA_DIR=data_dir, **settings), forced={forced: f"--force {forced}"} if forced else {}
    )
    before = {
        name: (data_dir / name).stat().st_ino for name in ("first", "second", "third") if (data_dir / name).exists()
    }
    with activate(context):
        task = last()
        plan = {each.step: (each.state, each.reason) for each in planning.plan(task)}
        luigi.build([task], local_scheduler=True, log_level="CRITICAL")
        if context.result.failure:
            raise context.result.failure
        assert task.complete()
    worked = {
        name
        for name in ("first", "second", "third")
        if (data_dir / name).exists() and before.get(name) != (data_dir / name).stat().st_ino
    }
    return plan, worked


def test_everything_runs_once_and_then_nothing_does(tmp_path):
    plan, worked = go(tmp_path)
    assert worked == {"first", "second", "third"}
    assert set(plan.values()) == {("run", "folder is missing")}
    plan, worked = go(tmp_path)
    assert worked == set()
    assert set(plan.values()) == {("done", "")}


def test_a_record_says_where_a_folder_comes_from(tmp_path):
    go(tmp_path, EPOCHS=7)
    record = success_file.read_record(tmp_path / "second")
    assert record.step == "second"
    assert record.settings == {"batch_size": 128}
    assert record.inputs == {"first": success_file.read_record(tmp_path / "first").identity}
    assert record.counts == {"things": 2}
    assert record.seconds >= 0 and record.started and record.version


def test_a_changed_setting_redoes_the_step_that_uses_it_and_what_follows(tmp_path):
    go(tmp_path, BATCH_SIZE=128)
    plan, worked = go(tmp_path, BATCH_SIZE=64)
    assert worked == {"second", "third"}
    assert plan == {
        "first": ("done", ""),
        "second": ("run", "BATCH_SIZE 128 -> 64"),
        "third": ("run", "second changes"),
    }


def test_a_setting_that_no_step_uses_redoes_nothing(tmp_path):
    go(tmp_path, SEED=1)
    assert go(tmp_path, SEED=2)[1] == set()


def test_a_deleted_folder_is_redone_and_what_follows_only_if_it_differs(tmp_path):
    go(tmp_path)
    disk.remove(tmp_path / "first")
    plan, worked = go(tmp_path)
    assert worked == {"first"}
    assert plan["first"] == ("run", "folder is missing")
    assert plan["second"] == ("maybe", "only if first changes")


def test_going_back_to_earlier_settings_is_a_rerun(tmp_path):
    go(tmp_path, EPOCHS=1)
    go(tmp_path, EPOCHS=2)
    assert go(tmp_path, EPOCHS=1)[1] == {"first", "second", "third"}
    assert (tmp_path / "second" / "copy").read_text() == "1"


def test_a_raised_format_redoes_its_step(tmp_path, monkeypatch):
    go(tmp_path)
    monkeypatch.setattr(Second, "format_version", 2)
    plan, worked = go(tmp_path)
    assert worked == {"second", "third"}
    assert plan["second"] == ("run", "format 1 -> 2")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"step": "second"}'])
def test_a_folder_whose_record_cannot_be_read_is_made_anew(tmp_path, content):
    go(tmp_path)
    record = tmp_path / "second" / success_file.SUCCESS
    record.unlink() if content is None else record.write_text(content)
    plan, worked = go(tmp_path)
    assert worked == {"second"}
    assert plan["second"][1].startswith("no readable _SUCCESS")


def test_reading_an_undeclared_setting_is_an_error(tmp_path):
    class Careless(Step):
        name = "careless"

        def work(self, draft):
            return StepResult({"epochs": self.settings.epochs})

    with pytest.raises(AttributeError, match="reads the setting epochs without declaring it"):
        go(tmp_path, Careless)


def test_a_step_that_fails_leaves_neither_draft_nor_folder(tmp_path):
    class Failing(Step):
        name = "failing"

        def work(self, draft):
            (draft / "half").write_text("")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        go(tmp_path, Failing)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_keeps_the_folder_that_was_there(tmp_path, monkeypatch):
    go(tmp_path, EPOCHS=1)
    monkeypatch.setattr(First, "work", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, EPOCHS=2)
    assert (tmp_path / "first" / "epochs").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]


def test_a_step_that_a_signal_came_into_is_not_committed(tmp_path):
    def stopped():
        raise Stopped

    with activate(RunContext(Settings(DATA_DIR=tmp_path), check_stopped=stopped)), pytest.raises(Stopped):
        First().run()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_replaced(tmp_path):
    go(tmp_path)
    disk.remove(tmp_path / "second")
    (tmp_path / "second").write_text("a file")
    assert go(tmp_path)[1] == {"second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "third"]


def test_files_without_a_record_are_told_apart_by_path_size_and_time(tmp_path):
    (tmp_path / "label").mkdir()
    (tmp_path / "label" / "a").write_text("1")
    (tmp_path / "notes.txt").write_text("not in a subfolder")
    first = success_file.walk(tmp_path)
    (tmp_path / "notes.txt").write_text("changed")
    (tmp_path / "label" / ".hidden").mkdir()
    (tmp_path / "label" / ".DS_Store").write_text("")
    assert success_file.walk(tmp_path) == first
    os.utime(tmp_path / "label" / "a", ns=(1, 1))
    second = success_file.walk(tmp_path)
    (tmp_path / "label" / "a").rename(tmp_path / "label" / "b")
    assert len({first, second, success_file.walk(tmp_path)}) == 3


def test_task_ids_show_no_setting(tmp_path):
    with activate(RunContext(Settings(DATA_DIR=tmp_path, MLFLOW_TRACKING_URI="http://user:s3cr3t@host/"))):
        text = f"{First()} {First().task_id} {First().to_str_params()}"
    assert "s3cr3t" not in text
    assert str(tmp_path) not in text


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    def work(self, draft):
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    monkeypatch.setattr(First, "work", work)
    with pytest.raises(
        PipelineError, match=r"the disk is full: first needs more than the .* that were free. Free space"
    ):
        go(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_record_is_json_for_others_too(tmp_path):
    go(tmp_path)
    assert json.loads((tmp_path / "first" / "_SUCCESS").read_text())["step"] == "first"


def test_a_forced_step_and_all_after_it_are_done_again(tmp_path):
    go(tmp_path)
    plan, worked = go(tmp_path, forced="second")
    assert worked == {"second", "third"}
    assert plan["first"] == ("done", "")
    assert plan["second"] == ("run", "--force second")
    assert plan["third"] == ("run", "--force second")


class Resumable(Step):
    name = "resumable"
    resumable = True
    params = ("epochs",)

    def work(self, draft):
        notes = draft / folders.RESUME / "notes"
        if not notes.exists():
            notes.write_text("1")
            raise PipelineError("stopped on purpose")
        return StepResult(summary="resumed")

    def describe_draft(self, kept):
        return f"continues after {(kept / 'notes').read_text()}"


class Pieces(Resumable):
    name = "resumable"
    keeps_pieces = True


@pytest.mark.parametrize(
    ("kind", "told"), [(Resumable, "continues after 1"), (Pieces, "1 finished piece of a stopped")]
)
def test_a_plan_says_what_a_stopped_run_left_and_a_forced_step_does_not_use_it(tmp_path, kind, told):
    def plan(forced=None, **settings):
        with activate(RunContext(Settings(DATA_DIR=tmp_path, **settings), forced=forced or {})):
            (found,) = planning.plan(kind())
            return found.explanation

    assert plan() == "folder is missing"
    with pytest.raises(PipelineError, match="on purpose"):
        go(tmp_path, kind)
    assert plan().startswith(f"folder is missing; {told}")
    assert told not in plan(forced={"resumable": "--force resumable"})
    assert (told in plan(EPOCHS=3)) == kind.keeps_pieces
    with pytest.raises(PipelineError, match="on purpose"):  # it begins from nothing
        go(tmp_path, kind, forced="resumable")
    go(tmp_path, kind)
    assert plan() == ""


def test_a_step_has_a_verb_and_a_folder_and_an_unknown_name_is_answered_with_both(tmp_path):
    with activate(RunContext(Settings(DATA_DIR=tmp_path))):
        line = planning.upstream_steps(Third())
    assert planning.select_steps(line, "begin") == planning.select_steps(line, "first") == [line[0]]
    with pytest.raises(SettingsError, match=r"begni' is not a step of this run\. .* begin \(first\), go on \(second\)"):
        planning.select_steps(line, "begni")


def test_a_record_of_an_older_or_newer_version_is_read(tmp_path):
    go(tmp_path)
    path = tmp_path / "first" / "_SUCCESS"
    values = json.loads(path.read_text())
    del values["bytes"], values["images"]
    path.write_text(json.dumps(values | {"of tomorrow": 1}))
    assert success_file.read_record(tmp_path / "first").bytes is None
    assert go(tmp_path)[1] == set()


def test_a_plan_knows_images_and_bytes(tmp_path):
    def outlooks():
        with activate(RunContext(Settings(DATA_DIR=tmp_path))):
            return [(each.images, each.bytes) for each in planning.plan(Third())]

    assert outlooks() == [(None, None)] * 3
    go(tmp_path, last=First)
    assert outlooks() == [(7, 2), (7, None), (7, None)]  # what is missing is given what is there
    go(tmp_path)
    assert outlooks() == [(7, 2), (7, 2), (7, 0)]


def test_a_change_outside_the_pipeline_is_looked_for_once_in_a_run(tmp_path, monkeypatch):
    go(tmp_path)
    calls = []
    monkeypatch.setattr(First, "check_upstream", lambda *_: calls.append("") or UpstreamChange("1 new"))
    plan, _ = go(tmp_path)
    assert plan["first"] == ("run", "1 new")
    assert len(calls) == 1
