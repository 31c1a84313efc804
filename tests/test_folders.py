import subprocess
import sys

import pytest

from dgmd_pipeline import folders
from dgmd_pipeline.errors import Busy, PipelineError


def test_what_a_killed_run_left_behind_is_put_back_or_swept_away(tmp_path):
    (tmp_path / ".old-first").mkdir()
    (tmp_path / ".old-first" / "a").write_text("kept")
    for name in (".draft-first", ".draft-second", ".old-second", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text(name)
    folders.recover(tmp_path)
    assert (tmp_path / "first" / "a").read_text() == "kept"
    assert (tmp_path / "second" / "b").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = f"""
import sys, pathlib
from dgmd_pipeline import folders
with folders.lock(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(Busy, match=rf"in use by another run: process {holder.pid} on .*, started 20\d\d-"),
        folders.lock(tmp_path),
    ):
        pass
    holder.kill()
    holder.communicate()
    with folders.lock(tmp_path):
        pass


@pytest.mark.parametrize("place", ["a file/data", "/sys/nowhere/data"])
def test_a_folder_that_cannot_be_written_is_explained(tmp_path, place):
    (tmp_path / "a file").write_text("")
    data_dir = tmp_path / place
    with (
        pytest.raises(PipelineError, match=r"can read and write"),
        folders.disk_errors_explained(data_dir),
        folders.lock(data_dir),
    ):
        pass
