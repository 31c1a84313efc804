"""AWS settings -> one S3 client.

boto3 reads where the bucket is and whose credentials are used (endpoint, region, profile, ...) from its own environment
variables and from its files under ~/.aws.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dgmd_pipeline.errors import NoUsableInput

Client = Any  # a boto3 S3 client: boto3 makes its methods at run time, there is nothing to check them against


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
