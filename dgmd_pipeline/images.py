"""From a file under `raw/` to a row: a usable `Image`, or a `Rejected` with the reason why it is left out."""

import contextlib
import hashlib
import io
import os
import struct
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

# Pillow registers these two readers on import; otherwise it would import every reader it has on the first file that
# is neither JPEG, PNG, GIF nor BMP.
import PIL.Image
import PIL.TiffImagePlugin
import PIL.WebPImagePlugin

from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import EXCLUDED, Image, RawFile, Rejected

# An allow-list, because some of Pillow's other readers call other programs. A camera's MPO (several JPEGs in one
# file) is opened by the JPEG reader and counts as its first picture.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MIN_SIDE = 8  # pixels; the smallest pictures known to be worth training on are 8 x 8 digits
MAX_PIXELS = 100_000_000  # a phone's largest mode is 200 megapixels, a usual photograph 12; 4 to 8 bytes each decoded
MAX_BYTES = 500_000_000  # a file is read into memory whole; 100 megapixels as an uncompressed 16-bit TIFF are 600 MB
PIECE = 64  # files handed to a worker at a time

UNDECODABLE = ("unreadable", "truncated", "empty", "too many pixels", "too many bytes")

# What Pillow's readers raise for damaged content. 440,000 damaged files (bytes changed, cut, inserted; 22 encodings
# of the six formats; Pillow 13.0) raised the first three; the others are what Pillow's own code expects of damaged
# data, or what older versions let through.
DAMAGED = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,  # IndexError, KeyError
    EOFError,
    struct.error,
    zlib.error,
    ArithmeticError,  # OverflowError, ZeroDivisionError
    AssertionError,
    MemoryError,  # a header that asks for more than there is
)

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ACROSS = (5, 6, 7, 8)  # orientations that exchange width and height


def find(raw: Path) -> Iterator[RawFile]:
    """Yield the files of a `raw/` folder that was put there by hand, sorted by path.

    The first folder of a path is its label; files directly in `raw` have none and are not pictures of the data set.
    Names that begin with a dot are skipped, folders as well. Links to files are files. Links to folders are not
    followed (they can lead in circles, and what changes behind them is not seen): they are yielded like files, so
    that `inspect` reports them. The same goes for links that lead nowhere and for what is no regular file.
    Raises NoUsableInput where a folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise NoUsableInput(
            f"Expected a folder of pictures that can be listed, but {error.filename} cannot be ({error.strerror}); "
            "make it readable, or take it away."
        ) from error

    found = []
    for folder, folders, names in os.walk(raw, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        below = Path(folder).relative_to(raw).as_posix()
        if below == ".":
            found += [RawFile(name, name) for name in links]
        else:
            label = below.split("/", 1)[0]
            found += [RawFile(f"{below}/{name}", label) for name in names + links if not name.startswith(".")]
    yield from sorted(found)


def inspect(
    files: Iterable[RawFile],
    raw: Path,
    scratch: Path,
    map: Callable[[Callable, Iterable], Iterable] = map,
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[Image], list[Rejected]]:
    """Read, hash and decode every file once; return the usable ones and the others, each sorted by path.

    `map` works like the builtin: it may call the function for its pieces (lists of at most 64 files) in other
    processes, and yields what comes back in order. `scratch` is an existing folder for a temporary file of 768 bytes
    for each picture. The rows are the same for the same files, whoever does the work.

    Reasons: "empty", "unreadable" (not a picture of `FORMATS`, damaged, or not readable from the disk), "truncated"
    (the data ends before the picture does), "too many bytes" (more than MAX_BYTES), "too many pixels" (more than
    `max_pixels`, known before decoding), "too small" (shortest side below `min_side` pixels), "duplicate" (the same
    bytes under the same label; the first path is kept), "conflict" (the same bytes under several labels: none is kept).
    Where one label of the same bytes is a corrected one, it holds for all of them.
    """
    files = sorted(files)
    pieces = [files[start : start + PIECE] for start in range(0, len(files), PIECE)]
    work = partial(_inspect_piece, raw=raw, min_side=min_side, max_pixels=max_pixels)
    decoded: list[Image] = []
    rejected: list[Rejected] = []
    store = scratch / "thumbnails"
    try:
        with store.open("wb") as file:
            for outcome in chain.from_iterable(map(work, pieces)):
                if isinstance(outcome, Rejected):
                    rejected.append(outcome)
                else:
                    decoded.append(outcome[0])
                    file.write(outcome[1])
        same = defaultdict(list)
        for index, image in enumerate(decoded):
            same[image.sha256].append(index)
        kept = []
        for indexes in same.values():
            copies = _agreed([decoded[index] for index in indexes])
            decoded[indexes[0]] = copies[0]
            first = copies[0]
            other = next((copy for copy in copies if copy.label != first.label), None)
            if other is None:
                kept.append(indexes[0])
                detail = f"the same file as {first.path}"
                rejected += [Rejected(copy.path, copy.label, "duplicate", detail) for copy in copies[1:]]
                continue
            for copy in copies:
                against = other if copy.label == first.label else first
                detail = f"the same file as {against.path}, which has another label"
                rejected.append(Rejected(copy.path, copy.label, "conflict", detail))
        images = [decoded[index] for index in kept]
        if images:
            thumbnails = np.memmap(store, np.uint8, "r", shape=(len(decoded), _SIDE, _SIDE, 3))
            images = _group(images, thumbnails, np.array(kept))
            del thumbnails
    finally:
        store.unlink(missing_ok=True)
    return images, sorted(rejected)


def _agreed(copies: list[Image]) -> list[Image]:
    """Return copies of one file, all with the corrected label if one of them has another label than its folder."""
    corrected = {copy.label for copy in copies if copy.label != copy.path.split("/", 1)[0]}
    return [copy._replace(label=label) for label in corrected for copy in copies] if len(corrected) == 1 else copies


def check_rejected(images: Iterable[Image], rejected: Iterable[Rejected], limit: float, report: Path) -> None:
    """Raise NoUsableInput if more than `limit` (0..1) of the files of any label could not be decoded.

    Those are the files with a reason in `UNDECODABLE`. Duplicates, conflicts and pictures that are too small were
    decoded: they count among a label's files, not against it. Files that were excluded do not count at all, nor do rows
    without a label.
    """
    rejected = [row for row in rejected if row.label and row.reason != EXCLUDED]
    bad = [row for row in rejected if row.reason in UNDECODABLE]
    total = Counter(row.label for row in images) + Counter(row.label for row in rejected)
    count = Counter(row.label for row in bad)
    over = sorted(label for label in count if count[label] > limit * total[label])
    if over:
        first = next(row for row in bad if row.label == over[0])
        named = ", ".join(f"{label} ({count[label]} of {total[label]} files)" for label in over)
        raise NoUsableInput(
            f"More than {limit:.0%} of the files cannot be decoded for {named}; for example {first.path}: "
            f"{first.reason}, {first.detail}. The reason for each file is in {report}: mend or remove the files, in "
            "the bucket if they came from there (and delete the folder raw), "
            f"or raise MAX_REJECTED_PCNT, which is {limit:g}."
        )


# Opening


def open_rgb(path: Path, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Read a picture file as RGB (see `to_rgb`), by its content.

    Use it in one thread of a process at a time: what Pillow and libtiff have to say is a setting of the process.
    Raises PIL.Image.DecompressionBombError before decoding more than `max_pixels`, and one of `DAMAGED`.
    """
    data = path.read_bytes()
    with guarded(data, max_pixels):
        return to_rgb(opened(data))


def thumbnails(raw: Path, paths: Mapping[int, str], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """Return pictures below `raw` made smaller to fit `size` (width, height), uint8 [height, width, 3], by their keys.

    One that cannot be read any more is left out: it is for looking at only.
    """
    found = {}
    for key, path in paths.items():
        try:
            image = open_rgb(raw / path)
        except (*DAMAGED, PIL.Image.DecompressionBombError):
            continue
        image.thumbnail(size)
        found[key] = np.asarray(image)
    return found


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the first frame as a person sees it: mode RGB, EXIF orientation applied, transparency laid on white.

    16 bits of grey are scaled to 8, not clipped. Floating point is taken to end at 1 or, where it goes beyond, at
    255. Everything else is Pillow's conversion (CMYK with Adobe's inversion, LAB by way of littleCMS). Colour
    profiles are not applied. Raises one of `DAMAGED`.
    """
    if image.tell():
        image.seek(0)
    image.load()
    turn = orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = PIL.Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image)
        image = ground
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return turned(image, turn)


def _grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale integers of 16 bits (beyond: clipped) or floating point to 8 bits; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
        top = 1 if values.max() <= 1 else 255
        grey = np.rint(np.clip(values, 0, top) * (255 // top))
    else:
        grey = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
    return PIL.Image.fromarray(grey.astype(np.uint8))


def opened(data: bytes) -> PIL.Image.Image:
    """Read the header of a picture by one of the readers of `FORMATS`, while `guarded`. Raises one of `DAMAGED`."""
    return PIL.Image.open(io.BytesIO(data), formats=FORMATS)


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where EXIF is missing or damaged: the picture is whole without it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except DAMAGED:
        return 1


def turned(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    """Return a picture that was stored with an EXIF orientation as a person sees it."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def exchanged(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return a width and height as stored for those as seen, or the other way round."""
    return size[::-1] if orientation in _ACROSS else size


def _decode(data: bytes) -> tuple[str, tuple[int, int], PIL.Image.Image]:
    """Return the format, the full size (width, height) as the image is seen, and its thumbnail."""
    square, bilinear = (_SIDE, _SIDE), PIL.Image.Resampling.BILINEAR
    image = opened(data)
    if image.format not in ("JPEG", "MPO"):
        rgb = to_rgb(image)
        return str(image.format), rgb.size, rgb.resize(square, bilinear)
    turn = orientation(image)
    size = exchanged(image.size, turn)
    reduced = image.draft("RGB", _DRAFT)
    # The reduced size is rounded up to whole pixels. Without the box, the thumbnails of two copies differ by a shift.
    thumbnail = image.convert("RGB").resize(square, bilinear, reduced and reduced[1])
    return "JPEG", size, turned(thumbnail, turn)


@contextlib.contextmanager
def guarded(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[list[warnings.WarningMessage]]:
    """While `data` is opened: refuse more than `max_pixels`, and keep from the screen what Pillow and libtiff say.

    Pillow warns beyond MAX_IMAGE_PIXELS and refuses beyond twice that: half of ours there gives one clear refusal, in
    every place where Pillow checks. libtiff writes to the process's standard error whatever Pillow does, so that is
    turned away for files that begin like a TIFF. Both are settings of the process: for one thread at a time.
    Yields the list in which Pillow's warnings arrive.
    """
    before = PIL.Image.MAX_IMAGE_PIXELS
    PIL.Image.MAX_IMAGE_PIXELS = max_pixels // 2
    try:
        with warnings.catch_warnings(record=True) as said, _no_stderr(data[:2] in (b"II", b"MM")):
            warnings.simplefilter("always")
            yield said
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _no_stderr(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


# Inspecting one file


def _inspect_piece(files: list[RawFile], raw: Path, min_side: int, max_pixels: int) -> list:
    return [_inspect_file(file, raw / file.path, min_side, max_pixels) for file in files]


def _inspect_file(file: RawFile, path: Path, min_side: int, max_pixels: int) -> Rejected | tuple[Image, bytes]:
    """Return the row and the thumbnail (uint8 RGB, `_SIDE` x `_SIDE`), or why there are none."""
    try:
        if path.is_file() and (size := path.stat().st_size) > MAX_BYTES:
            return Rejected(*file, "too many bytes", f"{size:,}, expected at most {MAX_BYTES:,}")
        # Reading a named pipe would wait for ever.
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        return Rejected(*file, "unreadable", f"cannot be read from the disk: {error.strerror}")
    if data is None:
        return Rejected(*file, "unreadable", "not a file, or a link that leads to none")
    if not data:
        return Rejected(*file, "empty", "0 bytes")
    with guarded(data, max_pixels) as said:
        try:
            kind, (width, height), thumbnail = _decode(data)
        except (PIL.Image.DecompressionBombError, *DAMAGED) as error:
            return Rejected(*file, *_why(error, data, said))
    if min(width, height) < min_side:
        return Rejected(*file, "too small", f"{width} x {height} pixels, expected at least {min_side} on each side")
    sha256 = hashlib.sha256(data).hexdigest()
    return Image(*file, sha256, kind, width, height, sha256), thumbnail.tobytes()


def _why(error: Exception, data: bytes, said: list[warnings.WarningMessage]) -> tuple[str, str]:
    """Return the reason and the detail for what a reader raised, and had said before."""
    if isinstance(error, PIL.Image.DecompressionBombError):
        return "too many pixels", str(error).split(",", 1)[0]
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, PIL.UnidentifiedImageError):  # its own message is an address in memory
        message = f"no reader for {', '.join(FORMATS[:-1])} or {FORMATS[-1]} makes a picture of it"
    early = "truncated" in message.lower() or len(data) < _least_size(data)
    detail = "; ".join(dict.fromkeys([message, *(str(each.message) for each in said)]))
    return "truncated" if early else "unreadable", " ".join(detail.split())


def _least_size(data: bytes) -> int:
    """Return the bytes that the header of a WebP or TIFF announces; their readers do not tell cut from damaged."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8
    if data[:4] in (b"II*\0", b"MM\0*"):  # where the directory is; most writers put it at the end
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") + 2
    return 0


# Near-duplicates: candidates by a perceptual hash, confirmed by their thumbnails

_SIDE = 16  # of a thumbnail, pixels
_DRAFT = (128, 128)  # at least eight pixels of a JPEG to one of its thumbnail
_TURNS = range(0, 64, 4)
_NEIGHBOURS = 8
_BITS = 10
_CHUNK = 1024  # thumbnails or pairs at a time; 0.8 MB each
# Whole numbers: sums are exact in float64, so that the hash is the same whatever adds them up in whatever order.
_COSINES = np.rint(1024 * np.cos(np.pi / _SIDE * np.outer(np.arange(8), np.arange(_SIDE) + 0.5)))
_LUMA = np.array([299.0, 587.0, 114.0])
_NOISE = 2 * 1024**2 * 1000 * _SIDE / 2  # twice what a noise of one level (of 255) leaves in a coefficient


def _group(images: list[Image], thumbnails: np.ndarray, at: np.ndarray) -> list[Image]:
    """Return the rows with `group` filled in; the thumbnail (uint8 RGB) of row i is thumbnails[at[i]]."""
    size = np.array([(image.width, image.height) for image in images], np.float64)
    root = list(range(len(images)))

    def find_root(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for left, right in _candidates(*_hash(thumbnails, at)):
        copies = _are_copies(thumbnails[at[left]], thumbnails[at[right]], size[left], size[right])
        for one, other in zip(left[copies].tolist(), right[copies].tolist(), strict=True):
            root[find_root(one)] = find_root(other)
    roots = [find_root(index) for index in range(len(images))]
    group: dict[int, str] = {}
    for index, image in zip(roots, images, strict=True):
        group[index] = min(image.sha256, group.get(index, image.sha256))
    return [image._replace(group=group[index]) for index, image in zip(roots, images, strict=True)]


def _hash(thumbnails: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pHash's 64 bits (uint64) for each thumbnail, and its brightness (int64, any unit).

    The bits tell which of the 8 x 8 slowest cosines of the luminance are there (Zauner 2010, "Implementation and
    benchmarking of perceptual image hash functions", compares with the median instead; then the bits of a flat
    picture are those of its noise). Resized and re-encoded copies differ by at most 3 bits in 95 %, 5 in 99 %.
    """
    hashes = np.empty(len(at), np.uint64)
    brightness = np.empty(len(at), np.int64)
    for start in range(0, len(at), _CHUNK):
        part = slice(start, start + _CHUNK)
        luma = thumbnails[at[part]] @ _LUMA
        bits = (_COSINES @ luma @ _COSINES.T).reshape(-1, 64) > _NOISE
        bits[:, 0] = False  # the mean
        hashes[part] = np.packbits(bits, axis=1).view(">u8")[:, 0]
        brightness[part] = luma.sum((1, 2))
    return hashes, brightness


def _neighbours(hashes: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs (as two arrays of indexes) that stand close together when the hashes are sorted.

    They are sorted sixteen times, each time turned by four bits more (Charikar 2002 sorts random permutations): two
    hashes stand close where the longest stretch between bits that differ comes first. Each is paired with the next
    eight only, so there are at most 128 pairs for each hash, even if all are the same; brightness decides among
    equals. Found in 300,000 random hashes: all at a distance of 2, 99.9 % at 4, 93 % at 6.
    """
    for turn in _TURNS:
        turned = hashes << np.uint64(turn) | hashes >> np.uint64(64 - turn)
        order = np.lexsort((brightness, turned))
        for step in range(1, min(_NEIGHBOURS + 1, len(order))):
            yield order[:-step], order[step:]


def _candidates(hashes: np.ndarray, brightness: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield neighbours whose hashes differ by at most `_BITS`, every pair once, `_CHUNK` pairs at a time."""
    known = np.empty(0, np.int64)
    fresh = []
    for count, (left, right) in enumerate(_neighbours(hashes, brightness), start=1):
        close = np.bitwise_count(hashes[left] ^ hashes[right]) <= _BITS
        left, right = left[close], right[close]  # noqa: PLW2901
        fresh.append(np.minimum(left, right) * len(hashes) + np.maximum(left, right))
        if count % _NEIGHBOURS == 0:
            known, fresh = np.unique(np.concatenate([known, *fresh])), []
    known = np.unique(np.concatenate([known, *fresh]))
    for start in range(0, len(known), _CHUNK):
        yield np.divmod(known[start : start + _CHUNK], len(hashes))


def _are_copies(one: np.ndarray, other: np.ndarray, one_size: np.ndarray, other_size: np.ndarray) -> np.ndarray:
    """Tell which pairs of thumbnails (uint8 [n, 16, 16, 3]) of pictures (width, height [n, 2]) show the same picture.

    Compared at 8 x 8, as differences to RMS levels (of 255) after taking out what blur explains: a copy that was
    made smaller differs from its original by a multiple of the Laplacian, two handwritten digits do not.

    The tolerance follows the pictures' contrast and the smaller one's shortest side: rounding to whole pixels and the
    blocks of a JPEG move much of a picture of 32 pixels, and nearly nothing of one of 300. Measured: see
    docs/measurements/leaks.md. Images of one industrial object differ by little more than copies do: two solar cells of
    300
    pixels by 0.78 levels at least, where a tolerance of 0.5 to 0.6 applies.
    Tints by 10 %, heavy noise and crops moved by 8 of 360 pixels are other pictures.

    Flat pictures are copies within 0.5 only, so that no two different colours are.
    """
    side = np.minimum(one_size.min(1), other_size.min(1))
    stretch = np.abs(np.log(one_size[:, 0] * other_size[:, 1] / (one_size[:, 1] * other_size[:, 0])))
    # Pairs on the last axis: with the colours there, NumPy's innermost loops have three steps, and a pair takes 22 us
    # instead of 3.
    one, other = (
        each.reshape(-1, _SIDE**2 * 3).T.astype(np.float32, order="C").reshape(8, 2, 8, 2, 3, -1).mean((1, 3))
        for each in (one, other)
    )
    contrast = np.minimum(*(np.sqrt(each.var((0, 1)).mean(0)) for each in (one, other)))
    noise = 0.5 + np.minimum(np.minimum(1.5, (40 / side) ** 2), 0.3 * contrast)
    tolerance = np.hypot(noise, (0.015 + 0.5 / side) * contrast)
    difference, total = one - other, one + other
    framed = np.pad(total, ((1, 1), (1, 1), (0, 0), (0, 0)), mode="edge")
    blur = framed[:-2, 1:-1] + framed[2:, 1:-1] + framed[1:-1, :-2] + framed[1:-1, 2:] - 4 * total
    square = (difference**2).mean((0, 1, 2))
    explained = (difference * blur).mean((0, 1, 2)) ** 2 / np.maximum((blur**2).mean((0, 1, 2)), 1e-6)
    # The last condition: of stripes and a grey plane, blur explains everything.
    return (
        (stretch < 0.02 + 1.5 / side)  # as far as rounding to whole pixels goes, and a little
        & (square - explained < tolerance**2)
        & (square < (4 * tolerance) ** 2)
    )
