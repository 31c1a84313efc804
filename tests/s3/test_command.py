"""The real command with a bucket as buckets are."""

import pytest
from conftest import picture, run_pipeline
from support.http_server import send
from support.s3 import KEYS, send_error, send_listing

pytestmark = pytest.mark.usefixtures("aws_home")


def test_a_bucket_that_throttles_and_has_hidden_names_and_an_object_of_somebody_else(fake_s3, tmp_path):
    images = {
        f"p/{label}/{number}.png": picture(label, number).ljust(3000) for label in ("Cat", "cat") for number in range(3)
    }
    hidden = {f"p/{path}": b"x" for path in (".ipynb_checkpoints/1.png", "cat/._1.png", "cat/Thumbs.db")}
    throttled = iter(range(8))

    def answer(request, key, query):
        if next(throttled, None) is not None:
            send_error(request, 503, "SlowDown")
        elif "list-type" in query:
            send_listing(request, [*images, *hidden], size=3000)
        elif key == "p/cat/2.png":
            send_error(request, 403, "AccessDenied")
        else:
            send(request, 200, images[key])

    endpoint = fake_s3(answer)
    place = {"AWS_ENDPOINT_URL": endpoint, "AWS_DATA_BUCKET": "images", "AWS_DATA_PATH": "p", "BACKBONE": "cnn"}
    result = run_pipeline(tmp_path, "--until", "label", **place, **KEYS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "S3 is throttling" in result.stdout
    assert "s3://images/p/: 3 objects are ignored" in result.stdout
    assert "left out: s3://images/p/cat/2.png: refused, S3 answered 403 AccessDenied: m" in result.stdout
    raw = tmp_path / "data" / "raw"
    assert sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*")) == [
        key.removeprefix("p/") for key in sorted(images) if key != "p/cat/2.png"
    ]
