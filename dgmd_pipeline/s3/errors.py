"""botocore's errors -> sentences for the operator."""

from typing import TYPE_CHECKING

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.s3.client import Client, endpoint_host

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

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


def explain(error: Exception, client: Client, bucket: str, key: str = "") -> NoUsableInput:
    """Return an error for the operator, without secrets, for a botocore error about `bucket` and `key`."""
    from botocore import exceptions as boto

    host = endpoint_host(client)
    if isinstance(error, boto.ClientError):
        return NoUsableInput(_s3_error(error, client, bucket, key))
    kind = type(error).__name__
    sentences = (  # the first match applies: an SSLError is also a ConnectionError
        (
            boto.ParamValidationError,
            f"{bucket!r} is not a valid bucket name: set AWS_DATA_BUCKET to the bare name, without s3:// and slashes.",
        ),
        (
            boto.SSLError,
            f"The TLS connection to {host} failed: its certificate is not trusted, or it does not support TLS. Set "
            "AWS_CA_BUNDLE to the certificate file of its authority, or correct AWS_ENDPOINT_URL.",
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
        # ResponseParserError: its message quotes the whole response.
        (Exception, f"The server at {host} is not an S3 endpoint: correct AWS_ENDPOINT_URL."),
    )
    return NoUsableInput(next(sentence for kinds, sentence in sentences if isinstance(error, kinds)))


def _s3_error(client_error: "ClientError", client: Client, bucket: str, key: str) -> str:
    """Return the sentence for an error that S3 itself returned."""
    response, host = client_error.response, endpoint_host(client)
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    code = str(error.get("Code") or meta.get("HTTPStatusCode"))
    region = meta.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.get("Region") or "the bucket's region"
    sentences = (
        (
            {"NoSuchBucket"},
            f"The bucket {bucket!r} does not exist at {host}: correct AWS_DATA_BUCKET or AWS_ENDPOINT_URL.",
        ),
        ({"InvalidBucketName"}, f"{bucket!r} is not a valid bucket name: correct AWS_DATA_BUCKET."),
        (ACCESS_DENIED, f"{host} denied access to s3://{bucket}/{key} ({code}). {_access_remedy(client)}"),
        (
            WRONG_CREDENTIALS,
            f"{host} does not accept the AWS credentials ({code}): they are wrong or have expired. Set valid ones.",
        ),
        (
            {"RequestTimeTooSkewed"},
            f"The clocks of this machine and of {host} differ too much ({code}): set this machine's clock.",
        ),
        (
            OTHER_REGION,
            f"The bucket {bucket!r} is not in the region {client.meta.region_name} ({code}): set AWS_DEFAULT_REGION to "
            f"{region}.",
        ),
    )
    if code.isdigit():  # S3's own codes are words
        return (
            f"{host} answered {code} without an S3 error code: it is a proxy, or not an S3 endpoint. Correct "
            "AWS_ENDPOINT_URL, or try again later."
        )
    other = f"{host} refused a request for s3://{bucket}/{key} ({code}): try again later, or ask the server's operator."
    return next((sentence for codes, sentence in sentences if code in codes), other)


def _access_remedy(client: Client) -> str:
    """Return why access can be denied to this client, and what to do."""
    from botocore import UNSIGNED

    if client.meta.config.signature_version is UNSIGNED:
        return (
            "The request was anonymous because no AWS credentials are configured: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE or AWS_SHARED_CREDENTIALS_FILE, or make the bucket public."
        )
    return (
        "The request was signed with valid credentials, but they lack s3:ListBucket or s3:GetObject, or belong to "
        "another account: grant these permissions or use other credentials."
    )
