"""An object in the bucket -> a file under raw/; the only door to S3 (boto3, imported where it is used).

Where the bucket is and who asks for it (endpoint, region, credentials, profile, `AWS_MAX_ATTEMPTS`, ...) is boto3's own
business: its environment variables and its files under ~/.aws.
"""

import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import monotonic
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.transfer import Flight, Transfer

log = logging.getLogger(__name__)
Client = Any  # a boto3 S3 client: boto3 makes its methods at run time, there is nothing to check them against

PARTS = (
    ".part"  # the folder of unfinished files: one file a thread, so no name is too long and none can clash with a key
)
# what the pipeline itself writes there, case folded
RESERVED = {"_success", "listing.csv", "rejected.csv", PARTS, ".resume"}
MAX_NAME_BYTES = 255  # the longest name of a file on every usual disk
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")  # control characters, and the separator of other systems

CHUNK = 1 << 16  # bytes between two looks at whether to stop; larger ones save no measurable CPU time
READ_ATTEMPTS = 4
FIRST = 1.0  # seconds that the first object may take before others begin, until it is known how they are fetched
LOOK = 0.5  # seconds between two looks at whether something takes too long
PATIENCE = 5.0  # seconds for the threads to end; one that waits for a silent server longer is left behind, as a daemon

ACCESS_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden"}
WRONG_CREDENTIALS = {
    "AuthFailure",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "UnrecognizedClientException",
}
OTHER_REGION = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
}


def connect(threads: int = 32) -> Client:
    """Return one S3 client for `threads` threads, anonymous where no credentials at all are configured.

    Raises NoUsableInput for credentials that are configured but cannot be used: botocore itself passes over a file that
    is missing, a folder or unreadable, and the request would go out anonymously or as somebody else.
    """
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConfigParseError, ProfileNotFound
    from botocore.loaders import create_loader

    session = botocore.session.Session()
    # botocore takes AWS_DATA_PATH, our folder in the bucket, for local folders with service descriptions to load.
    session.register_component("data_loader", create_loader())
    # Nothing reads the dates of a listing, and dateutil's parsing of them was two thirds of its time.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    try:
        signed = _has_credentials(session)
    except ProfileNotFound:
        raise NoUsableInput(
            f"The AWS profile {session.profile!r} (AWS_PROFILE or AWS_DEFAULT_PROFILE) is in none of the AWS files, "
            f"which know: {', '.join(session.available_profiles) or 'none'}. Correct or unset it."
        ) from None
    except ConfigParseError as error:
        # What configparser says quotes the line, and the line may be a secret key.
        raise NoUsableInput(
            f"The AWS file {error.kwargs['path']} cannot be parsed: expected are UTF-8 lines `name = value` under a "
            "`[profile]`. Correct it."
        ) from None
    except (BotoCoreError, ClientError, OSError, ValueError, KeyError) as error:
        raise NoUsableInput(
            f"AWS credentials are configured but cannot be used ({type(error).__name__}: {_without_user(error)}). "
            "Correct them, or remove them to read a public bucket anonymously."
        ) from error

    config = Config(
        signature_version=None if signed else UNSIGNED,
        max_pool_connections=threads,
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard"},
    )
    region = session.get_config_variable("region") or "us-east-1"
    try:
        client = boto3.Session(botocore_session=session, region_name=region).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise NoUsableInput(
            f"boto3 refuses the AWS settings ({_without_user(error)}). Correct them; AWS_ENDPOINT_URL, if set, looks "
            "like http://minio:9000."
        ) from None
    # After a redirect that names no region botocore asks HeadBucket for it, and so again after that one's redirect,
    # without end, where a server redirects everything (to https, say). AWS names the region.
    no_region: Any = SimpleNamespace(status_code=200), {"ResponseMetadata": {"HTTPHeaders": {}}}
    client.meta.events.register("before-call.s3.HeadBucket", lambda **_: no_region)
    return client


def _without_user(error: Exception) -> str:
    """Return the error's text; a URL in it loses its user and password."""
    return re.sub("//.*@", "//", str(error))


def _has_credentials(session: Any) -> bool:
    """Say whether credentials are configured; raise NoUsableInput, or botocore's errors, where they are not usable."""
    from botocore.configloader import raw_config_parse
    from botocore.credentials import EnvProvider

    environment = EnvProvider()
    if environment.load() is None:  # keys in the environment come before all files
        if environment.environ.get(EnvProvider.SECRET_KEY):
            raise NoUsableInput(
                "AWS_SECRET_ACCESS_KEY is set but AWS_ACCESS_KEY_ID is not: set both, or none to read a public bucket "
                "anonymously."
            )
        for name in ("credentials_file", "config_file"):
            _check_file(session, name)

    credentials = session.get_credentials()
    if credentials is not None and credentials.method not in ("iam-role", "container-role"):
        key = credentials.get_frozen_credentials()  # asks STS or SSO where the profile says so
        for value in (key.access_key, key.secret_key, key.token or "x"):
            # A line end that was copied too would come back in an error about HTTP headers, with the key in it.
            if not value or not value.isascii() or not value.isprintable() or " " in value:
                raise NoUsableInput(
                    f"The AWS credentials found by boto3 ({credentials.method}) are empty or hold blanks or characters "
                    "that no key has: copy access key, secret key and token again."
                )
        return True

    path, explicit = _aws_file(session, "credentials_file")
    sections = raw_config_parse(str(path)) if path.is_file() else {}
    stored = sections or "aws_secret_access_key" in session.get_scoped_config()
    if explicit or (credentials is None and stored):
        profile = session.profile or "default"
        found = ", ".join(f"[{name}]" for name in sections) or "none"
        raise NoUsableInput(
            f"The AWS files hold no aws_access_key_id and aws_secret_access_key for the profile {profile!r}; {path} "
            f"has the sections: {found}. Add them, name another profile in AWS_PROFILE, or set "
            "AWS_SHARED_CREDENTIALS_FILE to nothing to do without."
        )
    return credentials is not None


def _aws_file(session: Any, name: str) -> tuple[Path, bool]:
    """Return the path of botocore's `name` ("credentials_file", "config_file") and whether somebody set it."""
    value, default = session.get_config_variable(name), session.session_var_map[name][2]
    # Not Path.expanduser: it raises where there is no home, as for a container's bare user number.
    path = Path(os.path.expanduser(os.path.expandvars(value)))  # noqa: PTH111
    return path, value not in (default, "")


def _check_file(session: Any, name: str) -> None:
    """Raise NoUsableInput where botocore would pass over a file as if nobody had meant it."""
    path, explicit = _aws_file(session, name)
    variable = session.session_var_map[name][1]
    called = f"The AWS file {path} ({variable})" if explicit else f"The AWS file {path}"
    try:
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        if explicit:
            raise NoUsableInput(f"{called} does not exist: correct the path, mount it, or unset {variable}.") from None
    except IsADirectoryError:
        if path != Path():  # an empty variable: nothing is meant
            raise NoUsableInput(
                f"{called} is a folder, not a file. Docker makes an empty one where the source of a bind mount does "
                "not exist: remove it and mount the file itself."
            ) from None
    except OSError as error:
        user = os.geteuid()
        closed = next(
            (folder for folder in reversed(path.parents) if not os.access(folder, os.X_OK, effective_ids=True)), path
        )
        status = closed.stat()
        raise NoUsableInput(
            f"{called} cannot be read by this process, user {user} ({error.strerror}): {closed} belongs to user "
            f"{status.st_uid} with mode {status.st_mode & 0o777:o}. Run `chown {user} {closed}` and `chmod u+rX "
            f"{closed}` where it comes from, or run as its owner (docker run --user {status.st_uid})."
        ) from None


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
        objects, rejected = _arrange(listing, under)
        if not objects and not rejected:
            raise NoUsableInput(f"There are no objects in s3://{bucket}/{under}{_elsewhere(client, bucket, prefix)}")
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        raise _explain(error, client, bucket) from error
    return objects, rejected


def _arrange(listing: Iterable[dict[str, Any]], under: str) -> tuple[list[SourceObject], list[Rejected]]:
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
        fault = _fault(path) if slash else ("no label", "it lies directly under the prefix, in no label's folder")
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
            named = label if slash and _fault(label) is None else ""
            rejected.append(Rejected(_printable(key), named, *fault))
        else:
            objects.append(SourceObject(key, size, item.get("ETag", "").strip('"'), path))
    return objects, rejected


def _fault(path: str) -> tuple[str, str] | None:
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


def _printable(key: str) -> str:
    """Return `key` fit for a CSV file and a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)


def _elsewhere(client: Client, bucket: str, prefix: str) -> str:
    """Return the end of the sentence about an empty prefix: the folders of the nearest level that has any."""
    while prefix:
        prefix = prefix.rpartition("/")[0]
        under = f"{prefix}/" if prefix else ""
        page = client.list_objects_v2(Bucket=bucket, Prefix=under, Delimiter="/")
        folders = [folder["Prefix"][len(under) :] for folder in page.get("CommonPrefixes", ())]
        if folders:
            more = ", ..." if len(folders) > 5 else ""
            shown = ", ".join(_printable(folder) for folder in folders[:5])
            return f": s3://{bucket}/{under} has {shown}{more}. Correct the path or upload the pictures."
        if page.get("Contents"):
            return f": s3://{bucket}/{under} has objects but no folders. Correct the path or upload the pictures."
    return ": the bucket is empty. Correct its name or upload the pictures as <path>/<label>/<file>."


def _explain(error: Exception, client: Client, bucket: str, key: str = "") -> NoUsableInput:
    """Turn what botocore raised for a request about `bucket` and `key` into a sentence without secrets."""
    from botocore import exceptions as boto

    host = _host(client)
    if isinstance(error, boto.ClientError):
        return NoUsableInput(_refusal(error.response, client, bucket, key))
    kind = type(error).__name__
    sentences = (  # the first that fits: an SSLError is a ConnectionError too
        (
            boto.ParamValidationError,
            f"{bucket!r} is no name of a bucket: AWS_DATA_BUCKET is the bare name, without s3:// and without slashes.",
        ),
        (
            boto.SSLError,
            f"The TLS certificate of {host} is not accepted, or it does not speak TLS: name the file of its authority "
            "in AWS_CA_BUNDLE, or correct AWS_ENDPOINT_URL.",
        ),
        (
            boto.ProxyConnectionError,
            f"The proxy on the way to {host} cannot be reached: correct HTTP_PROXY, HTTPS_PROXY or NO_PROXY.",
        ),
        (
            (boto.ConnectionError, boto.HTTPClientError),
            f"The S3 endpoint {host} cannot be reached ({kind}): correct AWS_ENDPOINT_URL, or see to the network and "
            "try again.",
        ),
        (
            boto.BotoCoreError,
            f"boto3 could not ask {host} for the bucket {bucket!r} ({kind}): correct the AWS settings.",
        ),
        # ResponseParserError, which quotes the whole answer
        (Exception, f"What answers at {host} is no S3: correct AWS_ENDPOINT_URL."),
    )
    return NoUsableInput(next(sentence for kinds, sentence in sentences if isinstance(error, kinds)))


def _refusal(response: Mapping[str, Any], client: Client, bucket: str, key: str) -> str:
    """Return the sentence for an error that S3 itself answered."""
    from botocore import UNSIGNED

    host = _host(client)
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    code = str(error.get("Code") or meta.get("HTTPStatusCode"))
    region = meta.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.get("Region") or "that of the bucket"
    if client.meta.config.signature_version is UNSIGNED:
        denied = (
            "an anonymous request, because no AWS credentials are configured: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE or AWS_SHARED_CREDENTIALS_FILE, or make the bucket public."
        )
    else:
        denied = (
            "a signed request: its credentials are valid but lack s3:ListBucket or s3:GetObject, or belong to somebody "
            "else. Grant these rights or use other credentials."
        )
    sentences = (
        (
            {"NoSuchBucket"},
            f"There is no bucket {bucket!r} at {host}: correct AWS_DATA_BUCKET or AWS_ENDPOINT_URL.",
        ),
        ({"InvalidBucketName"}, f"{bucket!r} is no name of a bucket: correct AWS_DATA_BUCKET."),
        (ACCESS_DENIED, f"Access to s3://{bucket}/{key} at {host} was denied ({code}) to {denied}"),
        (
            WRONG_CREDENTIALS,
            f"{host} does not accept the AWS credentials ({code}): they are wrong or have expired. Set valid ones.",
        ),
        (
            {"RequestTimeTooSkewed"},
            f"The clocks of this machine and of {host} differ too much ({code}): set this machine's.",
        ),
        (
            OTHER_REGION,
            f"The bucket {bucket!r} is in another region than {client.meta.region_name} ({code}): set "
            f"AWS_DEFAULT_REGION to {region}.",
        ),
    )
    if code.isdigit():  # S3 itself answers words
        return (
            f"{host} answered {code} without a reason, as a proxy does or a server that is no S3: correct "
            "AWS_ENDPOINT_URL, or try again later."
        )
    other = f"{host} refused a request about s3://{bucket}/{key} ({code}): try again later or ask who runs it."
    return next((sentence for codes, sentence in sentences if code in codes), other)


def _host(client: Client) -> str:
    """Return host and port of the endpoint, without a user and password."""
    return urlsplit(client.meta.endpoint_url).netloc.rpartition("@")[2]


def download(
    client: Client, bucket: str, objects: Iterable[SourceObject], folder: Path, threads: int = 32
) -> Generator[SourceObject | Rejected]:
    """Write every object to `folder / path`, whole or not at all, and yield each when it is done, in any order.

    A Rejected stands for an object that is "gone" or "changed" (its size) since the listing, or "archived" (in a
    storage class that has to be restored first). `threads` objects are fetched at a time. Unfinished files lie in
    `folder/.part`, removed at the start and at the end: whatever else is in `folder`, after a kill too, is complete.
    Whoever stops early closes the generator: what is under way is called off.

    Raises NoUsableInput where S3 denies access or cannot be reached, and the disk's OSError as it is.
    """
    parts = folder / PARTS
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    free = [parts / str(number) for number in range(threads)]
    waiting = iter(objects)
    begun = monotonic()
    ways = _Ways(client, bucket)
    try:
        while True:
            at_once = threads if ways.transfer.decided or monotonic() > begun + FIRST else 1
            while threads - len(free) < at_once and (source := next(waiting, None)):
                ways.start(source, free.pop())
            if len(free) == threads:
                break
            if landed := ways.landed():
                source, part, result = landed
                free.append(part)
                yield result or _put(source, part, folder)
    finally:
        ways.close()
        shutil.rmtree(parts, ignore_errors=True)


class _Ways:
    """The two ways for an object to become a file: awscrt's, and botocore's in threads that begin when needed."""

    def __init__(self, client: Client, bucket: str) -> None:
        self.client, self.bucket = client, bucket
        self.transfer = Transfer(client)
        self._flights: dict[Path, Flight] = {}
        self._todo: SimpleQueue[tuple[SourceObject, Path] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[SourceObject, Path, Rejected | Exception | None]] = SimpleQueue()
        self._workers: list[Thread] = []
        self._busy = 0  # of these
        self._stop = Event()

    def start(self, source: SourceObject, part: Path) -> None:
        """Begin to write an object to the file `part`."""
        if self.transfer.takes(source.size):
            landed = partial(self._done.put, (source, part, None))
            if flight := self.transfer.start(source.key, source.size, part, landed):
                self._flights[part] = flight
                return
        self._leave_to_botocore(source, part)

    def _leave_to_botocore(self, source: SourceObject, part: Path) -> None:
        self._todo.put((source, part))
        self._busy += 1
        if self._busy > len(self._workers):
            # A daemon, unlike a ThreadPoolExecutor's: at exit none is waited for that reads from a silent server.
            self._workers.append(Thread(target=self._work, daemon=True))
            self._workers[-1].start()

    def _work(self) -> None:
        while (item := self._todo.get()) is not None and not self._stop.is_set():
            source, part = item
            result: Rejected | Exception | None
            try:
                result = _fetch(self.client, self.bucket, source, part, self._stop)
                if result is None:
                    self.transfer.learn(source.key)
            except Exception as error:  # noqa: BLE001 - raised again where the results are read
                result = error
            self._done.put((source, part, result))

    def landed(self) -> tuple[SourceObject, Path, Rejected | None] | None:
        """Wait a moment and return the next that is done, with None where the object is in the file, whole."""
        try:
            source, part, result = self._done.get(timeout=LOOK)
        except Empty:
            for late in self._flights.values():
                if monotonic() > late.deadline:
                    late.cancel()
            return None
        flight = self._flights.pop(part, None)
        if flight is None:
            self._busy -= 1
        elif not self.transfer.worked(flight):
            self._leave_to_botocore(source, part)
            return None
        if isinstance(result, Exception):
            raise result
        return source, part, result

    def close(self) -> None:
        """Call off what is under way, and wait a while until it has let go of its files."""
        self._stop.set()
        for flight in self._flights.values():
            flight.cancel()
        for _ in self._workers:
            self._todo.put(None)
        deadline = monotonic() + PATIENCE
        while self._flights and (left := deadline - monotonic()) > 0:
            with suppress(Empty):
                self._flights.pop(self._done.get(timeout=left)[1], None)
        for worker in self._workers:
            worker.join(max(0.0, deadline - monotonic()))


def _fetch(client: Client, bucket: str, source: SourceObject, part: Path, stop: Event) -> Rejected | None:
    """Write one object to the file `part`, whole unless `stop` was set meanwhile."""
    import urllib3
    from botocore import exceptions as boto

    # botocore repeats a request that fails, not a body that breaks off.
    broken = (
        boto.HTTPClientError,
        boto.ResponseStreamingError,
        boto.IncompleteReadError,
        boto.FlexibleChecksumError,
        urllib3.exceptions.HTTPError,
    )
    label = source.path.partition("/")[0]
    for attempt in range(READ_ATTEMPTS):
        if stop.wait(attempt and 0.1 * 4**attempt):
            return None
        try:
            response = client.get_object(Bucket=bucket, Key=source.key)
        except (boto.BotoCoreError, boto.ClientError) as error:
            code = error.response.get("Error", {}).get("Code") if isinstance(error, boto.ClientError) else None
            if code in ("NoSuchKey", "404"):
                return Rejected(source.key, label, "gone", "deleted from the bucket since it was listed")
            if code == "InvalidObjectState":
                return Rejected(
                    source.key, label, "archived", "its storage class has to be restored before it can be read"
                )
            raise _explain(error, client, bucket, source.key) from error
        try:
            with closing(response["Body"]) as body:
                size = _copy(body, part, stop)
        except broken:
            continue
        if size != source.size and not stop.is_set():
            return Rejected(source.key, label, "changed", f"{source.size} bytes when it was listed, now {size}")
        return None
    raise NoUsableInput(
        f"The transfer of s3://{bucket}/{source.key} from {_host(client)} broke off {READ_ATTEMPTS} times: see to the "
        "network and run again."
    )


def _put(source: SourceObject, part: Path, folder: Path) -> SourceObject:
    target = folder / source.path
    try:
        part.replace(target)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    return source


def _copy(body: Any, part: Path, stop: Event) -> int:
    """Write what comes to `part`, until `stop` is set, and return how many bytes."""
    size = 0
    with part.open("wb") as file:
        for chunk in body.iter_chunks(CHUNK):
            if stop.is_set():
                break
            size += file.write(chunk)
    return size
