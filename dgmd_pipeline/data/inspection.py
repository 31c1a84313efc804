"""From a file under `raw/` to a row: a usable `Image`, or a `Rejected` with the reason why it is left out."""

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dgmd_pipeline import manifest
from dgmd_pipeline.data import corrections, decoding, near_duplicates
from dgmd_pipeline.errors import NoUsableInput
from dgmd_pipeline.manifest import EXCLUDED, Image, RawFile, Rejected

MIN_SIDE = 8  # pixels; the smallest pictures known to be worth training on are 8 x 8 digits
PIECE = 64  # files handed to a worker at a time
UNDECODABLE = ("unreadable", "truncated", "empty", "too many pixels", "too many bytes")


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
    max_pixels: int = decoding.MAX_PIXELS,
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
            thumbnails = np.memmap(
                store,
                np.uint8,
                "r",
                shape=(len(decoded), near_duplicates.THUMBNAIL_SIZE, near_duplicates.THUMBNAIL_SIZE, 3),
            )
            images = near_duplicates.group(images, thumbnails, np.array(kept))
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


def _decode(data: bytes) -> tuple[str, tuple[int, int], PIL.Image.Image]:
    """Return the format, the full size (width, height) as the image is seen, and its thumbnail."""
    square, bilinear = (near_duplicates.THUMBNAIL_SIZE, near_duplicates.THUMBNAIL_SIZE), PIL.Image.Resampling.BILINEAR
    image = decoding.open_header(data)
    if image.format not in ("JPEG", "MPO"):
        rgb = decoding.to_rgb(image)
        return str(image.format), rgb.size, rgb.resize(square, bilinear)
    turn = decoding.read_orientation(image)
    size = decoding.oriented_size(image.size, turn)
    reduced = image.draft("RGB", _DRAFT)
    # The reduced size is rounded up to whole pixels. Without the box, the thumbnails of two copies differ by a shift.
    thumbnail = image.convert("RGB").resize(square, bilinear, reduced and reduced[1])
    return "JPEG", size, decoding.apply_orientation(thumbnail, turn)


def _inspect_piece(files: list[RawFile], raw: Path, min_side: int, max_pixels: int) -> list:
    return [_inspect_file(file, raw / file.path, min_side, max_pixels) for file in files]


def _inspect_file(file: RawFile, path: Path, min_side: int, max_pixels: int) -> Rejected | tuple[Image, bytes]:
    """Return the row and the thumbnail (uint8 RGB, `_SIDE` x `_SIDE`), or why there are none."""
    try:
        if path.is_file() and (size := path.stat().st_size) > decoding.MAX_BYTES:
            return Rejected(*file, "too many bytes", f"{size:,}, expected at most {decoding.MAX_BYTES:,}")
        # Reading a named pipe would wait for ever.
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        return Rejected(*file, "unreadable", f"cannot be read from the disk: {error.strerror}")
    if data is None:
        return Rejected(*file, "unreadable", "not a file, or a link that leads to none")
    if not data:
        return Rejected(*file, "empty", "0 bytes")
    with decoding.guard(data, max_pixels) as said:
        try:
            kind, (width, height), thumbnail = _decode(data)
        except (PIL.Image.DecompressionBombError, *decoding.DAMAGED) as error:
            return Rejected(*file, *_explain(error, data, said))
    if min(width, height) < min_side:
        return Rejected(*file, "too small", f"{width} x {height} pixels, expected at least {min_side} on each side")
    sha256 = hashlib.sha256(data).hexdigest()
    return Image(*file, sha256, kind, width, height, sha256), thumbnail.tobytes()


def _explain(error: Exception, data: bytes, said: list[warnings.WarningMessage]) -> tuple[str, str]:
    """Return the reason and the detail for what a reader raised, and had said before."""
    if isinstance(error, PIL.Image.DecompressionBombError):
        return "too many pixels", str(error).split(",", 1)[0]
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, PIL.UnidentifiedImageError):  # its own message is an address in memory
        message = f"no reader for {', '.join(decoding.FORMATS[:-1])} or {decoding.FORMATS[-1]} makes a picture of it"
    early = "truncated" in message.lower() or len(data) < _announced_size(data)
    detail = "; ".join(dict.fromkeys([message, *(str(each.message) for each in said)]))
    return "truncated" if early else "unreadable", " ".join(detail.split())


def _announced_size(data: bytes) -> int:
    """Return the bytes that the header of a WebP or TIFF announces; their readers do not tell cut from damaged."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8
    if data[:4] in (b"II*\0", b"MM\0*"):  # where the directory is; most writers put it at the end
        return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") + 2
    return 0


_DRAFT = (128, 128)  # at least eight pixels of a JPEG to one of its thumbnail


def inspect_folder(
    raw: Path,
    downloaded: bool,
    corrected_labels: Mapping[str, str],
    folder: Path,
    map: Callable[[Callable, Iterable], Iterable] = map,
) -> dict[str, Any]:
    """Inspect the files of `raw`, write `images.csv` and `rejected.csv` into `folder`, and return the counts.

    A `downloaded` folder has a listing; of any other every file in a subfolder is inspected. `corrected_labels` is what
    `corrections.read` returns, `map` is as in `inspect`. Raises NoUsableInput where there are no files.
    """
    files = list(_raw_files(raw, downloaded))
    if not files:
        raise NoUsableInput(
            f"{raw} holds no label folders with images: put them there as <label>/<file>, or delete the folder to have "
            "it downloaded."
        )
    corrected = corrections.apply(files, corrected_labels)
    corrections.warn(corrected)
    usable, rejected = inspect(corrected.files, raw, folder, map)
    usable, copies = corrections.without_copies(usable, corrected.excluded, raw)
    rejected = sorted(rejected + corrected.excluded + copies)
    manifest.write(folder / "images.csv", Image, usable)
    manifest.write(folder / manifest.REJECTED, Rejected, [*_rejected_before(raw, downloaded), *rejected])
    reasons = Counter(row.reason for row in rejected)
    groups = Counter(row.group for row in usable)
    return {
        "files": len(files),
        "images": len(usable),
        "rejected": dict(reasons),
        "near-duplicates": sum(count for count in groups.values() if count > 1),
        "relabelled": corrected.relabelled,
    }


def _raw_files(raw: Path, downloaded: bool) -> Iterator[RawFile]:
    if not downloaded:
        yield from find(raw)
        return
    for source in manifest.read(raw / manifest.LISTING, manifest.SourceObject):
        yield RawFile(source.path, source.path.split("/", 1)[0])


def _rejected_before(raw: Path, downloaded: bool) -> Iterator[Rejected]:
    """Yield the objects that were not downloaded; of a folder put there by hand the files that have no label."""
    if downloaded:
        yield from manifest.read(raw / manifest.REJECTED, Rejected)
        return
    for path in sorted(raw.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield Rejected(path.name, "", "no label", "it lies directly in raw/, in no label's folder")


def summary(counts: Mapping[str, Any]) -> str:
    """Return what `inspect_folder` counted, for the log."""
    left_out = sum(counts["rejected"].values())
    alike = f", {counts['near-duplicates']:,} of them near-duplicates" if counts["near-duplicates"] else ""
    corrected = [(counts["relabelled"], "relabelled"), (counts["rejected"].get(EXCLUDED, 0), "excluded")]
    listed = ", ".join(f"{count:,} {word}" for count, word in corrected if count)
    by_operator = f"; {corrections.NAME}: {listed}" if listed else ""
    return f"{counts['files']:,} files -> {counts['images']:,} images{alike}; {left_out:,} left out{by_operator}"
