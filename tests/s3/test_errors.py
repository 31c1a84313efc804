from urllib.parse import urlsplit

import pytest
from support.http_server import send
from support.s3 import send_error, send_listing

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.listing import list_objects

pytestmark = pytest.mark.usefixtures("aws_home")


def list_images():
    return list_objects(connect(), "images", "train")


@pytest.mark.parametrize("name", ["s3://images", "images/train", "my images", ""])
def test_an_invalid_bucket_name_is_an_error(s3_client, name):
    with pytest.raises(NoUsableInput, match="is not a valid bucket name"):
        list_objects(s3_client, name, "train")


def test_a_bucket_that_does_not_exist_is_an_error(s3_client):
    with pytest.raises(NoUsableInput, match=r"The bucket 'no-such-bucket' does not exist at 127\.0\.0\.1"):
        list_objects(s3_client, "no-such-bucket", "train")


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "AccessDenied", "denied access .* was signed with valid credentials.*s3:ListBucket or s3:GetObject"),
        (403, "InvalidAccessKeyId", "does not accept the AWS credentials"),
        (403, "SignatureDoesNotMatch", "does not accept the AWS credentials"),
        (400, "ExpiredToken", "wrong or have expired"),
        (403, "RequestTimeTooSkewed", "clock"),
        (301, "PermanentRedirect", "not in the region us-east-1 .* AWS_DEFAULT_REGION to the bucket's region"),
        (400, "AuthorizationHeaderMalformed", "not in the region us-east-1"),
        (404, "NoSuchBucket", "The bucket 'images' does not exist"),
        (400, "InvalidBucketName", "not a valid bucket name"),
        (400, "SomethingNew", r"refused a request for s3://images/ \(SomethingNew\)"),
    ],
)
@pytest.mark.usefixtures("signed")
def test_each_s3_error_has_its_own_sentence_without_secrets(fake_s3, status, code, sentence):
    fake_s3(lambda request, _key, _query: send_error(request, status, code, "<StringToSign>wJalr</StringToSign>"))
    with pytest.raises(NoUsableInput, match=sentence) as caught:
        list_images()
    assert "wJalr" not in str(caught.value)


def test_a_denied_anonymous_request_is_called_anonymous(fake_s3):
    fake_s3(lambda request, _key, _query: send_error(request, 403, "AccessDenied"))
    with pytest.raises(NoUsableInput, match=r"denied .* was anonymous.*AWS_ACCESS_KEY_ID"):
        list_images()


@pytest.mark.usefixtures("signed")
def test_a_redirect_to_the_bucket_s_region_is_followed(fake_s3):
    def answer(request, _key, _query):
        if "/eu-central-1/" in request.headers["Authorization"]:
            send_listing(request, ["train/cat/1.png"])
        else:
            send(request, 301, x_amz_bucket_region="eu-central-1")

    fake_s3(answer)
    assert list_images().objects


@pytest.mark.usefixtures("signed")
def test_the_error_names_the_region_that_s3_returns(fake_s3):
    code, region = "IllegalLocationConstraintException", "<Region>eu-central-1</Region>"
    fake_s3(lambda request, _key, _query: send_error(request, 400, code, region))
    with pytest.raises(NoUsableInput, match="AWS_DEFAULT_REGION to eu-central-1"):
        list_images()


@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_server_that_is_not_s3_is_an_error(fake_s3, status):
    fake_s3(lambda request, _key, _query: send(request, status, b"<!doctype html><p>Welcome"))
    with pytest.raises(NoUsableInput, match="not an S3 endpoint"):
        list_images()


def test_a_server_that_redirects_every_request_is_an_error(fake_s3):
    fake_s3(lambda request, _key, _query: send(request, 301, Location="https://images.example.com/"))
    with pytest.raises(NoUsableInput, match=r"answered 301 .* not an S3 endpoint"):
        list_images()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_error_about_an_unreachable_endpoint_names_it_without_its_password(
    monkeypatch,
    fake_s3,
    scheme,
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    port = urlsplit(fake_s3(send_listing)).port if scheme == "https" else 1  # plain HTTP, not TLS; nothing
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://user:wJalr@127.0.0.1:{port}")
    with pytest.raises(NoUsableInput, match=rf"127\.0\.0\.1:{port} .*AWS_ENDPOINT_URL") as caught:
        list_images()
    assert "wJalr" not in str(caught.value)
