"""What steps tell each other about images: row types and their CSV files, and the index of TFRecord shards."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from dgmd_pipeline.errors import PipelineError


class SourceObject(NamedTuple):
    """An object of the bucket and the file it becomes."""

    key: str  # the whole key, prefix included
    size: int  # bytes
    etag: str  # as S3 gives it, without the quotes
    path: str  # below raw/, "/" between its parts: "<label>/<file>"


class RawFile(NamedTuple):
    """A file under `raw/` that ought to be a picture."""

    path: str  # below raw/, "/" between its parts
    label: str  # the first part of the path


class Image(NamedTuple):
    """A usable picture."""

    path: str  # below raw/, "/" between its parts
    label: str
    sha256: str  # of the file, 64 hexadecimal digits
    format: str  # what the content is, as Pillow names it: "JPEG", "PNG", ...
    width: int  # pixels, after EXIF orientation
    height: int
    group: str  # near-duplicates share it: the smallest sha256 among them; an image without any has its own


class Example(NamedTuple):
    """A picture to learn from: what balancing keeps and the split puts on a side."""

    path: str  # below raw/
    label: str
    class_index: int  # what stands for the label in records and models
    sha256: str
    group: str  # as in Image


class Rejected(NamedTuple):
    """A file or object that is left out, and why."""

    path: str  # below raw/, or the key of an object that was not downloaded
    label: str  # "" where there is none
    reason: str  # one word for counting: "unreadable", "duplicate", EXCLUDED, ...
    detail: str  # for the reader


LISTING, REJECTED = "listing.csv", "rejected.csv"  # files of the step folders
EXCLUDED = "excluded"  # the reason of a file that corrections.csv leaves out
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # cells that begin so are formulas to a spreadsheet

Fit = Literal["stretch", "letterbox", "crop"]  # how an image comes to the size of the model's input
INDEX = "index.json"  # of a folder of TFRecord shards
INDEX_SCHEMA = 2  # raised when the records or their index change


class Shard(NamedTuple):
    """A TFRecord file."""

    file: str  # its name
    records: int
    bytes: int
    sha256: str  # 64 hexadecimal digits


class ShardIndex(NamedTuple):
    """What a folder of TFRecord shards contains."""

    width: int  # pixels, of every image
    height: int
    fit: Fit  # how the images came to this size
    images: int
    bytes: int  # of all shards
    shards: list[Shard]  # in the order of the records


Row = TypeVar("Row", bound=NamedTuple)


def write(path: Path, kind: type[Row], rows: Iterable[Row]) -> int:
    """Write `rows` with a header to a new CSV file and return how many there were."""
    count = 0
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(kind._fields)
        for row in rows:
            writer.writerow(row)
            count += 1
    return count


def read(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Yield the rows of a file that `write` made, numbers as numbers.

    Raises PipelineError where the file is gone, another version's, or was edited.
    """
    types = [kind.__annotations__[name] for name in kind._fields]
    numbers = [(index, type_) for index, type_ in enumerate(types) if type_ in (int, float)]
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if header != list(kind._fields):
                raise ValueError(f"expected the columns {','.join(kind._fields)}, found {','.join(header)[:100]!r}")
            for values in reader:
                if len(values) != len(types):
                    raise ValueError(f"line {reader.line_num} has {len(values)} values instead of {len(types)}")
                for index, number in numbers:
                    values[index] = number(values[index])
                yield kind(*values)  # type: ignore[arg-type]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, csv.Error) as error:
        raise changed(path, error) from error


def read_json(path: Path) -> Any:
    """Return the value in a JSON file of a step. Raises PipelineError where the file is gone or was edited."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise changed(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of a step."""
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def read_shard_index(folder: Path) -> ShardIndex:
    """Read the index of a folder of TFRecord shards. Raises PipelineError where there is none that can be read."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if (schema := index["schema"]) != INDEX_SCHEMA:
            raise PipelineError(
                f"{path} has schema {schema}, this version reads {INDEX_SCHEMA}. Delete the folder {folder} and run "
                "again."
            )
        shards = [Shard(**entry) for entry in index["files"]]
        return ShardIndex(**{name: index[name] for name in ShardIndex._fields if name != "shards"}, shards=shards)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        raise PipelineError(
            f"{path} is missing or is not an index of records. Delete the folder {folder} and run again."
        ) from None


def changed(path: Path, error: Exception) -> PipelineError:
    """Return what to say of a file that is not what its step has written."""
    reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).split("\n")[0]
    return PipelineError(
        f"{path}: {reason}. It was changed after it was written: delete the folder {path.parent} and run again."
    )
