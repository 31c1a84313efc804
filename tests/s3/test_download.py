import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote_plus, unquote, urlsplit

import pytest
from moto.server import ThreadedMotoServer

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import Rejected, SourceObject
from dgmd_pipeline.s3 import client as s3_client
from dgmd_pipeline.s3 import download as s3_download
from dgmd_pipeline.s3 import listing as s3_listing
from dgmd_pipeline.s3 import sync

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI"}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing of whoever runs the tests: no AWS variables, an empty home, no instance metadata, no proxy."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "BOTO_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return home


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def signed(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def client(moto, monkeypatch, signed):
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    return s3_client.connect(8)


@pytest.fixture
def pictures(client, request):
    """A new bucket and the function that fills it: `{key: content}`."""
    name = f"pictures-{abs(hash(request.node.nodeid))}"
    client.create_bucket(Bucket=name)

    def put(contents):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: client.put_object(Bucket=name, Key=item[0], Body=item[1]), contents.items()))
        return name

    return put


@pytest.fixture
def s3_that(monkeypatch):
    """A server that answers as a test says, and AWS_ENDPOINT_URL set to it: `answer(request, key, query)`."""
    servers = []

    def start(answer):
        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                url = urlsplit(self.path)
                key = unquote(url.path.lstrip("/")).partition("/")[2]
                answer(self, key, {name: values[0] for name, values in parse_qs(url.query).items()})

            def do_HEAD(self):
                self.do_GET()

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        return endpoint

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(request, status, body=b"", length=None, **headers):
    """Answer; a `length` beyond the body's cuts it short."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    request.wfile.write(body)
    if length is not None:
        request.close_connection = True


def send_error(request, status, code, extra=""):
    send(request, status, f"<Error><Code>{code}</Code><Message>m</Message>{extra}</Error>".encode())


def send_listing(request, keys, size=3):
    rest = f"<Size>{size}</Size><ETag>&quot;e&quot;</ETag>"
    contents = "".join(f"<Contents><Key>{quote_plus(key, safe='/')}</Key>{rest}</Contents>" for key in keys)
    body = f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{contents}"
    send(request, 200, f"{body}</ListBucketResult>".encode())


def sources(*paths, size=3):
    return [SourceObject(f"train/{path}", size, "e", path) for path in paths]


def listed(s3_that, *keys):
    s3_that(lambda request, _key, _query: send_listing(request, keys))
    return s3_listing.list_objects(s3_client.connect(), "pictures", "train")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- who asks


def test_importing_the_module_imports_no_boto3():
    check = "import sys; from dgmd_pipeline.s3 import client, download, listing;"
    check += " sys.exit(any(m.startswith('boto') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(s3_download.__file__).parents[2])


@pytest.mark.parametrize("keys", [{}, KEYS])
def test_a_request_is_signed_where_there_are_credentials_and_anonymous_where_there_are_none(monkeypatch, s3_that, keys):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    authorizations = []

    def answer(request, _key, _query):
        authorizations.append(request.headers["Authorization"])
        send_listing(request, ["train/cat/1.png"])

    s3_that(answer)
    client = s3_client.connect()
    s3_listing.list_objects(client, "pictures", "train")
    assert [value is not None and "AKIDEXAMPLE" in value for value in authorizations] == [bool(keys)]
    assert client.meta.region_name == "us-east-1"


def test_a_credentials_file_that_was_named_is_used(monkeypatch, tmp_path, s3_that):
    path = tmp_path / "keys"
    path.write_text("[work]\naws_access_key_id = AKIDWORK\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "work")

    def answer(request, _key, _query):
        send_listing(request, ["train/cat/1.png"] if "AKIDWORK" in request.headers["Authorization"] else [])

    s3_that(answer)
    assert s3_listing.list_objects(s3_client.connect(), "pictures", "train")[0]


@pytest.mark.usefixtures("signed")
def test_keys_in_the_environment_come_before_a_file_that_is_missing(monkeypatch):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file")
    assert s3_client.connect()


def test_an_empty_default_file_and_empty_variables_mean_no_credentials(monkeypatch, environment, s3_that):
    (environment / ".aws").mkdir()
    (environment / ".aws/credentials").touch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_CONFIG_FILE", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")
    assert listed(s3_that, "train/cat/1.png")[0]


def test_our_aws_data_path_is_not_taken_for_botocores_own(monkeypatch, tmp_path, s3_that):
    models = tmp_path / "train/s3/2099-01-01"
    models.mkdir(parents=True)
    (models / "service-2.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_DATA_PATH", "train")
    assert listed(s3_that, "train/cat/1.png")[0]


@pytest.mark.parametrize("variable", ["AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"])
def test_a_file_that_was_named_and_is_missing_or_a_folder_is_an_error(monkeypatch, tmp_path, variable):
    path = tmp_path / "keys"
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(NoUsableInput, match=rf"{path} \({variable}\) does not exist"):
        s3_client.connect()
    path.mkdir()
    with pytest.raises(NoUsableInput, match=rf"{path} \({variable}\) is a folder, not a file. Docker makes"):
        s3_client.connect()


def test_a_folder_in_the_place_of_the_usual_credentials_file_is_an_error(environment):
    (environment / ".aws/credentials").mkdir(parents=True)
    with pytest.raises(NoUsableInput, match=r"\.aws/credentials is a folder"):
        s3_client.connect()


@contextmanager
def without_roots_rights():
    """Root reads everything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root may not become another user here")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["keys", ""])
def test_an_unreadable_credentials_file_is_an_error_that_says_whose_it_is(monkeypatch, closed):
    import boto3  # noqa: F401 - nobody may not be able to read the installed packages

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "keys"
        path.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = s\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
        (folder / closed).chmod(0)
        with without_roots_rights(), pytest.raises(NoUsableInput) as caught:
            user = os.geteuid()
            s3_client.connect()
        folder.chmod(0o755)
        assert f"{path} (AWS_SHARED_CREDENTIALS_FILE) cannot be read by this process, user {user}" in str(caught.value)
        assert f"{folder / closed} belongs to user {os.geteuid()} with mode 0" in str(caught.value)
        assert f"chown {user} {folder / closed}" in str(caught.value)
        assert f"--user {os.geteuid()}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("aws_secret_access_key = wJalrXUtnFEMI\n", "cannot be parsed"),
        ("[default]\nwJalrXUtnFEMI\n", "cannot be parsed"),
        (b"\xff\xfe[default]", "cannot be parsed"),
        ("", r"the profile 'default'; \S+ has the sections: none"),
        ("[work]\naws_access_key_id = a\naws_secret_access_key = wJalrXUtnFEMI\n", r"has the sections: \[work\]"),
        ("[default]\naws_secret_access_key = wJalrXUtnFEMI\n", "no aws_access_key_id"),
        ("[default]\naws_access_key_id = a\n", "Partial credentials"),
        ("[default]\naws_access_key_id =\naws_secret_access_key =\n", "are empty"),
        ("[default]\naws_access_key_id = a\naws_secret_access_key = wJalr XUtnFEMI\n", "hold blanks"),
    ],
)
def test_a_credentials_file_without_usable_keys_is_an_error_that_shows_no_secret(
    monkeypatch, tmp_path, content, sentence
):
    path = tmp_path / "keys"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with pytest.raises(NoUsableInput, match=sentence) as caught:
        s3_client.connect()
    assert "wJalr" not in str(caught.value)


def test_keys_of_another_profile_in_the_usual_file_are_not_passed_over(environment):
    (environment / ".aws").mkdir()
    (environment / ".aws/credentials").write_text("[work]\naws_access_key_id = a\naws_secret_access_key = s\n")
    with pytest.raises(NoUsableInput, match=r"for the profile 'default'.*\[work\].*AWS_PROFILE"):
        s3_client.connect()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"AWS_ACCESS_KEY_ID": "a"}, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_SECRET_ACCESS_KEY": "wJalr"}, "AWS_ACCESS_KEY_ID is not"),
        ({**KEYS, "AWS_SECRET_ACCESS_KEY": "wJalr\n"}, "hold blanks"),
        ({"AWS_PROFILE": "work"}, "profile 'work' .* none of the AWS files"),
        ({**KEYS, "AWS_ENDPOINT_URL": "localhost:9000"}, "AWS_ENDPOINT_URL, if set, looks like http://minio:9000"),
        ({**KEYS, "AWS_ENDPOINT_URL": "ftp://user:wJalr@a b"}, "Invalid endpoint"),
        ({**KEYS, "AWS_DEFAULT_REGION": "us east"}, "region"),
    ],
)
def test_half_or_wrong_settings_are_an_error_that_shows_no_secret(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NoUsableInput, match=sentence) as caught:
        s3_client.connect()
    assert "wJalr" not in str(caught.value)


# --- what there is


def test_odd_but_honest_names_go_from_the_bucket_to_files_and_back(client, pictures, tmp_path):
    paths = [
        "allspice/allspice amazon_10.jpeg",
        "allspice/a+b=c&d.png",
        "allspice/100%25 %2F.png",
        "anis étoilé/日本/ünï.png",
        "deep/1/2/3/4.png",
        "deep/.hidden",
        "empty/0.png",
    ]
    contents = {f"train/images/{path}": b"" if path.startswith("empty") else path.encode() for path in paths}
    name = pictures(contents)
    objects, rejected = s3_listing.list_objects(client, name, "train/images")
    assert ({source.path for source in objects}, rejected) == (set(paths), [])
    assert {source.key: source.size for source in objects} == {key: len(body) for key, body in contents.items()}
    assert set(s3_download.download(client, name, objects, tmp_path / "raw", threads=3)) == set(objects)
    assert files(tmp_path / "raw") == {path: contents[f"train/images/{path}"] for path in paths}


def test_a_prefix_means_exactly_its_folder_and_markers_are_passed_over(client, pictures):
    name = pictures(
        dict.fromkeys(["train/images-old/cat/1.png", "train/images/cat/1.png", "train/images/note.txt"], b"x")
        | dict.fromkeys(["train/images/", "train/images/cat/", "train/images/dog/"], b"")
    )
    objects, rejected = s3_listing.list_objects(client, name, "train/images")
    assert [source.path for source in objects] == ["cat/1.png"]
    assert [(row.path, row.label, row.reason) for row in rejected] == [("train/images/note.txt", "", "no label")]
    assert [source.path for source in s3_listing.list_objects(client, name, "")[0]] == [
        "train/images-old/cat/1.png",
        "train/images/cat/1.png",
        "train/images/note.txt",
    ]


def test_a_listing_of_several_pages_comes_whole(client, pictures):
    name = pictures({f"train/label {i % 3}/{i}.png": b"" for i in range(1_001)})
    objects, rejected = s3_listing.list_objects(client, name, "train")
    assert (len({source.path for source in objects}), rejected) == (1_001, [])


def test_names_that_are_no_path_below_raw_are_left_out_with_a_reason(s3_that):
    reasons = {
        "../outside/1.png": "unsafe name",
        "cat/../../1.png": "unsafe name",
        "cat/./1.png": "unsafe name",
        "cat//1.png": "unsafe name",
        "/etc/passwd": "unsafe name",
        "cat/": "unsafe name",  # not a folder marker: it has content
        "cat/..\\1.png": "unsafe name",
        "cat/a\nb.png": "unsafe name",
        "cat/a\x85b.png": "unsafe name",
        "cat/" + "é" * 128: "unsafe name",
        "_SUCCESS/1.png": "reserved name",
        "Listing.csv/1.png": "reserved name",
        ".part/0": "reserved name",
        "1.png": "no label",
    }
    honest = ["cat/1.png", "cat/" + "é" * 127, "cat/_SUCCESS", "cat/.part/0"]
    objects, rejected = listed(s3_that, *(f"train/{path}" for path in [*reasons, *honest]))
    assert [source.path for source in objects] == honest
    assert [row.reason for row in rejected] == list(reasons.values())
    assert [row.label for row in rejected] == ["cat" if path.startswith("cat/") else "" for path in reasons]
    assert all(row.path.isprintable() and row.detail for row in rejected)


def test_a_key_that_is_not_unicode_is_left_out():
    objects, rejected = s3_listing._assign_paths([{"Key": "train/cat/\ud800.png", "Size": 1}], "train/")
    assert (objects, [row.path for row in rejected]) == ([], ["train/cat/\\ud800.png"])


@pytest.mark.parametrize(
    ("keys", "reasons"),
    [
        (["cat/1.png", "cat/1.PNG"], ["same name"]),
        (["cat/é.png", "cat/e\u0301.png", "cat/É.png"], ["same name", "same name"]),
        (["cat/1.png", "Cat/1.png"], ["same name"]),
        (["cat/b", "cat/b-", "cat/b/c", "cat/b/d/e"], ["clash", "clash"]),
        (["cat/b/c", "cat/B"], ["clash"]),
        (["cat/x/y/z", "cat/x", "cat/X/y"], ["clash", "clash"]),
        (["cat/1.png", "Cat/2.png", "dog/1.png"], []),
    ],
)
def test_of_objects_that_a_disk_cannot_keep_side_by_side_the_first_stays(s3_that, keys, reasons):
    objects, rejected = listed(s3_that, *(f"train/{key}" for key in keys))
    assert [row.reason for row in rejected] == reasons
    assert {source.path for source in objects} | {row.path.removeprefix("train/") for row in rejected} == set(keys)
    assert objects[0].path == keys[0]


# --- what goes wrong


@pytest.mark.parametrize("name", ["s3://pictures", "pictures/train", "my pictures", ""])
def test_a_bucket_name_that_cannot_be_is_an_error(client, name):
    with pytest.raises(NoUsableInput, match="is no name of a bucket"):
        s3_listing.list_objects(client, name, "train")


def test_a_bucket_that_does_not_exist_is_an_error(client):
    with pytest.raises(NoUsableInput, match=r"There is no bucket 'no-such-bucket' at 127\.0\.0\.1"):
        s3_listing.list_objects(client, "no-such-bucket", "train")


def test_a_prefix_without_objects_is_an_error_that_shows_the_folders_that_are_there(client, pictures):
    name = pictures({f"train/images {i}/cat/1.png": b"x" for i in range(7)} | {"train/pictures/": b""})
    for prefix, hint in [
        ("train/images", f"s3://{name}/train/ has images 0/, images 1/, images 2/, images 3/, images 4/, ...."),
        ("train/pictures", f"s3://{name}/train/ has images 0/"),
        ("test/a/b", f"s3://{name}/ has train/."),
    ]:
        with pytest.raises(NoUsableInput) as caught:
            s3_listing.list_objects(client, name, prefix)
        assert f"no objects in s3://{name}/{prefix}/: {hint}" in str(caught.value)


@pytest.mark.parametrize("prefix", ["train", ""])
def test_an_empty_bucket_is_an_error(client, pictures, prefix):
    with pytest.raises(NoUsableInput, match="the bucket is empty"):
        s3_listing.list_objects(client, pictures({}), prefix)


REFUSALS = [
    (403, "AccessDenied", "denied .* to a signed request"),
    (403, "InvalidAccessKeyId", "does not accept the AWS credentials"),
    (403, "SignatureDoesNotMatch", "does not accept the AWS credentials"),
    (400, "ExpiredToken", "wrong or have expired"),
    (403, "RequestTimeTooSkewed", "clock"),
    (301, "PermanentRedirect", "another region than us-east-1 .* AWS_DEFAULT_REGION to that of the bucket"),
    (400, "AuthorizationHeaderMalformed", "another region than us-east-1"),
    (404, "NoSuchBucket", "There is no bucket 'pictures'"),
    (400, "InvalidBucketName", "no name of a bucket"),
    (400, "SomethingNew", r"refused a request about s3://pictures/ \(SomethingNew\)"),
]


@pytest.mark.parametrize(("status", "code", "sentence"), REFUSALS)
@pytest.mark.usefixtures("signed")
def test_a_refusal_has_its_own_sentence_and_shows_no_secret(s3_that, status, code, sentence):
    s3_that(lambda request, _key, _query: send_error(request, status, code, "<StringToSign>wJalr</StringToSign>"))
    with pytest.raises(NoUsableInput, match=sentence) as caught:
        s3_listing.list_objects(s3_client.connect(), "pictures", "train")
    assert "wJalr" not in str(caught.value)


def test_a_refused_anonymous_request_is_called_anonymous(s3_that):
    s3_that(lambda request, _key, _query: send_error(request, 403, "AccessDenied"))
    with pytest.raises(NoUsableInput, match=r"denied .* to an anonymous request.*AWS_ACCESS_KEY_ID"):
        s3_listing.list_objects(s3_client.connect(), "pictures", "train")


@pytest.mark.usefixtures("signed")
def test_a_bucket_in_another_region_is_followed_where_s3_names_it(s3_that):
    def answer(request, _key, _query):
        if "/eu-central-1/" in request.headers["Authorization"]:
            send_listing(request, ["train/cat/1.png"])
        else:
            send(request, 301, x_amz_bucket_region="eu-central-1")

    s3_that(answer)
    assert s3_listing.list_objects(s3_client.connect(), "pictures", "train")[0]


@pytest.mark.usefixtures("signed")
def test_the_region_that_s3_names_is_passed_on(s3_that):
    s3_that(
        lambda request, _key, _query: send_error(
            request, 400, "IllegalLocationConstraintException", "<Region>eu-central-1</Region>"
        )
    )
    with pytest.raises(NoUsableInput, match="AWS_DEFAULT_REGION to eu-central-1"):
        s3_listing.list_objects(s3_client.connect(), "pictures", "train")


@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_server_that_is_no_s3_is_an_error(s3_that, status):
    s3_that(lambda request, _key, _query: send(request, status, b"<!doctype html><p>Welcome"))
    with pytest.raises(NoUsableInput, match="is no S3"):
        s3_listing.list_objects(s3_client.connect(), "pictures", "train")


def test_a_server_that_redirects_everything_is_an_error(s3_that):
    s3_that(lambda request, _key, _query: send(request, 301, Location="https://pictures.example.com/"))
    with pytest.raises(NoUsableInput, match=r"answered 301 .* is no S3"):
        s3_listing.list_objects(s3_client.connect(), "pictures", "train")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_endpoint_that_does_not_answer_is_named_without_its_password(monkeypatch, s3_that, scheme):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    port = urlsplit(s3_that(send_listing)).port if scheme == "https" else 1  # plain HTTP there; nothing here
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://user:wJalr@127.0.0.1:{port}")
    with pytest.raises(NoUsableInput, match=rf"127\.0\.0\.1:{port} .*AWS_ENDPOINT_URL") as caught:
        s3_listing.list_objects(s3_client.connect(), "pictures", "train")
    assert "wJalr" not in str(caught.value)


# --- downloads


def test_a_transfer_that_breaks_off_is_repeated(s3_that, tmp_path):
    tries = Counter()

    def answer(request, key, _query):
        tries[key] += 1
        send(request, 200, b"abc" if tries[key] > 1 else b"ab", length=3)

    s3_that(answer)
    done = list(
        s3_download.download(s3_client.connect(), "pictures", sources("cat/1.png", "cat/2.png"), tmp_path / "raw")
    )
    assert set(done) == set(sources("cat/1.png", "cat/2.png"))
    assert files(tmp_path / "raw") == {"cat/1.png": b"abc", "cat/2.png": b"abc"}
    assert set(tries.values()) <= {2, 3}


def test_a_transfer_that_always_breaks_off_is_an_error_and_leaves_no_file(monkeypatch, s3_that, tmp_path):
    monkeypatch.setattr(s3_download, "READ_ATTEMPTS", 2)
    s3_that(lambda request, _key, _query: send(request, 200, b"ab", length=3))
    with pytest.raises(NoUsableInput, match=r"s3://pictures/train/cat/1.png .* broke off 2 times"):
        list(s3_download.download(s3_client.connect(), "pictures", sources("cat/1.png"), tmp_path / "raw"))
    assert list((tmp_path / "raw").rglob("*")) == []


def test_an_object_that_is_gone_archived_or_changed_is_reported_and_the_others_come(s3_that, tmp_path):
    def answer(request, key, _query):
        if key.endswith("gone"):
            send_error(request, 404, "NoSuchKey")
        elif key.endswith("archived"):
            send_error(request, 403, "InvalidObjectState")
        else:
            send(request, 200, b"abcd" if key.endswith("changed") else b"abc")

    s3_that(answer)
    paths = ["cat/gone", "cat/archived", "cat/changed", *(f"dog/{i}" for i in range(20))]
    done = list(s3_download.download(s3_client.connect(), "pictures", sources(*paths), tmp_path / "raw", threads=4))
    left_out = {row.reason: row for row in done if isinstance(row, Rejected)}
    assert left_out.keys() == {"gone", "archived", "changed"}
    assert left_out["changed"] == Rejected("train/cat/changed", "cat", "changed", "3 bytes when it was listed, now 4")
    assert {row.path for row in done if isinstance(row, SourceObject)} == set(paths[3:])
    assert files(tmp_path / "raw") == dict.fromkeys(paths[3:], b"abc")


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchBucket"])
@pytest.mark.usefixtures("signed")
def test_a_bucket_that_closes_or_goes_during_the_download_stops_it(s3_that, tmp_path, code):
    s3_that(lambda request, _key, _query: send_error(request, 404 if code == "NoSuchBucket" else 403, code))
    with pytest.raises(NoUsableInput, match=r"s3://pictures/train/cat/1.png|no bucket 'pictures'"):
        list(s3_download.download(s3_client.connect(), "pictures", sources("cat/1.png"), tmp_path / "raw"))


def test_an_error_of_the_disk_comes_as_it_is(s3_that, tmp_path):
    s3_that(lambda request, _key, _query: send(request, 200, b"abc"))
    (tmp_path / "cat").write_text("a file where a folder has to be")
    with pytest.raises(NotADirectoryError):
        list(s3_download.download(s3_client.connect(), "pictures", sources("cat/1.png"), tmp_path))


def test_what_a_killed_run_left_unfinished_is_removed_even_with_nothing_left_to_fetch(s3_that, tmp_path):
    s3_that(lambda request, _key, _query: send(request, 200, b"abc"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(b"abc")
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part/7").write_bytes(b"a")
    assert list(s3_download.download(s3_client.connect(), "pictures", [], tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["cat"]


def test_who_stops_early_leaves_no_thread_and_nothing_half_made_and_asked_for_little(s3_that, tmp_path):
    asked_for = []

    def many():
        for i in range(10_000):
            asked_for.append(i)
            yield from sources(f"cat/{i}")

    s3_that(lambda request, _key, _query: send(request, 200, b"abc"))
    before = set(threading.enumerate())
    download = s3_download.download(s3_client.connect(), "pictures", many(), tmp_path / "raw", threads=4)
    workers = {thread for _ in range(5) if next(download) for thread in set(threading.enumerate()) - before}
    workers = {thread for thread in workers if "work" in thread.name}
    download.close()
    assert workers
    assert not any(thread.is_alive() for thread in workers)
    assert len(asked_for) <= 4 + 5
    assert set(files(tmp_path / "raw").values()) == {b"abc"}
    assert not (tmp_path / "raw/.part").exists()


def test_a_silent_server_keeps_nobody_and_what_it_sends_later_is_not_written(monkeypatch, s3_that, tmp_path):
    monkeypatch.setattr(s3_download, "SHUTDOWN_TIMEOUT", 0.1)
    go_on = threading.Event()

    def answer(request, key, _query):
        if key.endswith("silent"):
            go_on.wait(20)
        send(request, 200, b"abc")

    s3_that(answer)
    download = s3_download.download(
        s3_client.connect(), "pictures", sources("cat/silent", "cat/1"), tmp_path / "raw", threads=2
    )
    assert next(download).path == "cat/1"
    download.close()
    left = [thread for thread in threading.enumerate() if "(_work)" in thread.name]
    assert [thread.daemon for thread in left] == [True]
    go_on.set()
    left[0].join()
    assert files(tmp_path / "raw") == {"cat/1": b"abc"}


def test_a_download_goes_on_where_one_was_cut_off(client, pictures, tmp_path):
    folder, notes = tmp_path / "draft", tmp_path / "draft" / ".resume" / "listing.csv"
    notes.parent.mkdir(parents=True)
    name = pictures({f"p/label/{number}": b"%d" % number for number in range(20)})
    objects, _ = s3_listing.list_objects(client, name, "p")
    sync.reuse(objects, folder, notes, tmp_path / "former", [])
    first = s3_download.download(client, name, objects, folder, threads=2)
    came = {next(first).path for _ in range(5)}
    first.close()
    there, missing = sync.reuse(objects, folder, notes, tmp_path / "former", [])
    assert came <= {source.path for source in there}
    assert missing
    assert set(s3_download.download(client, name, missing, folder)) == set(missing)
    assert {path.name: path.read_text() for path in (folder / "label").iterdir()} == {str(n): str(n) for n in range(20)}
