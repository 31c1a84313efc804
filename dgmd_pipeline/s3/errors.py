"""What botocore raised -> a sentence for the operator."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.s3.client import Client

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
    """Turn what botocore raised for a request about `bucket` and `key` into a sentence without secrets."""
    from botocore import exceptions as boto

    host = endpoint_host(client)
    if isinstance(error, boto.ClientError):
        return NoUsableInput(_s3_error(error.response, client, bucket, key))
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


def _s3_error(response: Mapping[str, Any], client: Client, bucket: str, key: str) -> str:
    """Return the sentence for an error that S3 itself answered."""
    from botocore import UNSIGNED

    host = endpoint_host(client)
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


def endpoint_host(client: Client) -> str:
    """Return host and port of the endpoint, without a user and password."""
    return urlsplit(client.meta.endpoint_url).netloc.rpartition("@")[2]
