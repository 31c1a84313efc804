"""Runs the real tasks up to `features_*` in this process, without TensorFlow, on images of a few pixels."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
import PIL.Image
import pytest

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.s3 import client, crt
from dgmd_pipeline.settings import Settings
from dgmd_pipeline.tasks import names
from dgmd_pipeline.tasks.training_inputs import ExtractFeatures
from dgmd_pipeline.training import extraction
from dgmd_pipeline.workflow import files, folders, lock, planning
from dgmd_pipeline.workflow.disk import SHARED_MEMORY
from dgmd_pipeline.workflow.run_context import RunContext, RunResult, activate
from dgmd_pipeline.workflow.step import Step
from support.http_server import send, serve
from support.images import encode, scene

SETTINGS = {
    "max_rejected_pcnt": 1.0, "image_width": 8, "image_height": 8, "num_shards": 2, "validation_pcnt": 0.34,
    "backbone": "cnn", "backbone_weights": "none",
}  # fmt: skip
PREFIX = "train/images"


def small(seed: int) -> PIL.Image.Image:
    return scene(seed, 12, 9)


CONTENTS = [
    *(encode(small(seed), "PNG") for seed in range(10)),
    *(encode(small(seed), "BMP") for seed in range(3)),  # near-duplicates of the first three
    encode(small(3).resize((4, 4)), "PNG"),  # too small
    b"no image",
    b"",
]
PATHS = [f"{label}/{number}" for label in ("anise", "cumin", "mint") for number in range(4)]
START = dict(zip(PATHS[:10], range(10), strict=False))  # path -> number of its content


class ExtractMeans(ExtractFeatures):
    """Extracts the mean colour of each quarter of an image, in place of a network's vector."""

    def _compute(self, pieces):
        records, positions = pieces[0].records, np.concatenate([piece.positions for piece in pieces])
        shards = manifest.read_shard_index(records).shards
        shard_of = np.searchsorted(np.cumsum([shard.records for shard in shards]), positions, side="right").tolist()
        entries = manifest.read_records(records)[positions]
        paths = [records / shards[number].file for number in shard_of]
        vectors = [_means(path, entry) for path, entry in zip(paths, entries, strict=True)]
        return extraction.write_pieces(pieces, np.array_split(np.array(vectors, np.float32), 2), 12)

    def _network(self):
        return SimpleNamespace(output_shape=(None, 12))


def _means(path: Path, entry: np.void) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(int(entry["start"] + entry["image"]))
        image = PIL.Image.open(io.BytesIO(file.read(int(entry["image_length"]))))
    return np.asarray(image.resize((2, 2), PIL.Image.Resampling.BOX), np.float32).ravel()


class InThisThread:
    """An executor without processes."""

    is_cluster = False
    dashboard = None
    map = staticmethod(lambda function, items, chunk=1: map(function, items))

    def connect(self) -> None:
        pass

    def describe(self) -> str:
        return ""

    def usage(self) -> str:
        return ""

    def close(self) -> None:
        pass


_settings = functools.cache(Settings)


def settings_for(data_dir: Path, bucket: "Bucket | None" = None) -> Settings:
    place = {"data_dir": data_dir, "refresh": bucket is not None, "aws_data_bucket": "spices", "aws_data_path": PREFIX}
    return _settings().model_copy(update=SETTINGS | place)


def last_steps() -> list[Step]:
    return [ExtractMeans(split=split) for split in names.SPLITS]


def _forced(word: str | None) -> dict[str, str]:
    steps = planning.upstream_steps(*last_steps())
    return {step.folder: f"--force {word}" for step in planning.select_steps(steps, word)} if word else {}


def run(settings: Settings, force: str | None = None) -> RunResult:
    """Do what the command does up to the features, as in a new process."""
    files._checksums.clear()
    files._damaged.clear()
    forced: dict[str, str] = {}
    context = RunContext(settings, InThisThread(), forced=forced)
    with lock.hold(settings.data_dir), activate(context):
        folders.recover(settings.data_dir, names.ALL)
        steps = planning.upstream_steps(*last_steps())
        forced.update(_forced(force))
        plans = planning.plan(*last_steps())
        folders.sweep(settings.data_dir, [plan.step for plan in plans if plan.state == "done"])
        for step in steps:
            if not step.complete():
                step.run()
    return context.result


def plan(settings: Settings, force: str | None = None) -> dict[str, str]:
    """Return what the command `plan` says of each step that is not done."""
    forced: dict[str, str] = {}
    with activate(RunContext(settings, forced=forced)):
        forced.update(_forced(force))
        plans = planning.plan(*last_steps(), with_reuse=True)
    return {each.step: each.explanation for each in plans if each.state != "done"}


def contents(data_dir: Path) -> dict[str, object]:
    """Everything in the step folders and beside them, except what records say about the run itself."""
    found: dict[str, object] = {}
    for path in data_dir.rglob("*"):
        name = path.relative_to(data_dir).as_posix()
        if path.is_file() and name != lock.LOCK:
            found[name] = path.read_bytes()
            if path.name == "_SUCCESS":
                record = json.loads(path.read_text("utf-8"))
                of_one_run = ("started", "seconds", "worked", "volume")
                found[name] = {key: value for key, value in record.items() if key not in of_one_run}
    return found


def run_from_nothing(settings: Settings, scratch: Path) -> dict[str, object]:
    """Run with the raw/, corrections and known labels of a DATA_DIR, and nothing else. Return the contents."""
    given = settings.data_dir
    scratch.mkdir()
    if not settings.refresh:
        shutil.copytree(given / names.RAW, scratch / names.RAW, copy_function=os.link)
    if (given / "corrections.csv").exists():
        shutil.copyfile(given / "corrections.csv", scratch / "corrections.csv")
    if (mapping := given / names.LABEL_MAP / "mapping.json").exists():
        (scratch / names.LABEL_MAP).mkdir()
        shutil.copyfile(mapping, scratch / names.LABEL_MAP / "mapping.json")
    with contextlib.suppress(PipelineError):
        run(settings.model_copy(update={"data_dir": scratch}))
    return contents(scratch)


class Killed(BaseException):
    """Ends the run. Until it has left the run, the disk cannot be changed, so that no `finally` cleans up."""


class Kill:
    """A kill just before the n-th change of the disk that fits a pattern, such as "rename .draft-split split"."""

    def __init__(self, pattern: str, number: int) -> None:
        self.pattern, self.left, self.came = pattern, number, False

    def before(self, what: str) -> None:
        self.left -= fnmatchcase(what, self.pattern)
        self.came = self.came or self.left < 0
        if self.came:
            raise Killed(what)


_watching: list[Callable[[str, tuple], None]] = []


@functools.cache
def _install() -> None:
    def hook(event: str, arguments: tuple) -> None:
        for watch in _watching or ():  # at the end of the process, Python sets the module's names to None
            watch(event, arguments)

    sys.addaudithook(hook)  # there is no way to remove it


@contextlib.contextmanager
def watched(watch: Callable[[str, tuple], None]) -> Iterator[None]:
    """Call `watch` with the name and arguments of each event that Python audits, before it happens."""
    _install()
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.clear()


@contextlib.contextmanager
def killed(kill: Kill, data_dir: Path) -> Iterator[None]:
    thread = threading.current_thread()

    def name(path: object) -> str:
        return os.path.relpath(os.fsdecode(path), data_dir) if isinstance(path, str | bytes | os.PathLike) else ""

    def watch(event: str, arguments: tuple) -> None:
        if threading.current_thread() is not thread:
            return
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            kill.before(f"write {name(arguments[0])}")
        elif event in ("os.rename", "os.link"):
            kill.before(f"{event.removeprefix('os.')} {name(arguments[0])} {name(arguments[1])}")
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            kill.before(f"{event.removeprefix('os.')} {name(arguments[0])}")

    with watched(watch), contextlib.suppress(Killed):
        yield


class Bucket:
    """A bucket in memory, behind a real endpoint."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}  # by path below PREFIX

    def answer(self, request: object) -> None:
        url = urlsplit(request.path)
        key = unquote(url.path.lstrip("/")).partition("/")[2]
        if key:
            content = self.objects[key.removeprefix(f"{PREFIX}/")]
            send(request, 200, content, ETag=f'"{_etag(content)}"')
            return
        assert parse_qs(url.query)["list-type"] == ["2"]
        listed = "".join(
            f"<Contents><Key>{escape(quote(f'{PREFIX}/{path}'))}</Key><Size>{len(content)}</Size>"
            f"<ETag>{_etag(content)}</ETag></Contents>"
            for path, content in sorted(self.objects.items())
        )
        start = "<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        send(request, 200, f"{start}{listed}</ListBucketResult>".encode())


def _etag(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture(scope="module")
def served_bucket():
    """A bucket, and a client for 50 runs, because creating a client takes longer than a run.

    A client is replaced because each run leaves data in it. awscrt is turned off: it would start threads for each run.
    """
    bucket, calls = Bucket(), itertools.count()
    connect = functools.lru_cache(1)(lambda number, real=client.connect: real())
    with serve(bucket.answer) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        patch.setattr(client, "connect", lambda: connect(next(calls) // 50))
        patch.setattr(crt, "MAX_FAILURES", 0)
        yield bucket


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A temporary folder, in memory if possible: otherwise, thousands of runs would wait for the disk."""
    place = str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


class Source:
    """Images put into raw/ by hand, or objects in a bucket."""

    def __init__(self, raw: Path, bucket: Bucket | None) -> None:
        self.raw, self.bucket, self.time = raw, bucket, 0
        self.images: dict[str, int] = {}

    def put(self, path: str, number: int | None) -> None:
        if self.images.get(path) == number:
            return
        self.images.pop(path, None)
        if self.bucket:
            self.bucket.objects.pop(path, None)
        else:
            (self.raw / path).unlink(missing_ok=True)
        if number is None:
            return
        self.images[path] = number
        if self.bucket:
            self.bucket.objects[path] = CONTENTS[number]
        else:
            self.time += 1
            (self.raw / path).parent.mkdir(parents=True, exist_ok=True)
            (self.raw / path).write_bytes(CONTENTS[number])
            os.utime(self.raw / path, ns=(self.time, self.time))

    def move(self, path: str, target: str) -> None:
        if path == target or path not in self.images:
            return
        self.images[target] = self.images.pop(path)
        if self.bucket:
            self.bucket.objects[target] = self.bucket.objects.pop(path)
        else:
            (self.raw / target).parent.mkdir(parents=True, exist_ok=True)
            (self.raw / path).rename(self.raw / target)


@pytest.fixture(scope="module")
def started(served_bucket):
    """The folders of two first runs: on images that were put into raw/, and on the same objects in a bucket."""
    with folder_in_memory() as base:
        for folder, bucket in ((base / "by hand", None), (base / "downloaded", served_bucket)):
            folder.mkdir()
            source = Source(folder / names.RAW, bucket)
            for path, number in START.items():
                source.put(path, number)
            run(settings_for(folder, bucket))
        yield base


def copy_started(started: Path, data_dir: Path, bucket: Bucket | None) -> Source:
    """Make a DATA_DIR from a copy of one of the two folders."""
    shutil.copytree(started / ("downloaded" if bucket else "by hand"), data_dir, copy_function=os.link)
    source = Source(data_dir / names.RAW, bucket)
    source.images, source.time = dict(START), len(START)
    if bucket:
        bucket.objects = {path: CONTENTS[number] for path, number in START.items()}
    return source
