"""The keys of a bucket -> safe paths below raw/."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import LISTING, REJECTED, Rejected, SourceObject
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.download import PARTS
from dgmd_pipeline.s3.errors import explain

# Names that the pipeline itself uses in raw/, case-folded.
RESERVED = {"_success", ".resume", LISTING, REJECTED, PARTS}
MAX_NAME_BYTES = 255  # the limit of common file systems
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")  # control characters, and the separator of Windows


@dataclass(frozen=True)
class Listing:
    """The objects below one prefix."""

    bucket: str
    prefix: str  # without outer slashes; "" for the whole bucket
    objects: list[SourceObject]
    rejected: list[Rejected]


class _ListedObject(TypedDict):
    """An object as S3 lists it."""

    Key: str
    Size: int
    ETag: NotRequired[str]


def list_objects(client: Client, bucket: str, prefix: str) -> Listing:
    """List the objects below exactly `<prefix>/` (no outer slashes; "" for the whole bucket).

    The key `<prefix>/<label>/<rest>` becomes the path `<label>/<rest>`. Folder markers are ignored. The reasons for a
    rejection are "no label" (directly below the prefix), "unsafe name", "reserved name", "clash" (a file where another
    object needs a folder) and "same name" (the same file on a disk that ignores case or normalises Unicode). If objects
    exclude each other, the first one listed is used.

    Raises NoUsableInput if the bucket or prefix does not exist, is empty or denies access, and if S3 does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    root = f"{prefix}/" if prefix else ""
    try:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root)
        items = (item for page in pages for item in page.get("Contents", ()))
        objects, rejected = _assign_paths(items, root)
        if not objects and not rejected:
            raise NoUsableInput(f"There are no objects in s3://{bucket}/{root}{_hint(client, bucket, prefix)}")
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        raise explain(error, client, bucket) from error
    return Listing(bucket, prefix, objects, rejected)


def _assign_paths(items: Iterable[_ListedObject], root: str) -> tuple[list[SourceObject], list[Rejected]]:
    """Return every object with its path below `root`, or the reason why it cannot have one."""
    objects: list[SourceObject] = []
    rejected: list[Rejected] = []
    files: dict[str, str] = {}  # folded path -> path
    folders: set[str] = set()  # folded; contains all parents of each folder
    for item in items:
        key, size = item["Key"], item["Size"]
        if key.endswith("/") and size == 0:
            continue
        path = key[len(root) :]
        label, slash, _ = path.partition("/")
        problem = _path_problem(path) if slash else ("no label", "it is directly below the prefix, not in a label")
        if not problem:
            folded = _fold(path)
            parents = _parents(folded) if folded.rpartition("/")[0] not in folders else []
            parent_file = next((files[folder] for folder in parents if folder in files), None)
            if folded in files:
                problem = "same name", f"on a disk that ignores case or normalises Unicode, it is {files[folded]}"
            elif folded in folders:
                problem = "clash", "other objects need a folder of this name"
            elif parent_file is not None:
                problem = "clash", f"it needs a folder where {parent_file} is a file"
            else:
                files[folded] = path
                folders.update(parents)
        if problem:
            safe_label = label if slash and _path_problem(label) is None else ""
            rejected.append(Rejected(formatting.printable(key), safe_label, *problem))
        else:
            objects.append(SourceObject(key, size, item.get("ETag", "").strip('"'), path))
    return objects, rejected


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
    if _fold(parts[0]) in RESERVED:
        return "reserved name", f"the pipeline itself uses the name {parts[0]}"
    return None


def _fold(path: str) -> str:
    """Return a form that is equal for all paths that a disk may treat as the same file.

    Method: canonical caseless matching, The Unicode Standard, section 3.13, D145.
    """
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _parents(path: str) -> list[str]:
    return [path[: slash.start()] for slash in re.finditer("/", path)]


def _hint(client: Client, bucket: str, prefix: str) -> str:
    """Return the end of the error about an empty prefix: the folders at the nearest level above that has any."""
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
