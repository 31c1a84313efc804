"""Creates an S3 client from the AWS settings.

boto3 reads the endpoint, region, profile and credentials from its own environment variables and from the files under
~/.aws.
"""

import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.formatting import as_user

if TYPE_CHECKING:
    from botocore.session import Session

Client = Any  # a boto3 S3 client; boto3 generates its methods at run time and ships no type stubs


class Place(NamedTuple):
    """What a worker needs to connect to the same S3 as the run. It contains no credentials."""

    endpoint: str | None  # None: the default endpoint of AWS
    region: str
    is_signed: bool  # whether the client has credentials


def place(client: Client) -> Place:
    """Return the Place of a client.

    The endpoint is None if the client uses the default endpoint of AWS, or if the URL contains a user or password.
    """
    from botocore import UNSIGNED

    url = client.meta.endpoint_url
    endpoint = None if _is_default(client) or "@" in urlsplit(url).netloc else url
    return Place(endpoint, client.meta.region_name, client.meta.config.signature_version is not UNSIGNED)


def _is_default(client: Client) -> bool:
    """Return whether no endpoint is configured."""
    return client.meta.endpoint_url in (
        f"https://s3.{client.meta.region_name}.amazonaws.com",
        "https://s3.amazonaws.com",
    )


def connect(threads: int = 32, default: Place | None = None) -> Client:
    """Return an S3 client for `threads` threads; it is anonymous if no credentials are configured.

    The endpoint and the region come from the environment or the AWS files, else from `default`.

    Raises NoUsableInput for settings that boto3 rejects, and for configured credentials that cannot be used. It also
    raises NoUsableInput if a configured credentials file is missing, unreadable or a folder. botocore itself would
    ignore the file, and send anonymous requests or use other credentials.
    """
    import boto3
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.loaders import create_loader

    logging.getLogger("botocore.credentials").addFilter(_without_traceback)
    session = botocore.session.Session()
    # For botocore, AWS_DATA_PATH lists folders with service descriptions. For this pipeline, it is the prefix in the
    # bucket. So botocore gets a loader that ignores the variable.
    session.register_component("data_loader", create_loader())
    # The dates of a listing stay text, because nothing uses them. Otherwise, botocore would parse them with dateutil,
    # which takes two thirds of the time of a listing.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    config = Config(
        signature_version=None if _is_signed(session) else UNSIGNED,
        max_pool_connections=threads,
        connect_timeout=5,
        read_timeout=30,
    )
    region = session.get_config_variable("region") or (default.region if default else "us-east-1")
    try:
        boto3_session = boto3.Session(botocore_session=session, region_name=region)
        client = boto3_session.client("s3", config=config)
        if default and default.endpoint and _is_default(client):
            client = boto3_session.client("s3", config=config, endpoint_url=default.endpoint)
    except (BotoCoreError, ValueError) as error:
        raise NoUsableInput(
            f"boto3 rejects the AWS settings ({_without_user(error)}). Correct them. AWS_ENDPOINT_URL, if set, must "
            "look like http://minio:9000."
        ) from None
    # After a redirect that names no region, botocore sends HeadBucket to find the region. If a server redirects every
    # request (for example to https), it also redirects HeadBucket. Then botocore would repeat HeadBucket forever. So
    # the handler below answers HeadBucket without a request, and names no region. This does not change requests to AWS,
    # because redirects of AWS always name the region.
    no_region: dict[str, dict[str, dict[str, str]]] = {"ResponseMetadata": {"HTTPHeaders": {}}}
    client.meta.events.register("before-call.s3.HeadBucket", lambda **_: (SimpleNamespace(status_code=200), no_region))
    return client


def _without_traceback(record: logging.LogRecord) -> bool:
    """Shorten a log message of botocore about credentials that it cannot renew: show the error, but no traceback."""
    if record.exc_info and (error := record.exc_info[1]):
        record.msg, record.args = f"{record.getMessage()} ({type(error).__name__}: {error})", None
        record.exc_info = None
    return True


def endpoint_host(client: Client) -> str:
    """Return host and port of the client's endpoint, without user and password."""
    return urlsplit(client.meta.endpoint_url).netloc.rpartition("@")[2]


def _is_signed(session: "Session") -> bool:
    """Return whether credentials are configured. Raises NoUsableInput if they cannot be used."""
    from botocore.exceptions import BotoCoreError, ClientError, ConfigParseError, ProfileNotFound

    try:
        return _has_credentials(session)
    except ProfileNotFound:
        raise NoUsableInput(
            f"The AWS profile {session.profile!r} (AWS_PROFILE or AWS_DEFAULT_PROFILE) is not in the AWS files. They "
            f"define: {', '.join(session.available_profiles) or 'none'}. Correct or unset it."
        ) from None
    except ConfigParseError as error:
        # configparser's message quotes the line, which may be a secret key.
        raise NoUsableInput(
            f"The AWS file {error.kwargs['path']} cannot be parsed. Expected: UTF-8 lines `name = value` under a "
            "`[profile]` header. Correct the file."
        ) from None
    except (BotoCoreError, ClientError, OSError, ValueError, KeyError) as error:
        raise NoUsableInput(
            f"AWS credentials are configured but cannot be used ({type(error).__name__}: {_without_user(error)}). "
            "Correct them, or remove them to read a public bucket anonymously."
        ) from error


def _without_user(error: Exception) -> str:
    """Return the error's text without user and password in URLs."""
    return re.sub("//.*@", "//", str(error))


def _has_credentials(session: "Session") -> bool:
    """Return whether credentials are configured. Raises NoUsableInput or botocore's errors if they cannot be used."""
    from botocore.credentials import EnvProvider

    environment = EnvProvider()
    if environment.load() is None:  # keys in the environment take precedence over all files
        if environment.environ.get(EnvProvider.SECRET_KEY):
            raise NoUsableInput(
                "AWS_SECRET_ACCESS_KEY is set but AWS_ACCESS_KEY_ID is not. Set both. To read a public bucket "
                "anonymously, set neither."
            )
        for name in ("credentials_file", "config_file"):
            _check_file(session, name)

    credentials = session.get_credentials()
    if credentials is None or credentials.method in ("iam-role", "container-role"):
        _check_no_keys_expected(session, found_role=credentials is not None)
        return credentials is not None
    keys = credentials.get_frozen_credentials()  # sends a request if the profile uses STS or SSO
    for value in (keys.access_key, keys.secret_key, keys.token or "x"):
        # Without this check, botocore's error about a key with a copied line end would describe HTTP headers, and would
        # show the secret key.
        if not value or not value.isascii() or not value.isprintable() or " " in value:
            raise NoUsableInput(
                f"The AWS credentials found by boto3 ({credentials.method}) are empty, or contain blanks or other "
                "invalid characters. Copy the access key, secret key and token again."
            )
    return True


def _check_no_keys_expected(session: "Session", found_role: bool) -> None:
    """Raise NoUsableInput if the AWS files or settings show that the operator expects boto3 to find keys.

    This function is called if boto3 has found a role or nothing. Each of these facts then shows a mistake:

    - A setting names the credentials file.
    - boto3 has found no role, and the credentials file has a section.
    - boto3 has found no role, and the profile has a secret key.
    """
    from botocore.configloader import raw_config_parse

    path, explicit = _aws_file(session, "credentials_file")
    sections = raw_config_parse(str(path)) if path.is_file() else {}
    has_keys = sections or "aws_secret_access_key" in session.get_scoped_config()
    if explicit or (has_keys and not found_role):
        found = ", ".join(f"[{name}]" for name in sections) or "none"
        raise NoUsableInput(
            "The AWS files contain no aws_access_key_id and aws_secret_access_key for the profile "
            f"{session.profile or 'default'!r}. Sections of {path}: {found}. Add the keys, set AWS_PROFILE to another "
            "profile, or set AWS_SHARED_CREDENTIALS_FILE to an empty value to use no credentials file."
        )


def _aws_file(session: "Session", name: str) -> tuple[Path, bool]:
    """Return the path of an AWS file, and whether a setting names it. `name`: "credentials_file" or "config_file"."""
    value, default = session.get_config_variable(name), session.session_var_map[name][2]
    # Path.expanduser raises if the user has no home folder, for example a numeric user in a container.
    path = Path(os.path.expanduser(os.path.expandvars(value)))  # noqa: PTH111
    return path, value not in (default, "")


def _check_file(session: "Session", name: str) -> None:
    """Raise NoUsableInput for a configured file that botocore would ignore silently."""
    path, explicit = _aws_file(session, name)
    variable = session.session_var_map[name][1]
    subject = f"The AWS file {path} ({variable})" if explicit else f"The AWS file {path}"
    try:
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        if explicit:
            raise NoUsableInput(
                f"{subject} does not exist: correct the path, mount the file, or unset {variable}."
            ) from None
    except IsADirectoryError:
        if path != Path():  # an empty variable names no file
            raise NoUsableInput(
                f"{subject} is a folder, not a file. Docker creates an empty folder if the source of a bind mount does "
                "not exist: remove the folder and mount the file itself."
            ) from None
    except OSError as error:
        user = os.geteuid()
        closed = next(
            (folder for folder in reversed(path.parents) if not os.access(folder, os.X_OK, effective_ids=True)), path
        )
        status = closed.stat()
        raise NoUsableInput(
            f"{subject} cannot be read by this process, which runs as user {user} ({error.strerror}): {closed} belongs "
            f"to user {status.st_uid} with mode {status.st_mode & 0o777:o}. Run `chown {user} {closed}` and "
            f"`chmod u+rX {closed}` on the host, or run as user {status.st_uid} ({as_user(status.st_uid)})."
        ) from None
