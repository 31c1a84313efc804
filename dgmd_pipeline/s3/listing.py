"""Keys of a bucket -> safe paths below raw/."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import download as s3_download
from dgmd_pipeline.s3 import errors
from dgmd_pipeline.s3.client import Client

# what the pipeline itself writes there, case folded
RESERVED = {"_success", "listing.csv", "rejected.csv", s3_download.PARTS, ".resume"}
MAX_NAME_BYTES = 255  # the longest name of a file on every usual disk
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")  # control characters, and the separator of other systems


def list_objects(client: Client, bucket: str, prefix: str) -> tuple[list[SourceObject], list[Rejected]]:
    """List what lies under exactly `<prefix>/` (no outer slashes; "" is the whole bucket): what to download, what not.

    `<prefix>/<label>/<anything>` becomes the path `<label>/<anything>`. Folder markers are passed over. The reasons for
    a rejection are "no label" (directly under the prefix), "unsafe name", "reserved name", "clash" (a file where
    another object needs a folder) and "same name" (one file on a disk that ignores case or normalises Unicode); of
    objects that exclude each other the first of the listing stays.

    Raises NoUsableInput for a bucket or prefix that is missing, empty or closed, and for an S3 that does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    under = f"{prefix}/" if prefix else ""
    try:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=under)
        listing = (item for page in pages for item in page.get("Contents", ()))
        objects, rejected = _assign_paths(listing, under)
        if not objects and not rejected:
            raise NoUsableInput(f"There are no objects in s3://{bucket}/{under}{_hint(client, bucket, prefix)}")
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        raise errors.explain(error, client, bucket) from error
    return objects, rejected


def _assign_paths(listing: Iterable[dict[str, Any]], under: str) -> tuple[list[SourceObject], list[Rejected]]:
    """Give every object of a listing (Key, Size, ETag) its path, or the reason why it has none."""
    objects: list[SourceObject] = []
    rejected: list[Rejected] = []
    files: dict[str, str] = {}  # folded path -> path
    folders: set[str] = set()  # folded; a folder is in it only together with all above it
    for item in listing:
        key, size = item["Key"], item["Size"]
        if key.endswith("/") and size == 0:
            continue
        path = key[len(under) :]
        label, slash, _ = path.partition("/")
        fault = (
            _path_problem(path) if slash else ("no label", "it lies directly under the prefix, in no label's folder")
        )
        if not fault:
            folded = _fold(path)
            above = _folders_above(folded) if folded.rpartition("/")[0] not in folders else []
            file_above = next((files[folder] for folder in above if folder in files), None)
            if folded in files:
                fault = "same name", f"on a disk that ignores case or normalises Unicode it is {files[folded]}"
            elif folded in folders:
                fault = "clash", "other objects need a folder of this name"
            elif file_above is not None:
                fault = "clash", f"it needs a folder where {file_above} is a file"
            else:
                files[folded] = path
                folders.update(above)
        if fault:
            named = label if slash and _path_problem(label) is None else ""
            rejected.append(Rejected(formatting.printable(key), named, *fault))
        else:
            objects.append(SourceObject(key, size, item.get("ETag", "").strip('"'), path))
    return objects, rejected


def _path_problem(path: str) -> tuple[str, str] | None:
    """Return reason and detail where a key's path cannot be a path below raw/."""
    parts = path.split("/")
    for part in parts:
        if part in ("", ".", ".."):
            return "unsafe name", "a part of its name is empty, '.' or '..'"
        if UNSAFE.search(part):
            return "unsafe name", "its name holds a control character or a backslash"
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            return "unsafe name", "its name is not valid Unicode"
        if length > MAX_NAME_BYTES:
            return "unsafe name", f"a part of its name has {length} bytes, more than {MAX_NAME_BYTES}"
    if _fold(parts[0]) in RESERVED:
        return "reserved name", f"{parts[0]} is a name that the pipeline itself uses"
    return None


def _fold(path: str) -> str:
    """Return what is the same for all names that a disk may take for one (Unicode's canonical caseless matching)."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _folders_above(path: str) -> list[str]:
    return [path[: slash.start()] for slash in re.finditer("/", path)]


def _hint(client: Client, bucket: str, prefix: str) -> str:
    """Return the end of the sentence about an empty prefix: the folders of the nearest level that has any."""
    while prefix:
        prefix = prefix.rpartition("/")[0]
        under = f"{prefix}/" if prefix else ""
        page = client.list_objects_v2(Bucket=bucket, Prefix=under, Delimiter="/")
        folders = [folder["Prefix"][len(under) :] for folder in page.get("CommonPrefixes", ())]
        if folders:
            more = ", ..." if len(folders) > 5 else ""
            shown = ", ".join(formatting.printable(folder) for folder in folders[:5])
            return f": s3://{bucket}/{under} has {shown}{more}. Correct the path or upload the pictures."
        if page.get("Contents"):
            return f": s3://{bucket}/{under} has objects but no folders. Correct the path or upload the pictures."
    return ": the bucket is empty. Correct its name or upload the pictures as <path>/<label>/<file>."
