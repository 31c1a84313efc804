"""Backbones: the files of their weights, found, downloaded and fingerprinted without Keras."""

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest

from dgmd_pipeline.errors import PipelineError
from dgmd_pipeline.training import backbones

SMALL = "MobileNetV3-Small"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def serve(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_imagenet_weights_are_downloaded_into_the_cache_of_keras(tmp_path, monkeypatch):
    content = b"weights"
    backbone = backbones.FROZEN[SMALL]._replace(url="some/weights_notop.h5", md5=hashlib.md5(content).hexdigest())  # noqa: S324
    monkeypatch.setitem(backbones.FROZEN, SMALL, backbone)
    (tmp_path / "server" / "some").mkdir(parents=True)
    (tmp_path / "server" / backbone.url).write_bytes(content)
    server = serve(tmp_path / "server")
    monkeypatch.setattr(backbones, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        assert backbones.weights_file(SMALL, "imagenet", tmp_path / "home").read_bytes() == content
    finally:
        server.shutdown()
    assert [path.name for path in (tmp_path / "home" / "models").iterdir()] == ["weights_notop.h5"]


def test_weights_in_the_container_image_are_used(tmp_path, monkeypatch):
    backbone = backbones.FROZEN[SMALL]._replace(md5=hashlib.md5(b"weights").hexdigest())  # noqa: S324
    monkeypatch.setitem(backbones.FROZEN, SMALL, backbone)
    monkeypatch.setattr(backbones, "INSTALLED", tmp_path / "share")
    monkeypatch.setattr(backbones, "WEIGHTS_URL", "http://127.0.0.1:9/")
    installed = tmp_path / "share" / "models" / backbone.url.rpartition("/")[2]
    installed.parent.mkdir(parents=True)
    installed.write_bytes(b"weights")
    assert backbones.weights_file(SMALL, "imagenet", tmp_path / "home") == installed


def test_without_a_network_the_container_image_is_built_without_weights(tmp_path):
    command = [sys.executable, "-m", "dgmd_pipeline.training.backbones", "MobileNetV2", str(tmp_path)]
    offline = {**os.environ, "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=offline)
    assert done.stdout.endswith("The container image is built without these weights.\n")
    assert not done.stderr


def test_downloaded_weights_with_another_checksum_are_deleted(tmp_path, monkeypatch):
    file = tmp_path / "server" / backbones.FROZEN[SMALL].url
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a page of somebody's proxy")
    server = serve(tmp_path / "server")
    monkeypatch.setattr(backbones, "WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        with pytest.raises(PipelineError, match="checksum of the download"):
            backbones.weights_file(SMALL, "imagenet", tmp_path / "home")
    finally:
        server.shutdown()
    assert not list((tmp_path / "home" / "models").iterdir())


def test_a_failed_download_names_the_file_its_path_and_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "WEIGHTS_URL", "http://127.0.0.1:9/")
    with pytest.raises(PipelineError) as failure:
        backbones.weights_file("EfficientNetV2-B1", "imagenet", tmp_path)
    for part in (
        "http://127.0.0.1:9/efficientnet_v2/efficientnetv2-b1_notop.h5",
        str(tmp_path / "models" / "efficientnetv2-b1_notop.h5"),
        "BACKBONE_WEIGHTS",
        "BACKBONE=cnn",
    ):
        assert part in str(failure.value)


def test_a_missing_weights_file_and_one_of_another_format_are_refused(tmp_path, home):
    with pytest.raises(PipelineError, match="there is no readable file"):
        backbones.weights_file(SMALL, str(tmp_path / "gone.weights.h5"), home)
    whole = tmp_path / "whole.keras"
    whole.touch()
    with pytest.raises(PipelineError, match=r"expected imagenet, none, or a file of weights"):
        backbones.weights_file(SMALL, str(whole), home)


def test_cnn_and_none_have_no_weights_file(home):
    assert backbones.weights_file("cnn", "imagenet", home) is None
    assert backbones.weights_file("EfficientNetV2-B1", "none", home) is None
    assert not list(home.iterdir())


def test_the_fingerprint_of_weights_depends_on_their_content(tmp_path):
    (tmp_path / "a.weights.h5").write_bytes(b"one")
    (tmp_path / "b.weights.h5").write_bytes(b"one")
    (tmp_path / "c.weights.h5").write_bytes(b"two")
    a, b, c = (backbones.weights_fingerprint(str(tmp_path / f"{name}.weights.h5")) for name in "abc")
    assert a == b != c
    assert backbones.weights_fingerprint("imagenet") != backbones.weights_fingerprint("none")


def test_checking_weights_imports_neither_keras_nor_tensorflow(tmp_path):
    code = (
        "import sys, pathlib; from dgmd_pipeline.training import backbones\n"
        f"backbones.weights_file('MobileNetV2', 'none', pathlib.Path({str(tmp_path)!r}))\n"
        "backbones.weights_fingerprint('imagenet')\n"
        "assert 'keras' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
