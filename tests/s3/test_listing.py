import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http_server import send
from support.s3 import read_files, send_listing, upload

from dgmd_pipeline import manifest
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.s3 import listing
from dgmd_pipeline.s3.client import connect
from dgmd_pipeline.s3.download import download
from dgmd_pipeline.s3.listing import ignores_case, list_objects

pytestmark = pytest.mark.usefixtures("aws_home")


@pytest.fixture
def list_keys(fake_s3):
    """List a bucket with these keys."""

    def list_keys(*keys, ignore_case=False):
        fake_s3(lambda request, _key, _query: send_listing(request, keys))
        return list_objects(connect(), "images", "train", ignore_case)

    return list_keys


def paths(found):
    return [source.path for source in found.objects]


def test_unusual_but_safe_keys_become_files_with_the_same_names(s3_client, bucket, tmp_path):
    names = [
        "allspice/allspice amazon_10.jpeg",
        "allspice/a+b=c&d.png",
        "allspice/100%25 %2F.png",
        "anis étoilé/日本/ünï.png",
        "deep/1/2/3/4.png",
        "empty/0.png",
    ]
    contents = {f"train/images/{name}": b"" if name.startswith("empty") else name.encode() for name in names}
    bucket_name = upload(bucket, contents)
    found = list_objects(s3_client, bucket_name, "train/images")
    assert (found.bucket, found.prefix) == (bucket_name, "train/images")
    assert (set(paths(found)), found.rejected) == (set(names), [])
    assert {source.key: source.size for source in found.objects} == {key: len(body) for key, body in contents.items()}
    assert set(download(s3_client, bucket_name, found.objects, tmp_path / "raw", threads=3)) == set(found.objects)
    assert read_files(tmp_path / "raw") == {name: contents[f"train/images/{name}"] for name in names}


def test_only_the_prefix_s_own_folder_is_listed_without_folder_markers(s3_client, bucket):
    name = upload(
        bucket,
        dict.fromkeys(["train/images-old/cat/1.png", "train/images/cat/1.png", "train/images/note.txt"], b"x")
        | dict.fromkeys(["train/images/", "train/images/cat/", "train/images/dog/"], b""),
    )
    found = list_objects(s3_client, name, "train/images")
    assert paths(found) == ["cat/1.png"]
    assert [(row.path, row.label, row.reason) for row in found.rejected] == [("train/images/note.txt", "", "no label")]
    assert paths(list_objects(s3_client, name, "")) == [
        "train/images-old/cat/1.png",
        "train/images/cat/1.png",
        "train/images/note.txt",
    ]


def test_listed_objects_are_a_collection_of_tuples(list_keys):
    objects = list_keys("train/b/2", "train/a/1").objects
    assert [(source.key, source.path) for source in objects] == [("train/b/2", "b/2"), ("train/a/1", "a/1")]
    first, second = objects
    assert ([*objects.by_path()], [*objects.without({first.key})]) == ([second, first], [second])
    assert second in objects and second not in objects.without({second.key})


def test_all_pages_of_a_listing_are_read(s3_client, bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # of a page
    name = upload(bucket, {f"train/label {i % 3}/{i}.png": b"" for i in range(7)})
    assert s3_client.list_objects_v2(Bucket=name)["KeyCount"] == 3
    found = list_objects(s3_client, name, "train")
    assert (len(set(paths(found))), found.rejected) == (7, [])


@pytest.mark.parametrize("namespace", ["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'])
def test_objects_are_parsed_like_botocore_does(fake_s3, namespace):
    pages = {
        None: "<NextContinuationToken>a b&amp;c</NextContinuationToken><IsTruncated>true</IsTruncated>"
        "<Contents><Key>train/c%2Bd/1+%C3%A9%26.png</Key><LastModified>x</LastModified><ETag>&quot;e-1&quot;</ETag>"
        "<Size>12</Size><Owner><ID>7</ID></Owner></Contents>"
        "<Contents><Key>train/c/%C3</Key><Size>0</Size></Contents>",  # ends within a character
        "a b&c": "<IsTruncated>false</IsTruncated><Contents><Size>3</Size><Key>train/c/3.png</Key></Contents>"
        "<Contents><Size>4</Size><Key>train/c/%0A4+.png</Key></Contents>",
    }

    def answer(request, _key, query):
        page = pages[query.get("continuation-token")]
        body = f"<ListBucketResult{namespace}><EncodingType>url</EncodingType>{page}</ListBucketResult>"
        send(request, 200, body.encode())

    fake_s3(answer)
    client = connect()
    by_botocore = [
        (item["Key"], item["Size"], item.get("ETag", "").strip('"'))
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="images", Prefix="train/")
        for item in page["Contents"]
    ]
    listed = list_objects(client, "images", "train")
    found = [(source.key, source.size, source.etag) for source in listed.objects]
    assert found == by_botocore[:-1]
    assert found == [("train/c+d/1 é&.png", 12, "e-1"), ("train/c/\ufffd", 0, ""), ("train/c/3.png", 3, "")]
    assert [row.path for row in listed.rejected] == [repr(key)[1:-1] for key, _, _ in by_botocore[-1:]]


def test_keys_that_are_no_safe_path_are_rejected_with_a_reason(list_keys):
    reasons = {
        "../outside/1.png": "unsafe name",
        "cat/../../1.png": "unsafe name",
        "cat/./1.png": "unsafe name",
        "cat//1.png": "unsafe name",
        "/etc/passwd": "unsafe name",
        "cat/": "unsafe name",  # not a folder marker: it has content
        "cat/a\\1.png": "unsafe name",
        "cat/a\nb.png": "unsafe name",
        "cat/a\x85b.png": "unsafe name",
        "cat/" + "é" * 128: "unsafe name",
        "_SUCCESS/1.png": "reserved name",
        "Listing.csv/1.png": "reserved name",
        "rejected.csv/0": "reserved name",
        "1.png": "no label",
    }
    safe = ["cat/1.png", "cat/" + "é" * 127, "cat/_SUCCESS", "cat/Thumbs.db.png"]
    found = list_keys(*(f"train/{path}" for path in [*reasons, *safe]))
    assert paths(found) == safe
    assert [row.reason for row in found.rejected] == list(reasons.values())
    assert [row.label for row in found.rejected] == ["cat" if path.startswith("cat/") else "" for path in reasons]
    assert all(row.path.isprintable() and row.detail for row in found.rejected)


FOLDERS = st.sampled_from(["", "a/", "A/", "a/b/", "é/", "e\u0301/", ".a/", "a//", "listing.csv/"])
NAMES = st.sampled_from(["1", "B", "b", "b/", "é", "e\u0301", "\u0301", "..", ".x", "x\\", "Thumbs.DB", "n" * 256])


@given(st.lists(st.builds(str.__add__, FOLDERS, NAMES)), st.booleans())
def test_the_path_of_an_object_does_not_depend_on_the_folder_of_the_one_before(keys, ignore_case):
    def assign(keys):
        items = [listing._ListedObject(f"train/{key}", len(key), "") for key in keys]
        objects, rejected, ignored = listing._assign_paths(items, "train/", ignore_case)
        return [source for source in objects if "other" not in source.key], rejected, ignored

    interleaved = [each for number, key in enumerate(keys) for each in (f"other {number}/1", key)]
    assert assign(keys) == assign(interleaved)


def test_a_key_that_is_not_unicode_is_rejected():
    items = [listing._ListedObject("train/cat/\ud800.png", 1, "")]
    objects, rejected, _ = listing._assign_paths(items, "train/", False)
    assert ([*objects], [row.path for row in rejected]) == ([], ["train/cat/\\ud800.png"])


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
def test_of_objects_that_cannot_be_on_one_disk_together_the_first_is_used(list_keys, keys, reasons):
    found = list_keys(*(f"train/{key}" for key in keys), ignore_case=True)
    assert [row.reason for row in found.rejected] == reasons
    assert set(paths(found)) | {row.path.removeprefix("train/") for row in found.rejected} == set(keys)
    assert paths(found)[0] == keys[0]


SYSTEM_FILES = [
    ".DS_Store",
    ".ipynb_checkpoints/1-checkpoint.png",
    ".part/0",
    "cat/.ipynb_checkpoints/1-checkpoint.png",
    "cat/._1.png",
    "cat/Thumbs.db",
    "cat/Desktop.ini",
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/cat/._1.png",
    "__MACOSX/cat/1.png",
]


def test_hidden_and_system_files_are_ignored_and_counted_in_one_line(list_keys, caplog):
    caplog.set_level("INFO", listing.log.name)
    found = list_keys(*(f"train/{path}" for path in ["cat/1.png", *SYSTEM_FILES, ".../1.png"]))
    assert (paths(found), found.rejected) == (["cat/1.png"], [])
    assert caplog.messages == [f"  s3://images/train/: {manifest.describe_system_files(11, 'objects')}"]
    with pytest.raises(NoUsableInput, match=r"no objects in s3://images/train/ but system files: upload images as"):
        list_keys("train/.DS_Store")


def test_labels_that_differ_in_case_only_are_kept_on_a_disk_that_distinguishes_them(list_keys, caplog):
    keys = ["Cat/1.png", "Cat/2.png", "cat/1.png", "cat/2.png", "dog/a.png", "dog/A.png"]
    assert paths(list_keys(*(f"train/{key}" for key in keys))) == keys
    assert not caplog.messages


def test_a_label_that_the_disk_cannot_distinguish_from_another_is_named(list_keys, caplog):
    keys = ["Cat/1.png", "Cat/2.png", "Dog/1.png", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/DOG/2.png"]
    found = list_keys(*(f"train/{key}" for key in keys), ignore_case=True)
    assert paths(found) == ["Cat/1.png", "Cat/2.png", "Dog/1.png", "dog/2.png", "dog/DOG/2.png"]
    assert [re.search(r"the label .* only|\d of its \d", text)[0] for text in caplog.messages] == [
        "the label cat vanishes: it differs from Cat only",
        "the label dog loses images: it differs from Dog only",
    ]
    assert [re.search(r"\d of its \d", text)[0] for text in caplog.messages] == ["2 of its 2", "1 of its 3"]


def test_whether_a_disk_ignores_case_is_seen_from_the_names_in_a_folder(tmp_path):
    assert not ignores_case(tmp_path / "missing")
    assert not ignores_case(tmp_path)
    (tmp_path / ".lock").touch()
    assert not ignores_case(tmp_path)
    (tmp_path / ".LOCK").touch()
    assert not ignores_case(tmp_path)
    (tmp_path / ".LOCK").unlink()
    (tmp_path / ".LOCK").hardlink_to(tmp_path / ".lock")  # one file under both names, as on a disk that ignores case
    assert ignores_case(tmp_path)


def test_the_error_about_a_prefix_without_objects_names_the_existing_folders(s3_client, bucket):
    name = upload(bucket, {f"train/images {i}/cat/1.png": b"x" for i in range(7)} | {"train/photos/": b""})
    for prefix, hint in [
        ("train/images", f"s3://{name}/train/ has images 0/, images 1/, images 2/, images 3/, images 4/, ...."),
        ("train/photos", f"s3://{name}/train/ has images 0/"),
        ("test/a/b", f"s3://{name}/ has train/."),
    ]:
        with pytest.raises(NoUsableInput) as caught:
            list_objects(s3_client, name, prefix)
        assert f"no objects in s3://{name}/{prefix}/: {hint}" in str(caught.value)


@pytest.mark.parametrize("prefix", ["train", ""])
def test_an_empty_bucket_is_an_error(s3_client, bucket, prefix):
    with pytest.raises(NoUsableInput, match="the bucket is empty"):
        list_objects(s3_client, bucket[0], prefix)
