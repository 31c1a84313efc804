import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import Busy, PipelineError
from dgmd_pipeline.workflow import disk, folders, lock


def test_what_a_killed_run_left_behind_is_put_back_or_swept_away(tmp_path):
    (tmp_path / ".old-first").mkdir()
    (tmp_path / ".old-first" / "a").write_text("kept")
    for name in (".draft-first", ".draft-second", ".old-second", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text(name)
    folders.recover(tmp_path, ["first", "second", "step"])
    assert (tmp_path / "first" / "a").read_text() == "kept"
    assert (tmp_path / "second" / "b").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = f"""
import sys, pathlib
from dgmd_pipeline.workflow import lock
with lock.hold(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(Busy, match=rf"in use by another run: process {holder.pid} on .*, started 20\d\d-"),
        lock.hold(tmp_path),
    ):
        pass
    holder.kill()
    holder.communicate()
    with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("place", ["a file/data", "/sys/nowhere/data"])
def test_a_folder_that_cannot_be_written_is_explained(tmp_path, place):
    (tmp_path / "a file").write_text("")
    data_dir = tmp_path / place
    with (
        pytest.raises(PipelineError, match=r"DATA_DIR must be (a folder|readable and writable|writable)"),
        disk.disk_errors_explained(data_dir),
        lock.hold(data_dir),
    ):
        pass


def test_a_draft_takes_its_targets_place_when_the_block_ends(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").write_text("")
    with folders.draft(tmp_path / "step") as draft:
        (draft / "new").write_text("")
        assert (tmp_path / "step" / "old").exists()
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_files_reach_the_disk_before_the_folder_gets_its_name_and_the_old_folder_is_removed_last(tmp_path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").write_text("")
    code = """if True:
        import sys
        from pathlib import Path
        from dgmd_pipeline.workflow import folders
        with folders.draft(Path(sys.argv[1])) as draft:
            (draft / "new").write_text("content")
    """
    calls = "trace=write,syncfs,fsync,?rename,?renameat,?renameat2,?unlinkat"
    command = ["strace", "-f", "-y", "-e", calls, sys.executable, "-c", code, str(tmp_path / "step")]
    trace = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    lines = [re.sub(r"(\w+)\((\d+<)?", r"\1 ", line) for line in trace.splitlines() if str(tmp_path) in line]
    found = [line.replace(f"{tmp_path}/", "").replace(str(tmp_path), "the parent folder") for line in lines]
    assert [line.split(")")[0] for line in found if "exit" not in line] == [
        'write .draft-step/new>, "content", 7',
        "syncfs .draft-step>",
        'rename "step", ".old-step"',
        'rename ".draft-step", "step"',
        "fsync the parent folder>",
        'rename ".old-step", ".draft-step"',
        'unlinkat .draft-step>, "old", 0',
    ]


def interrupted(target, purpose, note="note"):
    """Write a file and a note into a draft, and fail."""
    with pytest.raises(ZeroDivisionError), folders.draft(target, purpose) as draft:
        (draft / "file").write_text("half of the work")
        if note:
            (draft / folders.RESUME / note).write_text("")
        raise ZeroDivisionError


def test_a_draft_with_notes_is_given_again_for_the_same_purpose_and_loses_them_when_it_is_done(tmp_path):
    interrupted(tmp_path / "step", "this")
    folders.recover(tmp_path, ["first", "second", "step"])
    with folders.draft(tmp_path / "step", "this") as draft:
        assert (draft / "file").read_text() == "half of the work"
    assert [path.name for path in tmp_path.rglob("*")] == ["step", "file"]


@pytest.mark.parametrize("purpose", ["that", None])
def test_a_draft_is_not_given_for_another_purpose(tmp_path, purpose):
    interrupted(tmp_path / "step", "this")
    with folders.draft(tmp_path / "step", purpose) as draft:
        assert not (draft / "file").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["step"]


@pytest.mark.parametrize(("purpose", "note"), [("this", None), (None, None)])
def test_a_draft_without_notes_is_removed_on_failure(tmp_path, purpose, note):
    interrupted(tmp_path / "step", purpose, note)
    assert list(tmp_path.iterdir()) == []


def test_the_drafts_of_steps_that_are_done_are_swept(tmp_path):
    interrupted(tmp_path / "step", "this")
    interrupted(tmp_path / "other", "that")
    folders.sweep(tmp_path, ["step"])
    assert [path.name for path in tmp_path.iterdir()] == [".draft-other"]


def test_notes_that_a_kill_left_in_a_finished_folder_are_swept(tmp_path):
    (tmp_path / "step" / folders.RESUME).mkdir(parents=True)
    (tmp_path / "step" / "file").write_text("")
    folders.recover(tmp_path, ["first", "second", "step"])
    assert [path.name for path in tmp_path.rglob("*")] == ["step", "file"]


def test_the_volume_of_a_folder_is_that_of_its_files_without_notes(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"45")
    (tmp_path / folders.RESUME).mkdir()
    (tmp_path / folders.RESUME / "c").write_bytes(b"6789")
    assert folders.folder_bytes(tmp_path) == 5


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_999, "1.0 MB"),
     (382_700_000, "382.7 MB"), (2_500_000_000_000_000, "2500.0 TB")],
)  # fmt: skip
def test_sizes_are_for_people(size, text):
    assert formatting.format_bytes(size) == text


def test_what_cannot_fit_is_said_beforehand_with_the_bytes_needed(tmp_path):
    draft = tmp_path / ".draft-raw"
    draft.mkdir()
    disk.check_space(draft, "raw", 1)
    with pytest.raises(
        PipelineError,
        match=rf"{tmp_path}: the disk is full: raw needs 1000000.0 TB, but only .* are free. Free space and run",
    ):
        disk.check_space(draft, "raw", 10**18)


def test_the_name_of_a_holder_that_is_just_starting_is_waited_for(tmp_path):
    (tmp_path / lock.LOCK).touch()
    threading.Timer(0.05, (tmp_path / lock.LOCK).write_text, ["process 7, started now"]).start()
    assert lock._read_holder(tmp_path) == "process 7, started now"


def test_what_the_pipeline_did_not_make_is_never_touched(tmp_path):
    for name in (".old-photos", ".draft-letter", "photos/.resume"):
        (tmp_path / name).mkdir(parents=True)
    folders.recover(tmp_path, ["first"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".draft-letter", ".old-photos", "photos"]
    assert (tmp_path / "photos" / ".resume").exists()


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "step").mkdir()
    rename = Path.rename

    def failing(path, target):
        if path.name == ".draft-step":
            raise OSError("on purpose")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="on purpose"), folders.draft(tmp_path / "step"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_folder_is_found_where_a_killed_run_left_it(tmp_path):
    (tmp_path / ".old-step").mkdir()
    assert folders.current_path(tmp_path / "step") == tmp_path / ".old-step"
    (tmp_path / "step").mkdir()
    assert folders.current_path(tmp_path / "step") == tmp_path / "step"


def test_a_refusal_elsewhere_is_not_blamed_on_data_dir(tmp_path):
    with (
        pytest.raises(PipelineError, match=r"^/somewhere/else: Permission denied. It must be readable"),
        disk.disk_errors_explained(tmp_path),
    ):
        raise PermissionError(13, "Permission denied", "/somewhere/else")


def test_the_folder_that_is_full_is_named_even_if_it_is_hidden(tmp_path):
    notes = tmp_path / ".hidden" / ".draft-step" / ".resume"
    notes.mkdir(parents=True)
    with pytest.raises(PipelineError, match=rf"^{tmp_path}/.hidden: the disk is full"):
        disk.check_space(notes, "step", 10**18)


def test_an_old_folder_that_was_only_partly_removed_is_never_put_back(tmp_path, monkeypatch):
    for name in (".old-step", "step"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def killed(path):
        (path / "file").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.recover(tmp_path, ["first", "second", "step"])
    disk.remove(tmp_path / "step")
    folders.recover(tmp_path, ["first", "second", "step"])
    assert list(tmp_path.iterdir()) == []
