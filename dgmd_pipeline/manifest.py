"""The files that steps exchange: row types and their CSV files, JSON files, and the index of TFRecord shards."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar, get_type_hints

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.formatting import one_line

csv.field_size_limit(2**31 - 1)  # earlier versions wrote details of more than the default, 131,072 characters

if TYPE_CHECKING:
    import numpy as np


class SourceObject(NamedTuple):
    """An object in the bucket, and its path as a file."""

    key: str  # the whole key, prefix included
    size: int  # bytes
    etag: str  # as S3 returns it, without quotes
    path: str  # below raw/, separated by "/": "<label>/<file>"


class RawFile(NamedTuple):
    """A file below `raw/` that should be an image."""

    path: str  # below raw/, separated by "/"
    label: str  # the first part of the path


class Image(NamedTuple):
    """A usable image."""

    path: str  # below raw/, separated by "/"
    label: str
    sha256: str  # of the file, 64 hexadecimal digits
    format: str  # Pillow's name for the format of the content: "JPEG", "PNG", ...
    width: int  # pixels, after EXIF orientation
    height: int
    group: str  # the smallest sha256 in the image's group of near-duplicates; its own if it has none


class Example(NamedTuple):
    """An image to train or validate on: one that balancing keeps."""

    path: str  # below raw/
    label: str
    class_index: int  # the label's number in TFRecords and models
    sha256: str
    group: str  # as in Image


class _RejectedFields(NamedTuple):
    path: str  # below raw/; the key of an object that was not downloaded
    label: str  # "" if there is none
    reason: str  # a category for counting: "unreadable", "duplicate", EXCLUDED, ...
    detail: str  # an explanation, as `formatting.one_line` returns it


class Rejected(_RejectedFields):
    """A file or object that is left out, and the reason."""

    __slots__ = ()

    def __new__(cls, path: str, label: str, reason: str, detail: str) -> Self:
        """Bound `detail`: libraries quote the file in it. A TIFF of 35 kB with damaged tags made 133 kB."""
        return super().__new__(cls, path, label, reason, one_line(detail))


LISTING, REJECTED = "listing.csv", "rejected.csv"  # files in step folders
EXCLUDED = "excluded"  # the reason for a file that corrections.csv excludes

# Names, in lower case, of files and folders that operating systems, archivers and NAS devices add to folders.
SYSTEM_NAMES = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found")
)

Fit = Literal["stretch", "letterbox", "crop"]  # how an image is resized to the model's input size
INDEX = "index.json"  # in a folder of TFRecord shards
INDEX_SCHEMA = 3  # increased when the index, the format of the records, or the pixels of an image change
MISSING = -1  # in place of a position
RECORDS = "records.npy"  # in a folder of TFRecord shards: a RECORD for each record, in their order
RECORD = [  # fields of a NumPy type
    ("sha256", "S32"),  # of the image file
    ("row", "S16"),  # hash of what the record depends on, apart from the settings: image file, label, path
    ("label", "<i4"),  # class index
    ("start", "<u8"),  # position of the record's frame in its shard, in bytes
    ("length", "<u4"),  # of the frame
    ("image", "<u4"),  # position of the encoded image in the frame
    ("image_length", "<u4"),
]


class Shard(NamedTuple):
    """A TFRecord file in a folder of shards."""

    file: str  # name
    records: int
    bytes: int
    sha256: str  # 64 hexadecimal digits
    rows: str  # SHA-256 of the records' `row` hashes: shards with equal rows are equal


class ShardIndex(NamedTuple):
    """The contents of a folder of TFRecord shards."""

    width: int  # pixels; all images have the same size
    height: int
    fit: Fit
    images: int
    bytes: int  # of all shards
    records_sha256: str  # of RECORDS, 64 hexadecimal digits
    shards: list[Shard]  # in the order of their records


# What a spreadsheet takes for a formula: one of these characters at the start of a cell, or after a character at which
# another program or locale begins a new cell. Source: owasp.org/www-community/attacks/CSV_Injection.
_FORMULA = "=+\\-@\uff1d\uff0b\uff0d\uff20"
_BEFORE_FORMULA = re.compile(rf"((?:^|[;\t\r\n])\s*'*)(?=[{_FORMULA}])")
_ESCAPED_FORMULA = re.compile(rf"((?:^|[;\t\r\n])\s*'*)'(?=[{_FORMULA}])")
_SUSPICIOUS = frozenset("=+-@\uff1d\uff0b\uff0d\uff20' ")


def is_system_file(path: str) -> bool:
    """Return whether a part of a path (separated by "/") is in SYSTEM_NAMES, or begins with a dot.

    The parts "." and ".." are not names.
    """
    if path.startswith(".") or "/." in path:
        return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))
    return not SYSTEM_NAMES.isdisjoint(path.lower().split("/"))


def describe_system_files(count: int, what: str) -> str:
    """Return the text for the log about `count` system files that are ignored; `what` is their kind in plural."""
    return f"{count:,} {what} are ignored, because their names begin with a dot or belong to a system (Thumbs.db, ...)"


Row = TypeVar("Row", bound=NamedTuple)


def to_cell(value: object) -> object:
    """Put an apostrophe before each part of a text that a spreadsheet would run as a formula."""
    # The tests before the substitution exclude almost every text, in a tenth of its time.
    if isinstance(value, str) and (value[:1] in _SUSPICIOUS or ";" in value or not value.isprintable()):
        return _BEFORE_FORMULA.sub(r"\1'", value)
    return value


def from_cell(text: str) -> str:
    """Return the text that `to_cell` was called with."""
    return _ESCAPED_FORMULA.sub(r"\1", text) if "'" in text else text


def write(path: Path, kind: type[Row], rows: Iterable[Row]) -> int:
    """Write a CSV file with a header and return the number of rows. `to_cell` describes what spreadsheets see."""
    count = 0
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(kind._fields)
        for row in rows:
            writer.writerow(map(to_cell, row))
            count += 1
    return count


def read(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Yield the rows of a file that `write` wrote; `int` and `float` fields are converted.

    Raises PipelineError if the file is missing, has other columns, or was edited.
    """
    hints = get_type_hints(kind)
    types = [hints[name] for name in kind._fields]
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
                if "'" in "".join(values):
                    values[:] = map(from_cell, values)
                for index, number in numbers:
                    values[index] = number(values[index])
                yield kind(*values)  # type: ignore[arg-type]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, csv.Error) as error:
        raise changed_file_error(path, error) from error


def read_json(path: Path) -> Any:
    """Return the value in a step's JSON file. Raises PipelineError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise changed_file_error(path, error) from error


def write_json(path: Path, value: object) -> None:
    """Write a value to a step's JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def read_shard_index(folder: Path) -> ShardIndex:
    """Return the index of a folder of TFRecord shards. Raises PipelineError if it is missing or cannot be read."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if (schema := index["schema"]) != INDEX_SCHEMA:
            raise PipelineError(
                f"{path} has schema {schema}; this version reads schema {INDEX_SCHEMA}. Delete the folder {folder} "
                "and run again."
            )
        shards = [Shard(**entry) for entry in index["files"]]
        return ShardIndex(**{name: index[name] for name in ShardIndex._fields if name != "shards"}, shards=shards)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        raise PipelineError(
            f"{path} is missing or is not an index of TFRecord shards. Delete the folder {folder} and run again."
        ) from None


def read_records(folder: Path) -> "np.ndarray":
    """Return the RECORD of each record in a folder of TFRecord shards, mapped from disk.

    Raises PipelineError if the file is missing or damaged.
    """
    import numpy as np

    path = folder / RECORDS
    try:
        found = np.load(path, mmap_mode="r")
        if found.dtype != np.dtype(RECORD) or found.ndim != 1:
            raise ValueError(f"expected records, found {found.dtype}")
    except (OSError, EOFError, ValueError) as error:
        raise changed_file_error(path, error) from error
    return found


def positions_of(wanted: "np.ndarray", known: "np.ndarray") -> "np.ndarray":
    """Return the position of each of `wanted` in `known`, or MISSING: int64 [n]. Both are arrays of one type."""
    import numpy as np

    if not len(known):
        return np.full(len(wanted), MISSING)
    order = np.argsort(known, kind="stable")
    found = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[found] == wanted, found, MISSING)


def changed_file_error(path: Path, error: Exception) -> PipelineError:
    """Return the error about a file that differs from what its step wrote."""
    reason = "it is missing" if isinstance(error, FileNotFoundError) else one_line(str(error))
    return PipelineError(
        f"{path}: {reason}. It was changed after it was written: delete the folder {path.parent} and run again."
    )
