"""Checks that a downloaded object is the one that was listed, and that every byte is intact."""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from dgmd_pipeline.manifest import SourceObject

CHECKSUMS = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")  # algorithms that botocore and `_checksum` support
MD5 = re.compile("[0-9a-f]{32}")
DIRECTORY_BUCKET = "--x-s3"  # the end of the name of a directory bucket, whose ETags are random


def checksum_header(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the checksum of a whole object from the headers of the response: algorithm and base64 value.

    Returns None if the headers contain no checksum of the whole object. `headers` has names in lower case.
    """
    for name in CHECKSUMS:
        value = headers.get(f"x-amz-checksum-{name}", "-")
        if "-" not in value:  # "<checksum>-<parts>" is a checksum of the parts' checksums
            return name, value
    return None


def has_md5(bucket: str, source: SourceObject, headers: Mapping[str, str]) -> bool:
    """Return whether the listed ETag is the MD5 sum of the content.

    The ETag is another value for multipart uploads, for objects encrypted with a KMS key, and in directory buckets.
    """
    encryption = headers.get("x-amz-server-side-encryption", "AES256")
    customer_key = "x-amz-server-side-encryption-customer-algorithm" in headers
    listed = MD5.fullmatch(source.etag) is not None
    return listed and encryption == "AES256" and not customer_key and not bucket.endswith(DIRECTORY_BUCKET)


def difference(source: SourceObject, headers: Mapping[str, str], size: int, md5: str | None) -> str | None:
    """Return how a downloaded object of `size` bytes differs from the listed one, or None if it does not.

    `md5` is the MD5 sum of the bytes (hexadecimal) if the listed ETag should be equal to it, else None.
    """
    if size != source.size:
        return f"{source.size} bytes when it was listed, now {size}"
    if md5 is not None:
        return None if md5 == source.etag else f"the MD5 sum is {md5}, but the ETag is {source.etag}"
    etag = headers.get("etag", "").removeprefix("W/").strip('"')
    if etag and source.etag and etag != source.etag:
        return f"the ETag was {source.etag[:100]} when it was listed, now it is {etag[:100]}"
    return None


def file_difference(bucket: str, source: SourceObject, headers: Mapping[str, str], path: Path) -> str | None:
    """Return how a downloaded file differs from the listed object, or None if it does not.

    Compares the bytes with the checksum in the response. If the response has no checksum, compares the bytes with the
    listed ETag, provided that it is an MD5 sum. Raises OSError, and ValueError for a malformed checksum.
    """
    size = path.stat().st_size
    if size != source.size:
        return difference(source, headers, size, None)
    if checksum := checksum_header(headers):
        if base64.b64decode(checksum[1]) != _checksum(checksum[0], path.read_bytes()):
            return f"the checksum {checksum[0]} differs"
    elif has_md5(bucket, source, headers):
        return difference(source, headers, size, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
    return difference(source, headers, size, None)


def _checksum(name: str, content: bytes) -> bytes:
    from awscrt import checksums

    functions: dict[str, Callable[[], bytes]] = {
        "crc32": lambda: checksums.crc32(content).to_bytes(4, "big"),
        "crc32c": lambda: checksums.crc32c(content).to_bytes(4, "big"),
        "crc64nvme": lambda: checksums.crc64nvme(content).to_bytes(8, "big"),
        "sha1": lambda: hashlib.sha1(content, usedforsecurity=False).digest(),
        "sha256": lambda: hashlib.sha256(content).digest(),
    }
    return functions[name]()
