"""Identifies the type of a file by its first bytes, for messages about files that are not usable images."""

import codecs
import re

# Signatures at byte 0. A library such as filetype knows more types, but no types of text (HTML, S3's errors, pointers
# of Git LFS), and its names of formats differ from those in `decoding`.
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"DDS ", "DDS"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIU\0", "camera raw"),
    (b"P5\n", "PGM"),
    (b"P6\n", "PPM"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"PK\3\4", "ZIP"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\7", "RAR"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"\x93NUMPY", "NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"SIMPLE  =", "FITS"),
    (b"\0\5\x16\7", "AppleDouble (metadata of macOS)"),
    (b"version https://git-lfs.github.com/spec/", "pointer of Git LFS, without the file's content"),
    (b"\x7fELF", "program"),
)
_LATER_SIGNATURES = (
    (8, b"WEBP", "WEBP"),
    (8, b"AVI ", "AVI video"),
    (8, b"WAVE", "WAVE audio"),
    (128, b"DICM", "DICOM"),
)
_BRANDS = (  # patterns in the list of brands at the start of an ISO base media file
    (rb"avif|avis", "AVIF"),
    (rb"hei[cxms]|hev[cxms]", "HEIC"),
    (rb"mif1|msf1", "HEIF"),
    (rb"crx ", "camera raw"),
    (rb"qt  ", "QuickTime video"),
    (rb"", "MP4 video"),
)
_MARKUP = (  # the first match counts
    (re.compile(r"<Error>.*?<Code>(\w{1,60})</Code>", re.DOTALL), "error message of S3 ({})"),
    (re.compile(r"<svg[\s>]", re.IGNORECASE), "SVG"),
    (re.compile(r"<(!doctype html|html|head|body)[\s>]", re.IGNORECASE), "HTML"),
    (re.compile(r"^<(\?xml|!--|\w)"), "XML"),
    (re.compile(r"^data:image/"), "data URL"),
    (re.compile(r"^[{\[]"), "JSON"),
)


def identify(data: bytes) -> str:
    """Return the type of a file by its first bytes: a name in `decoding.FORMATS`, or a phrase for error messages."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    for position, signature, name in _LATER_SIGNATURES:
        if data.startswith(signature, position):
            return name
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4]), 256)]
        return next(name for pattern, name in _BRANDS if re.search(pattern, brands))
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # many texts also begin with BM
        return "BMP"
    if not data[:4096].strip(b"\0"):
        return "file of NUL bytes" if data else "empty file"
    return _identify_text(data) or f"unknown type of file (its first bytes are {data[:8].hex(' ')})"


def _identify_text(data: bytes) -> str:
    """Return the type of a text; "" if the data is not text."""
    decoder = codecs.getincrementaldecoder("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")()
    try:
        text = decoder.decode(data[:4096])  # the bytes may end within a character
    except UnicodeDecodeError:
        return ""
    text = text.strip()
    if not text or not all(character.isprintable() or character.isspace() for character in text):
        return ""
    matches = ((pattern.search(text), name) for pattern, name in _MARKUP)
    return next((name.format(*match.groups()) for match, name in matches if match), "text")
