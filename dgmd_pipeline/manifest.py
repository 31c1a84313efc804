"""The files that steps exchange: row types and their CSV files, JSON files, and the index of TFRecord shards."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar, get_type_hints

from dgmd_pipeline.errors import ChangedFile, PipelineError
from dgmd_pipeline.formatting import one_line

# Some texts in files of earlier versions are longer than the default limit, 131,072 characters.
csv.field_size_limit(2**31 - 1)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


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
    group: str  # the smallest sha256 in the image's group of near-duplicates; without near-duplicates, its own sha256


class Example(NamedTuple):
    """An image that balancing has kept, for training or validation."""

    path: str  # below raw/
    label: str
    class_index: int  # the label's number in TFRecords and models
    sha256: str
    group: str  # as in Image


class _RejectedFields(NamedTuple):
    path: str  # of the file, below raw/; for an object that was not downloaded, its key
    label: str  # "" if there is none
    reason: str  # a category for counting: "unreadable", "duplicate", EXCLUDED, ...
    detail: str  # an explanation, as `formatting.one_line` returns it


class Rejected(_RejectedFields):
    """A file or object that is left out, and the reason."""

    __slots__ = ()

    def __new__(cls, path: str, label: str, reason: str, detail: str) -> Self:
        """Shorten `detail`.

        The error text of a library may quote the file. A text about a damaged TIFF file of 35 kB had 133 kB.
        """
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
MISSING = -1  # stands for the position of a value that was not found
RECORDS = "records.npy"  # in a folder of TFRecord shards: one RECORD for each TFRecord, in the order of the TFRecords
RECORD = [  # fields of a NumPy type, which describes a TFRecord. A frame is a TFRecord with its length and checksums
    ("sha256", "S32"),  # of the image file
    ("row", "S16"),  # hash of the image file, label and path; the record depends on these and on the settings
    ("label", "<i4"),  # class index
    ("start", "<u8"),  # position of the record's frame in its shard, in bytes
    ("length", "<u4"),  # of the frame, in bytes
    ("image", "<u4"),  # position of the encoded image in the frame
    ("image_length", "<u4"),  # of the encoded image, in bytes
]


class Shard(NamedTuple):
    """A TFRecord file in a folder of shards."""

    file: str  # name
    records: int
    bytes: int
    sha256: str  # 64 hexadecimal digits
    rows: str  # SHA-256 of the records' `row` hashes; with the same settings, shards with equal `rows` are equal


class ShardIndex(NamedTuple):
    """The contents of a folder of TFRecord shards."""

    width: int  # pixels; all images have the same size
    height: int
    fit: Fit
    images: int
    bytes: int  # of all shards
    records_sha256: str  # of the file RECORDS, 64 hexadecimal digits
    shards: list[Shard]  # in the order of their records


# A spreadsheet reads a cell as a formula if it begins with one of these characters. Some programs and locales begin a
# new cell at a semicolon, a tab or a line break. Source: owasp.org/www-community/attacks/CSV_Injection.
_FORMULA = "=+\\-@\uff1d\uff0b\uff0d\uff20"
_BEFORE_FORMULA = re.compile(rf"((?:^|[;\t\r\n])\s*'*)(?=[{_FORMULA}])")
_ESCAPED_FORMULA = re.compile(rf"((?:^|[;\t\r\n])\s*'*)'(?=[{_FORMULA}])")
_SUSPICIOUS = frozenset("=+-@\uff1d\uff0b\uff0d\uff20' ")


def is_system_file(path: str) -> bool:
    """Return whether a part of a path (separated by "/") is in SYSTEM_NAMES, or begins with a dot.

    The parts "." and ".." do not count, although they begin with a dot.
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
    # These conditions are false for almost every text, and take a tenth of the time of the substitution.
    if isinstance(value, str) and (value[:1] in _SUSPICIOUS or ";" in value or not value.isprintable()):
        return _BEFORE_FORMULA.sub(r"\1'", value)
    return value


def from_cell(text: str) -> str:
    """Return the text that `to_cell` was called with."""
    return _ESCAPED_FORMULA.sub(r"\1", text) if "'" in text else text


def write(path: Path, kind: type[Row], rows: Iterable[Row]) -> int:
    """Write a CSV file with a header, and return the number of rows. `to_cell` prevents formulas in spreadsheets."""
    count = 0
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(kind._fields)
        for row in rows:
            writer.writerow(map(to_cell, row))
            count += 1
    return count


# Maximum number of texts that `read` remembers. If a text is equal to a remembered one, both share one object.
# This saves memory, because neighbouring rows have the same label, and in most rows, `group` is equal to `sha256`: a
# million Examples take 0.3 GB of memory instead of 0.5.
_SHARED = 1000


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
            shared: dict[str, str] = {}
            for values in reader:
                if len(values) != len(types):
                    raise ValueError(f"line {reader.line_num} has {len(values)} values instead of {len(types)}")
                if "'" in "".join(values):
                    values[:] = map(from_cell, values)
                if len(shared) > _SHARED:
                    shared.clear()
                values[:] = map(shared.setdefault, values, values)
                for index, number in numbers:
                    values[index] = number(values[index])
                yield kind(*values)  # type: ignore[arg-type]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, csv.Error) as error:
        raise changed_file_error(path, error) from error


_BATCH_BYTES = 2**18  # size of a batch in the file; Arrow reads 32 batches ahead, and a row must fit into a batch


def read_columns(path: Path, kind: type[Row], *names: str) -> "Iterator[pa.RecordBatch]":
    """Yield batches of about 1,000 rows with the columns `names` (default: all) of a file that `write` wrote.

    The column of a `str` field is binary, and `decode` reads its values. The column of an `int` field is int64. This
    function takes a fifth of the time of `read`.

    Raises PipelineError if the file is missing, has other columns, or was edited.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow

    hints = get_type_hints(kind)
    types = {name: pa.int64() if hints[name] is int else pa.binary() for name in kind._fields}
    try:
        with path.open("rb") as file:
            header = next(csv.reader([decode(file.readline())]), [])
            if header != list(kind._fields):
                raise ValueError(f"expected the columns {','.join(kind._fields)}, found {','.join(header)[:100]!r}")
            if not file.peek(1):
                return
            with arrow.open_csv(
                file,
                arrow.ReadOptions(use_threads=False, block_size=_BATCH_BYTES, column_names=header),
                arrow.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
                arrow.ConvertOptions(column_types=types, include_columns=list(names or header), null_values=[]),
            ) as batches:
                for batch in batches:
                    yield _without_apostrophes(batch)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, csv.Error) as error:
        raise changed_file_error(path, error) from error


def _without_apostrophes(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Apply `from_cell` to the texts of a batch."""
    import pyarrow as pa

    for position, (name, column) in enumerate(zip(batch.schema.names, batch.columns, strict=True)):
        if pa.types.is_binary(column.type) and b"'" in _content(column):
            texts = [encode(from_cell(text)) for text in map(decode, column.to_pylist())]
            batch = batch.set_column(position, name, pa.array(texts, pa.binary()))
    return batch


def write_columns(path: Path, kind: type[Row], batches: "Iterable[pa.RecordBatch]") -> None:
    """Write the same file as `write`. The columns of a batch are the fields of `kind`, in the order of the fields."""
    with path.open("wb") as file:
        file.write(f"{','.join(kind._fields)}\r\n".encode())
        for batch in batches:
            if batch.num_rows:
                file.write(_to_csv(batch.columns))


def _to_csv(columns: "Sequence[pa.Array]") -> bytes:
    import pyarrow as pa
    from pyarrow import compute

    *cells, last = (
        column.cast(pa.string()).view(pa.binary()) if pa.types.is_integer(column.type) else column for column in columns
    )
    lines = compute.binary_join_element_wise(*cells, compute.binary_join_element_wise(last, b"\r\n", b""), b",")
    text = _content(lines)
    if _is_plain(text, len(lines), len(columns)):
        return text
    buffer = io.StringIO(newline="")
    values = (
        [decode(value) if isinstance(value, bytes) else value for value in column.to_pylist()] for column in columns
    )
    csv.writer(buffer).writerows(map(to_cell, row) for row in zip(*values, strict=True))
    return encode(buffer.getvalue())


def _is_plain(text: bytes, rows: int, columns: int) -> bool:
    """Return True only if `csv` would quote no cell of this text, and `to_cell` would change no cell.

    A wrong False does no harm, because the slower code of the caller writes the same text.
    """
    import numpy as np

    counts = (text.count(character) for character in (b",", b"\r", b"\n"))
    if [*counts] != [rows * (columns - 1), rows, rows] or any(each in text for each in (b'"', b";", b"\xef\xbc")):
        return False
    values = np.frombuffer(text, np.uint8)
    positions = np.flatnonzero(
        (values == ord("=")) | (values == ord("+")) | (values == ord("-")) | (values == ord("@"))
    )
    before = values[positions - 1]  # for the first byte, the index -1 selects the last line break
    return not ((before <= ord(" ")) | (before == ord(",")) | (before == ord("'")) | (before > ord("~"))).any()


def _content(column: "pa.BinaryArray") -> bytes:
    """Return the values of a column, one after the other. The column must not be a slice of another one."""
    return column.buffers()[2].to_pybytes() if column.buffers()[2] else b""


def decode(text: bytes) -> str:
    """Return the text of a value in a binary column. Bytes that are not UTF-8 (some file names) become surrogates."""
    return text.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Return the bytes for which `decode` returns `text`."""
    return text.encode("utf-8", "surrogateescape")


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
    """Return the index of a folder of TFRecord shards.

    Raises PipelineError if the index is missing or cannot be read.
    """
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

    Raises PipelineError if the file RECORDS is missing or damaged.
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
    """For each value of `wanted`, return its position in `known`, or MISSING: int64 [n].

    Both arrays have the same type.
    """
    import numpy as np

    if not len(known):
        return np.full(len(wanted), MISSING)
    order = np.argsort(known, kind="stable")
    found = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[found] == wanted, found, MISSING)


def changed_file_error(path: Path, error: Exception) -> ChangedFile:
    """Return the error about a file that differs from what its step wrote."""
    reason = "it is missing" if isinstance(error, FileNotFoundError) else one_line(str(error)).rstrip(".")
    return ChangedFile(path, reason.replace(str(path), path.name))
