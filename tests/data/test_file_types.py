import gzip

import pytest
from support.images import encode, samples, scene

from dgmd_pipeline.data.decoding import FORMATS
from dgmd_pipeline.data.file_types import identify

S3_ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code><Message>No</Message></Error>'
FILES = {
    b"\0\0\0\x1cftypheic\0\0\0\0mif1heic": "HEIC",
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic": "HEIC",
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif": "AVIF",
    b"\0\0\0\x14ftypmif1\0\0\0\0mif1": "HEIF",
    b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom": "MP4 video",
    b"\0\0\0\x14ftypqt  \0\0\0\0qt  ": "QuickTime video",
    gzip.compress(b"x"): "gzip",
    b"PK\3\4" + bytes(30): "ZIP",
    b"%PDF-1.7\n%\xe2\xe3": "PDF",
    b"8BPS\0\1" + bytes(30): "Photoshop (PSD)",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "PostScript",
    b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg">': "SVG",
    b'<svg width="9">': "SVG",
    b"\xef\xbb\xbf\r\n<!DOCTYPE html><html>": "HTML",
    b"<!-- saved --><html lang='en'>": "HTML",
    "\ufeff<html><body>".encode("utf-16-le"): "HTML",
    S3_ERROR: "error message of S3 (NoSuchKey)",
    b"<?xml version='1.0'?><note/>": "XML",
    b'{"error": "not found"}': "JSON",
    b"data:image/png;base64,iVBORw0KGgo=": "data URL",
    b"version https://git-lfs.github.com/spec/v1\nsize 9\n": "pointer of Git LFS, without the file's content",
    b"\0\5\x16\7\0\2\0\0Mac OS X": "AppleDouble (metadata of macOS)",
    "Ein Text \N{LATIN SMALL LETTER A WITH DIAERESIS} ".encode() * 1000: "text",
    bytes(9): "file of NUL bytes",
    b"": "empty file",
    b"\1\2\3\xff": "unknown type of file (its first bytes are 01 02 03 ff)",
    b"\1": "unknown type of file (its first bytes are 01)",
    encode(scene(), "PPM"): "PPM",
    encode(scene(), "ICO"): "ICO",
    encode(scene(), "JPEG2000"): "JPEG 2000",
}


@pytest.mark.parametrize(("data", "name"), FILES.items(), ids=range(len(FILES)))
def test_a_file_is_named_by_its_first_bytes(data, name):
    assert identify(data) == name


@pytest.mark.parametrize("name", samples())
def test_an_image_is_named_as_in_formats(name):
    assert identify(samples()[name]) == name.split()[0]
    assert identify(samples()[name]) in FORMATS


def test_every_beginning_of_a_file_is_named():
    for data in [*FILES, *samples().values()]:
        assert all(identify(data[:length]) for length in range(300))
