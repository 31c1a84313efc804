import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, run_in_own_mounts
from support.work import keep_writing

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.workflow import disk


def error(number, place=None):
    return OSError(number, os.strerror(number), place) if place else OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (error(errno.EDQUOT), r"^{}: the disk quota of user \d+ is used up: step needs more"),
        (error(errno.ENOSPC, "/srv/weights.h5"), r"^/srv/weights.h5: the disk is full: step needs more. Free space"),
        (error(errno.EFBIG), r"^{}: File too large. step writes a file that is larger than its disk allows"),
        (error(errno.EMFILE), r"^Too many open files: step may have [\d,]+ files open at once. Raise the limit"),
        (error(errno.EIO), r"^{}: Input/output error. The disk or the network file system failed"),
        (error(errno.ESTALE, "{}/raw/a"), r"^{}/raw/a: Stale file handle. The disk or the network file system failed"),
        (error(errno.ENOTCONN, "{}/raw"), r"^{}/raw: Transport endpoint is not connected. The disk or the network"),
        (error(errno.ELOOP, "{}/raw"), r"^{}/raw: Too many levels of symbolic links. DATA_DIR must be"),
        (error(errno.ENOENT, "{}/.draft-raw/a/0.png"), r"^{}/.draft-raw was removed while step used it. Run again"),
    ],
)
def test_an_error_of_the_disk_is_explained(tmp_path, raised, sentence):
    if raised.filename:
        raised.filename = raised.filename.format(tmp_path)
    with pytest.raises(PipelineError, match=sentence.format(tmp_path)), disk.disk_errors_explained(tmp_path, "step"):
        raise raised


@pytest.mark.parametrize(
    "raised",
    [
        error(errno.ENOTCONN),  # of a socket
        error(errno.ETIMEDOUT),
        error(errno.ECONNREFUSED),
        error(errno.ENOENT),
        error(errno.ENOENT, "/nowhere/else"),
        error(errno.ENOENT, "{}/step/file"),  # in a folder that exists
        error(errno.EINVAL, "{}/step/file"),
    ],
)
def test_any_other_error_is_a_bug_and_stays_what_it_is(tmp_path, raised):
    (tmp_path / "step").mkdir()
    if raised.filename:
        raised.filename = raised.filename.format(tmp_path)
    with pytest.raises(OSError, match=os.strerror(raised.errno)) as caught, disk.disk_errors_explained(tmp_path):
        raise raised
    assert caught.value is raised


def test_a_folder_for_temporary_files_that_is_full_is_named(tmp_path):
    (tmp_path / "small").mkdir()
    code = """
import tempfile
from pathlib import Path
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.workflow import disk
try:
    with disk.disk_errors_explained(Path("data"), "step"), tempfile.TemporaryFile() as file:
        file.write(bytes(10**6))
except PipelineError as error:
    print(error)
"""
    script = 'mount -t tmpfs -o size=64k tmpfs "$2" || exit 77; TMPDIR="$2" "$1" -c "$3"'
    done = run_in_own_mounts(tmp_path, script, sys.executable, tmp_path / "small", code, PYTHONPATH=ROOT)
    assert done.stdout.startswith(f"{tmp_path / 'small'}: the disk for temporary files is full: step needs more. ")
    assert "set TMPDIR to a folder on another disk" in done.stdout


def test_a_folder_in_which_another_process_writes_is_removed(tmp_path):
    folder = tmp_path / "draft"
    for number in range(3):
        with keep_writing(folder / "piece" / str(number)):
            disk.remove(folder)
        assert not folder.exists()


def test_a_folder_that_another_process_removes_is_gone_afterwards(tmp_path):
    def remove(_):
        disk.remove(tmp_path / "draft")
        return not (tmp_path / "draft").exists()

    for number in range(400):
        (tmp_path / "draft" / str(number)).mkdir(parents=True)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(remove, range(4)))
