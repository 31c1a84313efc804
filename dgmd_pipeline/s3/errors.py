"""Explains botocore's errors to the operator.

Also decides which errors end the download, and after which errors only one object is left out.
"""

from typing import TYPE_CHECKING

from dgmd_pipeline import formatting
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected
from dgmd_pipeline.s3 import throttling
from dgmd_pipeline.s3.client import Client, endpoint_host
from dgmd_pipeline.s3.throttling import STATUSES

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# Reasons for a rejection that count towards MAX_REJECTED_PCNT. REFUSED: S3 refuses to send the object. FAILED: S3 sends
# nothing, or only a part of the object. CHANGED: S3 sends content that differs from the listing.
REFUSED, FAILED, CHANGED = "refused", "failed", "changed"
MAX_TEXT = 200  # characters of S3's error text that are stored
ACCOUNT_DISABLED = {"AllAccessDisabled", "AccountProblem"}
ACCESS_DENIED = {"AccessDenied", "Forbidden"} | ACCOUNT_DISABLED
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
WRONG_BUCKET = {"NoSuchBucket", "InvalidBucketName"}
WRONG_CLOCK = {"RequestTimeTooSkewed"}
# Codes of errors that every request gets, regardless of its key.
GENERAL = ACCOUNT_DISABLED | WRONG_CREDENTIALS | OTHER_REGION | WRONG_BUCKET | WRONG_CLOCK


def object_problem(error: Exception) -> tuple[str, str] | None:
    """Return reason and detail for rejecting the requested object; None if the cause is not the object."""
    from botocore import exceptions as boto

    if isinstance(error, boto.HTTPClientError | boto.ConnectionError):
        return FAILED, f"no answer ({type(error).__name__})"
    if not isinstance(error, boto.ClientError):
        return None
    code, status = _code(error), _status(error)
    if code in GENERAL or 300 <= status < 400 or not _is_about_objects(error):
        return None
    if code in ("NoSuchKey", "404"):
        return "gone", "deleted from the bucket after it was listed"
    if code == "InvalidObjectState":
        return "archived", "its storage class requires that it is restored first"
    text = formatting.printable(str(error.response.get("Error", {}).get("Message") or "no text")[:MAX_TEXT])
    return FAILED if status >= 500 or status in STATUSES else REFUSED, f"S3 answered {_answer(error)}: {text}"


def is_worth_repeating(error: Exception) -> bool:
    """Return whether the answer to a repeated request may differ.

    A request without an answer is not worth repeating, because botocore has repeated it for more than a minute. A
    throttled request is not worth repeating either, because `throttling` has repeated it for even longer.
    """
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return _status(error) >= 500 and _status(error) not in STATUSES
    return not isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError)


def remedy(client: Client, rejected: Rejected) -> str:
    """Return what to do if many objects were rejected. `rejected` is one of them; the others have the same reason."""
    if rejected.reason == REFUSED and any(code in rejected.detail for code in ACCESS_DENIED):
        return access_remedy(client)
    return {
        REFUSED: "Make these objects readable, or remove them.",
        FAILED: "Check the server, and run again later.",
        CHANGED: "Run again when nothing writes to the bucket. If the server uses ETags of 32 hexadecimal digits, each "
        "ETag must be the MD5 sum of the content.",
    }[rejected.reason]


def throttled(client: Client, what: str) -> str:
    """Return the sentence for a server that answers nothing but "slow down"; `what` says which request failed."""
    return (
        f"{endpoint_host(client)} has answered nothing but 'slow down' for {throttling.PATIENCE:g} s: {what}. The "
        "server limits the rate of requests, or is overloaded. Run again later: downloaded objects are kept."
    )


def unanswered(client: Client, what: str, error: Exception) -> NoUsableInput:
    """Return the error about a server that has stopped sending objects, and does not answer a listing either."""
    _, detail = object_problem(error) or ("", "")
    return NoUsableInput(
        f"{endpoint_host(client)} has stopped sending objects: {what}. A listing fails as well: {detail}. Check the "
        "network and the server, and run again: downloaded objects are kept."
    )


def _is_about_objects(error: "ClientError") -> bool:
    """Return whether the error is an answer of S3. Otherwise, it is an answer of a service for credentials."""
    return error.operation_name in ("GetObject", "ListObjectsV2")


def explain(error: Exception, client: Client, bucket: str, key: str = "") -> NoUsableInput:
    """Return an error without secrets, which explains a botocore error about `bucket` and `key` to the operator."""
    from botocore import exceptions as boto

    host = endpoint_host(client)
    if isinstance(error, boto.ClientError):
        return NoUsableInput(_s3_error(error, client, bucket, key))
    kind = type(error).__name__
    # The first match applies. So SSLError stands before ConnectionError, which is its base class.
    sentences = (
        (
            boto.ParamValidationError,
            f"{bucket!r} is not a valid bucket name: set AWS_DATA_BUCKET to the bare name, without s3:// and slashes.",
        ),
        (
            boto.SSLError,
            f"The TLS connection to {host} failed: the server's certificate is not trusted, or the server does not "
            "support TLS. Set AWS_CA_BUNDLE to the certificate file of its authority, or correct AWS_ENDPOINT_URL.",
        ),
        (
            boto.ProxyConnectionError,
            f"The proxy for {host} cannot be reached: correct HTTP_PROXY, HTTPS_PROXY or NO_PROXY.",
        ),
        (
            (boto.ConnectionError, boto.HTTPClientError),
            f"The S3 endpoint {host} cannot be reached ({kind}): correct AWS_ENDPOINT_URL, or check the network and "
            "try again.",
        ),
        (
            boto.BotoCoreError,
            f"boto3 could not request the bucket {bucket!r} from {host} ({kind}): correct the AWS settings.",
        ),
        ((OSError, ValueError, KeyError), f"The AWS credentials could not be renewed ({kind}: {error}): correct them."),
        # A ResponseParserError. Its message is not shown, because it quotes the whole response.
        (Exception, f"The server at {host} is not an S3 endpoint: correct AWS_ENDPOINT_URL."),
    )
    return NoUsableInput(next(sentence for kinds, sentence in sentences if isinstance(error, kinds)))


def _s3_error(client_error: "ClientError", client: Client, bucket: str, key: str) -> str:
    """Return the sentence for an error that S3 itself returned."""
    response, host, code = client_error.response, endpoint_host(client), _code(client_error)
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    region = meta.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.get("Region") or "the bucket's region"
    sentences = (
        (
            {"NoSuchBucket"},
            f"The bucket {bucket!r} does not exist at {host}: correct AWS_DATA_BUCKET or AWS_ENDPOINT_URL.",
        ),
        ({"InvalidBucketName"}, f"{bucket!r} is not a valid bucket name: correct AWS_DATA_BUCKET."),
        (ACCESS_DENIED, f"{host} denied access to s3://{bucket}/{key} ({code}). {access_remedy(client)}"),
        (
            WRONG_CREDENTIALS,
            f"{host} does not accept the AWS credentials ({code}): they are wrong or have expired. Set valid ones.",
        ),
        (
            WRONG_CLOCK,
            f"The clocks of this machine and of {host} differ too much ({code}): set this machine's clock.",
        ),
        (
            OTHER_REGION,
            f"The bucket {bucket!r} is not in the region {client.meta.region_name} ({code}): set AWS_DEFAULT_REGION to "
            f"{region}.",
        ),
    )
    if not _is_about_objects(client_error):
        return f"The AWS credentials could not be renewed ({client_error.operation_name}: {code}): correct them."
    if _status(client_error) in STATUSES:
        return throttled(client, f"s3://{bucket}/{key} ({_answer(client_error)})")
    if code.isdigit():  # S3's own codes are words
        return (
            f"{host} answered {code} without an S3 error code: it is a proxy, or not an S3 endpoint. Correct "
            "AWS_ENDPOINT_URL, or try again later."
        )
    other = f"{host} refused a request for s3://{bucket}/{key} ({code}): try again later, or ask the server's operator."
    return next((sentence for codes, sentence in sentences if code in codes), other)


def _code(error: "ClientError") -> str:
    """Return S3's own code, or the HTTP status if there is none."""
    return str(error.response.get("Error", {}).get("Code") or _status(error))[:50]


def _status(error: "ClientError") -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _answer(error: "ClientError") -> str:
    """Return the HTTP status and S3's own code, for example "503 SlowDown"."""
    return " ".join(dict.fromkeys((str(_status(error)), _code(error))))


def access_remedy(client: Client) -> str:
    """Return why access can be denied to this client, and what to do."""
    from botocore import UNSIGNED

    if client.meta.config.signature_version is UNSIGNED:
        return (
            "The request was anonymous because no AWS credentials are configured. Set AWS_PROFILE, or "
            "AWS_SHARED_CREDENTIALS_FILE, or both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Or make the bucket "
            "public."
        )
    return (
        "The request was signed with valid credentials, but they lack s3:ListBucket or s3:GetObject, or belong to "
        "another account: grant these permissions or use other credentials."
    )
