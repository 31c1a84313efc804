"""The finished pieces of a step that was stopped, and pieces that are made twice at the same time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import luigi
import pytest

from dgmd_pipeline.settings import Settings
from dgmd_pipeline.workflow import files, folders
from dgmd_pipeline.workflow.run_context import RunContext, activate
from dgmd_pipeline.workflow.step import Step, StepResult

PIECES = 4


class InPieces(Step):
    name, keeps_pieces = "whole", True
    params = ("epochs",)
    stop_before = PIECES

    def work(self, draft):
        reused = {path.name: path for path in self.reusable_folders() if (path / "piece").exists()}
        new = [f"{number}" for number in range(PIECES) if f"{number}" not in reused]
        for name in new:
            if int(name) >= self.stop_before:
                (draft / "half").write_text("")
                (draft / folders.RESUME / f".{name}-attempt").mkdir()
                raise ZeroDivisionError
            with files.commit(draft / folders.RESUME / name) as folder:
                (folder / "piece").write_text(name)
        (draft / "file").write_text("".join(map(str, range(PIECES))))
        return StepResult(images=PIECES, images_processed=len(new))


def go(data_dir, forced=False, **settings):
    """Run the step, and return how many pieces it made."""
    context = RunContext(Settings(DATA_DIR=data_dir, **settings), forced={"whole": "--force"} if forced else {})
    folders.recover(data_dir, ["whole"])
    with activate(context):
        luigi.build([InPieces()], local_scheduler=True, log_level="CRITICAL")
    if context.result.failure:
        raise context.result.failure
    assert [path.name for path in data_dir.iterdir()] == ["whole"]
    assert sorted(path.name for path in (data_dir / "whole").iterdir()) == ["_SUCCESS", "file"]
    return context.result.records[0].worked


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(InPieces, "stop_before", 3)
        go(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("options", "made"), [({}, 1), ({"EPOCHS": 3}, 1), ({"forced": True}, PIECES)])
def test_finished_pieces_of_a_stopped_run_are_given_to_the_next_one_unless_it_is_forced(stopped, caplog, options, made):
    caplog.set_level("INFO")
    assert go(stopped, **options) == made
    assert ("3 finished pieces of a run that was stopped are reused" in caplog.text) == (made == 1)


def test_finished_pieces_of_another_format_are_removed(stopped, monkeypatch):
    monkeypatch.setattr(InPieces, "format_version", 2)
    assert go(stopped) == PIECES


def test_pieces_are_kept_over_several_stops_and_nothing_else_is(stopped, monkeypatch):
    draft = stopped / ".draft-whole"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(InPieces, "stop_before", 0)
        go(stopped)
    assert {path.name for path in (draft / folders.RESUME).iterdir()} >= {"0", "1", "2"}
    folders.keep_pieces(draft)
    assert sorted(path.name for path in draft.rglob("*")) == [".resume", "0", "1", "2", *3 * ["piece"], "purpose"]


def test_of_attempts_at_the_same_time_the_first_to_end_counts_and_is_not_written_again(tmp_path):
    both = Barrier(2)

    def attempt(content):
        with files.commit(tmp_path / "piece") as folder:
            (folder / "file").write_text(content)
            both.wait()
            assert len(files.attempts(tmp_path / "piece")) == 2
            both.wait()

    with ThreadPoolExecutor() as pool:
        list(pool.map(attempt, ("one", "other")))
    assert [path.name for path in tmp_path.iterdir()] == ["piece"]
    first = (tmp_path / "piece" / "file").stat()
    with files.commit(tmp_path / "piece") as folder:
        (folder / "file").write_text("late")
    assert (tmp_path / "piece" / "file").stat() == first
    assert [path.name for path in tmp_path.iterdir()] == ["piece"]


def test_an_attempt_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.commit(tmp_path / "piece"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
