"""Lists the objects of a bucket, and maps their keys to safe paths below raw/."""

import logging
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from operator import lt
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import LISTING, REJECTED, Rejected, SourceObject
from dgmd_pipeline.s3 import throttling
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.errors import explain

log = logging.getLogger(__name__)
# Names that the pipeline itself uses in raw/, case-folded. This set omits names that begin with a dot, because objects
# whose names begin with a dot are ignored.
RESERVED = {"_success", LISTING, REJECTED}
_OBJECTS = "Objects"  # key of the parsed objects in a page
MAX_NAME_BYTES = 255  # the limit of common file systems
_PLAIN_NAME = re.compile(r"[0-9A-Za-z_][ -.0-\[\]-~]{,254}")  # safe names of files, if not in SYSTEM_NAMES
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")  # control characters, and the separator of Windows


class Objects:
    """Objects below one prefix. They are stored in columns, which need half the memory of tuples.

    Iteration yields a SourceObject for each object. Keys are not stored, because a key is `root` followed by the path.
    `root` is the prefix with its slash, or "" for the whole bucket.
    """

    def __init__(self, root: str, rows: Iterable[tuple[str, int, str]] = ()) -> None:
        self.root = root
        self.paths: list[str] = []
        self.sizes = array("q")
        self.etags: list[str] = []
        for row in rows:
            self.append(*row)

    def append(self, path: str, size: int, etag: str) -> None:
        """Add an object; the arguments are fields of a SourceObject."""
        self.paths.append(path)
        self.sizes.append(size)
        self.etags.append(etag)

    def rows(self) -> Iterator[tuple[str, int, str]]:
        """Yield path, size and ETag of each object."""
        return zip(self.paths, self.sizes, self.etags, strict=True)

    def by_path(self) -> "Objects":
        """Return the objects sorted by path. S3 lists objects in this order, except in directory buckets."""
        is_sorted = all(map(lt, self.paths, islice(self.paths, 1, None)))
        return self if is_sorted else Objects(self.root, sorted(self.rows()))

    def without(self, keys: Collection[str]) -> "Objects":
        """Return the objects whose keys are not among `keys`."""
        return Objects(self.root, (row for row in self.rows() if self.root + row[0] not in keys)) if keys else self

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[SourceObject]:
        return map(SourceObject, map(self.root.__add__, self.paths), self.sizes, self.etags, self.paths)


@dataclass(frozen=True)
class Listing:
    """The objects below one prefix."""

    bucket: str
    prefix: str  # without outer slashes; "" for the whole bucket
    objects: Objects
    rejected: list[Rejected]


class _ListedObject(NamedTuple):
    """An object as S3 lists it."""

    key: str
    size: int
    etag: str  # with quotes; empty if there is none


def list_objects(client: Client, bucket: str, prefix: str, ignore_case: bool = False) -> Listing:
    """List the objects whose keys begin with `<prefix>/`.

    `prefix` has no outer slashes; "" stands for the whole bucket. The key `<prefix>/<label>/<rest>` becomes the path
    `<label>/<rest>`. Folder markers and system files (`manifest.is_system_file`) are ignored. The reasons for a
    rejection are:

    - "no label": the object is directly below the prefix
    - "unsafe name"
    - "reserved name"
    - "clash": the object needs a file where another object needs a folder, or the reverse
    - "same name": the path differs from another object's path only in Unicode form or, with `ignore_case`, in case. The
      disk may ignore this difference

    If two objects exclude each other, the first one in the listing is used.

    Raises NoUsableInput if the bucket or prefix does not exist, is empty or denies access, and if S3 does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    root = f"{prefix}/" if prefix else ""
    try:
        with throttling.gate(client):
            objects, rejected, ignored = _assign_paths(_list(client, bucket, root), root, ignore_case)
            if not objects and not rejected:
                but = " but system files: upload images as <path>/<label>/<file>."
                hint = but if ignored else _hint(client, bucket, prefix)
                raise NoUsableInput(f"There are no objects in s3://{bucket}/{root}{hint}")
    except (BotoCoreError, ClientError, ResponseParserError, OSError) as error:  # OSError: unreadable credentials file
        raise explain(error, client, bucket) from error
    if ignored:
        log.info("  s3://%s/%s: %s", bucket, root, manifest.describe_system_files(ignored, "objects"))
    _warn_of_lost_labels(objects.paths, rejected)
    return Listing(bucket, prefix, objects, rejected)


def _list(client: Client, bucket: str, root: str) -> Iterator[_ListedObject]:
    """Yield the objects whose keys begin with `root`.

    A handler of botocore's events parses the objects of each page. botocore parses the rest.
    """
    # One of botocore's own handlers parses the whole page to look for an error. With "*" in place of "s3" in the event,
    # botocore calls `_parse_objects` before this handler.
    event = "before-parse.*.ListObjectsV2"
    client.meta.events.register_first(event, _parse_objects)
    try:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root):
            yield from page.get(_OBJECTS, ())
    finally:
        client.meta.events.unregister(event, _parse_objects)


def _parse_objects(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object) -> None:
    """Handle the event "before-parse" of botocore: parse the objects of a page, and leave the rest to botocore.

    botocore's general parser takes six times as long to parse an object, and twice as long to decode a key.
    """
    from xml.etree import ElementTree

    if response_dict["status_code"] != HTTPStatus.OK:
        return
    try:
        page = ElementTree.fromstring(response_dict["body"])  # noqa: S314 - botocore parses it with the same parser
    except ElementTree.ParseError:
        return  # botocore raises its own error
    namespace = page.tag.rpartition("}")[0]
    contents, key, size, etag, encoding = (
        f"{namespace}}}{name}" if namespace else name for name in ("Contents", "Key", "Size", "ETag", "EncodingType")
    )
    if found := page.findall(contents):
        keys = [each.findtext(key, "") for each in found]
        if page.findtext(encoding) == "url":
            keys = _unquote(keys)
        sizes = [int(each.findtext(size, "")) for each in found]
        etags = [each.findtext(etag, "") for each in found]
        customized_response_dict[_OBJECTS] = list(map(_ListedObject, keys, sizes, etags))
        page[:] = [each for each in page if each.tag != contents]
        response_dict["body"] = ElementTree.tostring(page)


def _unquote(keys: Sequence[str]) -> list[str]:
    """Decode URL-encoded keys as botocore does, but all in one call. This takes a third of botocore's time.

    If a key contains a line break, each key is decoded in a call of its own.
    """
    decoded = unquote_plus("\n".join(keys)).split("\n")
    return decoded if len(decoded) == len(keys) else [*map(unquote_plus, keys)]


def ignores_case(folder: Path) -> bool:
    """Return whether the disk of `folder` ignores case. Return False if no name in `folder` contains a letter."""
    for path in folder.iterdir() if folder.is_dir() else ():
        other = path.with_name(path.name.swapcase())
        with suppress(OSError):  # `other` does not exist
            if path != other:
                return path.samefile(other)
    return False


def _warn_of_lost_labels(paths: Iterable[str], rejected: Sequence[Rejected]) -> None:
    """Warn of each label that loses objects to another label, because the disk may not distinguish the two names."""
    lost = Counter(row.label for row in rejected if row.reason in ("same name", "clash"))
    if not lost:
        return
    kept = Counter(path.partition("/")[0] for path in paths)
    first = {_fold(label, True): label for label in reversed(kept)}
    for label, count in lost.items():
        other = first.get(_fold(label, True), label)
        if other != label:
            log.warning(
                "  the label %s %s: it differs from %s only in case or Unicode form, which the disk may ignore. %s "
                "of its %s objects are left out, because the other label has objects of the same names. Rename the "
                "label in the bucket.",
                label, "loses images" if kept[label] else "vanishes", other, f"{count:,}", f"{count + kept[label]:,}",
            )  # fmt: skip


def _assign_paths(items: Iterable[_ListedObject], root: str, ignore_case: bool) -> tuple[Objects, list[Rejected], int]:
    """Return the objects with their paths below `root`, the rejected objects, and the number of system files."""
    ignored = 0
    objects = Objects(root)
    rejected: list[Rejected] = []
    files: dict[str, str] = {}  # the path of each file; a key is the path as `_fold` returns it
    folders: set[str] = set()  # folders and all their parents, as `_fold` returns them
    last: str | None = None  # folder of the last object that was not rejected
    folded_last = ""
    for key, size, etag in items:
        if size == 0 and key.endswith("/"):
            continue
        path = key[len(root) :]
        folder, _, name = path.rpartition("/")
        if folder == last and _PLAIN_NAME.fullmatch(name) and name.lower() not in manifest.SYSTEM_NAMES:
            # The folder is already checked, and the name is safe. This shortcut saves half of the time.
            folded = path if folded_last == last and not ignore_case else f"{folded_last}/{_fold(name, ignore_case)}"
            if folded not in files and folded not in folders:
                files[folded] = path
                objects.append(path, size, etag.strip('"'))
                continue
        if manifest.is_system_file(path):
            ignored += 1
            continue
        label, slash, _ = path.partition("/")
        problem = _path_problem(path) if slash else ("no label", "it is directly below the prefix, not in a label")
        if not problem:
            folded = _fold(path, ignore_case)
            parents = _parents(folded) if folded.rpartition("/")[0] not in folders else []
            parent_file = next((files[folder] for folder in parents if folder in files), None)
            if folded in files:
                problem = "same name", f"it differs from {files[folded]} only in case or Unicode form"
            elif folded in folders:
                problem = "clash", "other objects need a folder of this name"
            elif parent_file is not None:
                problem = "clash", f"it needs a folder where {parent_file} is a file"
            else:
                files[folded] = path
                folders.update(parents)
                last, folded_last = folder, folded.rpartition("/")[0]
        if problem:
            safe_label = label if slash and _path_problem(label) is None else ""
            rejected.append(Rejected(formatting.printable(key), safe_label, *problem))
        else:
            objects.append(path, size, etag.strip('"'))
    return objects, rejected, ignored


def _path_problem(path: str) -> tuple[str, str] | None:
    """Return the reason and detail if a path is not safe below raw/, else None."""
    parts = path.split("/")
    for part in parts:
        if part in ("", ".", ".."):
            return "unsafe name", "a part of its path is empty, '.' or '..'"
        if UNSAFE.search(part):
            return "unsafe name", "its path contains a control character or a backslash"
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            return "unsafe name", "its path is not valid Unicode"
        if length > MAX_NAME_BYTES:
            return "unsafe name", f"a part of its path has {length} bytes, more than {MAX_NAME_BYTES}"
    if _fold(parts[0], True) in RESERVED:
        return "reserved name", f"the pipeline itself uses the name {parts[0]}"
    return None


def _fold(path: str, ignore_case: bool) -> str:
    """Return a form that is equal for all paths that a disk may treat as the same file.

    The form is NFC. With `ignore_case`, the forms of two paths are equal if the paths are a canonical caseless match
    (The Unicode Standard, section 3.13, D145).
    """
    if path.isascii():
        return path.lower() if ignore_case else path
    if not ignore_case:
        return unicodedata.normalize("NFC", path)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _parents(path: str) -> list[str]:
    return [path[: slash.start()] for slash in re.finditer("/", path)]


def _hint(client: Client, bucket: str, prefix: str) -> str:
    """Return the end of the error about an empty prefix: the folders in the nearest parent that has folders."""
    while prefix:
        prefix = prefix.rpartition("/")[0]
        root = f"{prefix}/" if prefix else ""
        page = client.list_objects_v2(Bucket=bucket, Prefix=root, Delimiter="/")
        folders = [folder["Prefix"][len(root) :] for folder in page.get("CommonPrefixes", ())]
        if folders:
            ellipsis = ", ..." if len(folders) > 5 else ""
            shown = ", ".join(formatting.printable(folder) for folder in folders[:5])
            return f": s3://{bucket}/{root} has {shown}{ellipsis}. Correct the path or upload images."
        if page.get("Contents"):
            return f": s3://{bucket}/{root} has objects but no folders. Correct the path or upload images."
    return ": the bucket is empty. Correct its name or upload images as <path>/<label>/<file>."
