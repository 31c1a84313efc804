"""The real command, killed at a named moment: `python kill_at.py MOMENT [arguments of pipeline.py]`.

A moment is "before" or "after" and what happens, as a pattern in which * stands for anything:

    before rename .draft-split split         also `os.replace`
    after write .draft-split/training.csv    it has been opened and is empty
    after read .draft-split/training.csv     it has been opened
    after remove training.csv                whose folder is not known while a folder is being removed
    before POST */model-versions/create      nothing of the request has been sent
    after POST */model-versions/create       it has been answered
    after say *epoch 2/3*                    a line of the log has been written

Paths are relative to DATA_DIR. Actions of worker processes do not count. If the moment never comes, the command ends
normally.
"""

import builtins
import fnmatch
import functools
import http.client
import io
import logging
import os
import runpy
import shutil  # noqa: F401 - on import, shutil checks what `os.unlink` supports
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).parents[2]


def kill_at(now: str) -> None:
    if fnmatch.fnmatchcase(now, MOMENT):
        os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: object, name: str, describe: Callable[..., str]) -> None:
    """Call `kill_at` before and after each call of a function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*arguments, **options):
        what = describe(*arguments, **options)
        kill_at(f"before {what}")
        result = original(*arguments, **options)
        kill_at(f"after {what}")
        return result

    setattr(owner, name, watched)


def below_data_dir(path: object) -> str:
    return str(path) if isinstance(path, int) else os.path.relpath(os.fsdecode(path), os.environ["DATA_DIR"])


def opening(path: object, mode: str = "r", *_: object, **__: object) -> str:
    return f"{'write' if set(mode) & set('wax+') else 'read'} {below_data_dir(path)}"


def renaming(source: object, target: object, **_: object) -> str:
    return f"rename {below_data_dir(source)} {below_data_dir(target)}"


def removing(path: object, *, dir_fd: int | None = None) -> str:
    return f"remove {below_data_dir(path) if dir_fd is None else path}"


def watch_requests() -> None:
    connection = http.client.HTTPConnection
    begin, answer = connection.putrequest, connection.getresponse

    def putrequest(self, method, url, *arguments, **options):
        self.asked = f"{method} {url}"
        kill_at(f"before {self.asked}")
        return begin(self, method, url, *arguments, **options)

    def getresponse(self):
        response = answer(self)
        kill_at(f"after {self.asked}")
        return response

    connection.putrequest, connection.getresponse = putrequest, getresponse


def watch_transfers() -> None:
    """Watch the requests that awscrt sends. If one fails, botocore sends another."""
    from dgmd_pipeline.s3.crt import CrtTransfer

    watch(CrtTransfer, "start", lambda _, source, *__: f"GET {quote(source.key)}")


# Worker processes import pipeline.py again, not this file: `runpy` has put it in the place of the main module.
if __name__ == "__main__":
    MOMENT = sys.argv.pop(1)
    for module in (builtins, io):
        watch(module, "open", opening)
    for name in ("rename", "replace"):
        watch(os, name, renaming)
    watch(os, "unlink", removing)
    watch(logging.Logger, "handle", lambda _, record: f"say {record.getMessage()}")
    watch_requests()
    sys.path[0], sys.argv[0] = str(ROOT), str(ROOT / "pipeline.py")
    watch_transfers()
    runpy.run_path(sys.argv[0], run_name="__main__")
