"""Fetches an S3 object with botocore, or returns the reason why the object is rejected."""

import hashlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import errors, integrity
from dgmd_pipeline.s3.client import Client
from dgmd_pipeline.s3.throttling import Gate

if TYPE_CHECKING:
    from botocore.response import StreamingBody

CHUNK = 1 << 16  # bytes between two checks for a stop; larger chunks save no measurable CPU time
ATTEMPTS = 4  # maximum number of attempts to fetch an object; botocore repeats requests within each attempt
BACKOFF = 0.4  # seconds to wait after an error in the first attempt; multiplied by four for each further attempt


class Throttled(NoUsableInput):
    """S3 answers nothing but "slow down"."""

    def __init__(self, sentence: str, rejected: Rejected) -> None:
        """`rejected` is the row of rejected.csv for the requested object."""
        super().__init__(sentence)
        self.rejected = rejected


class BotocoreTransfer:
    """Fetches objects of one bucket with botocore. Several threads may use it."""

    def __init__(self, client: Client, bucket: str, gate: Gate, stop: Event) -> None:
        """Setting `stop` ends all transfers; their files are then incomplete."""
        self._client, self._bucket, self._gate, self._stop = client, bucket, gate, stop
        self._is_verified = client.meta.config.response_checksum_validation != "when_required"

    def fetch(self, source: SourceObject, part: Path) -> Rejected | None:
        """Write one object to the file `part`.

        Returns None if the file is complete, or if `stop` was set before the end. Returns a Rejected if S3 does not
        send the object, or sends content that differs from the listing. Raises NoUsableInput if a failure has another
        cause than this object, Throttled if S3 accepts no request at all, and OSError for errors of the disk.
        """
        rejected: Rejected | None = None
        wait = 0.0
        for attempt in range(ATTEMPTS):
            if self._stop.wait(wait):
                return None
            rejected, error = self._attempt(source, part)
            if rejected is None or not (error is None or errors.is_worth_repeating(error)):
                break
            wait = BACKOFF * 4**attempt if error else 0.0
        if rejected and rejected.reason == errors.FAILED:
            self._check_service(source, rejected)
        return rejected

    def _attempt(self, source: SourceObject, part: Path) -> tuple[Rejected | None, Exception | None]:
        """Try once to fetch an object. Return its rejection and the exception behind the rejection.

        Both are None if the object is fetched, or if `stop` was set. The exception is None for a changed object.
        """
        import urllib3
        from botocore import exceptions as boto

        interruptions = (
            boto.HTTPClientError,
            boto.ResponseStreamingError,
            boto.IncompleteReadError,
            urllib3.exceptions.HTTPError,
        )
        label = source.path.partition("/")[0]
        try:
            response = self._client.get_object(Bucket=self._bucket, Key=source.key)
        # Renewing credentials from a file can raise OSError, ValueError and KeyError.
        except (boto.BotoCoreError, boto.ClientError, OSError, ValueError, KeyError) as error:
            if (found := errors.object_problem(error)) is None:
                raise errors.explain(error, self._client, self._bucket, source.key) from error
            return Rejected(source.key, label, *found), error
        headers = response["ResponseMetadata"]["HTTPHeaders"]
        try:
            with closing(response["Body"]) as body:
                problem = self._copy(body, source, headers, part)
        except boto.FlexibleChecksumError as error:
            problem = str(error).partition("\n")[0][:200]
        except interruptions as error:
            detail = f"the transfer broke off {ATTEMPTS} times ({type(error).__name__})"
            return Rejected(source.key, label, errors.FAILED, detail), error
        return (Rejected(source.key, label, errors.CHANGED, problem) if problem else None), None

    def _copy(self, body: "StreamingBody", source: SourceObject, headers: Mapping[str, str], part: Path) -> str | None:
        """Write the body to `part`. Return how the body differs from the listed object.

        Returns None if there is no difference, or if `stop` was set.
        """
        verified = self._is_verified and integrity.checksum_header(headers)
        md5 = None
        if not verified and integrity.has_md5(self._bucket, source, headers):
            md5 = hashlib.md5(usedforsecurity=False)
        size = 0
        with part.open("wb") as file:
            for chunk in body.iter_chunks(CHUNK):
                if self._stop.is_set():
                    return None
                size += file.write(chunk)
                if md5:
                    md5.update(chunk)
        return integrity.difference(source, headers, size, md5.hexdigest() if md5 else None)

    def _check_service(self, source: SourceObject, rejected: Rejected) -> None:
        """Raise NoUsableInput if S3 sends nothing at all, which shows that this object did not cause the failure."""
        from botocore import exceptions as boto

        if self._stop.is_set():
            return
        what = f"s3://{self._bucket}/{source.key} could not be fetched ({rejected.detail})"
        if self._gate.exhausted:
            raise Throttled(errors.throttled(self._client, what), rejected)
        root = source.key.removesuffix(source.path)
        try:
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=root, MaxKeys=1)
        except (boto.BotoCoreError, boto.ClientError) as error:
            if errors.object_problem(error) is None:
                raise errors.explain(error, self._client, self._bucket) from error
            raise errors.unanswered(self._client, what, error) from error
