"""Inspects the files under `raw/`. Each becomes a usable `Image`, or a `Rejected` with the reason."""

import contextlib
import logging
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np

from dgmd_pipeline import formatting, manifest
from dgmd_pipeline.data import corrections, inspected_files, limits, near_duplicates
from dgmd_pipeline.data.file_inspection import MIN_SIDE, Result, TemporaryRejection, inspect_file
from dgmd_pipeline.data.inspected_files import InspectedFile, PreviousInspection
from dgmd_pipeline.errors import NoUsableInput, WorkerDied
from dgmd_pipeline.manifest import EXCLUDED, Image, RawFile, Rejected, SourceObject
from dgmd_pipeline.workflow.files import commit

log = logging.getLogger(__name__)
CHUNK = 64  # files that a worker gets at once
PIECE_FILES = 256  # files whose results are stored together
UNDECODABLE = (
    "unreadable", "truncated", "empty", "too many pixels", "too many bytes", "too many scans", "too little memory",
)  # fmt: skip


Map = Callable[[Callable[[RawFile], Result], Sequence[RawFile]], Iterable[Result | WorkerDied]]
InspectionCounts = TypedDict(
    "InspectionCounts",
    {
        "files": int,
        "images": int,
        "rejected": dict[str, int],
        "near-duplicates": int,
        "relabelled": int,
        "new": int,  # files that were opened; the results of the others were reused
    },
)


def inspect_folder(
    raw: Path,
    downloaded: bool,
    corrected_labels: Mapping[str, str],
    folder: Path,
    map: Map = map,
    reserve_memory: limits.ReserveMemory = contextlib.nullcontext,
    previous: Iterable[Path] = (),
    pieces: Path | None = None,
) -> InspectionCounts:
    """Inspect the files of `raw`, write `images.csv` and `rejected.csv` into `folder`, and return the counts.

    If `raw` was `downloaded`, the files in its listing are inspected. Otherwise, all files in its subfolders are
    inspected. `corrected_labels` comes from `corrections.read`; `map`, `reserve_memory`, `previous` and `pieces` are as
    in `inspect`. Raises NoUsableInput if there are no files.
    """
    etags = _etags(raw) if downloaded else {}
    files = [_raw_file(path) for path in etags] if downloaded else list(find(raw))
    if not files:
        raise NoUsableInput(
            f"{raw} contains no label folders with images. Add images as <label>/<file>, or delete the folder to "
            "download them."
        )
    corrected = corrections.apply(files, corrected_labels)
    corrections.warn_of_mismatches(corrected)
    opened: list[RawFile] = []

    def map_new(function: Callable[[RawFile], Result], new: Sequence[RawFile]) -> Iterable[Result | WorkerDied]:
        opened.extend(new)
        return map(function, new)

    images, rejected = inspect(corrected.files, raw, folder, map_new, reserve_memory, etags, previous, pieces)
    images, copies = corrections.exclude_copies(images, corrected.excluded, raw)
    rejected = sorted(rejected + corrected.excluded + copies)
    not_inspected = manifest.read(raw / manifest.REJECTED, Rejected) if downloaded else _unlabelled_files(raw)
    manifest.write(folder / "images.csv", Image, images)
    manifest.write(folder / manifest.REJECTED, Rejected, [*not_inspected, *rejected])
    group_sizes = Counter(image.group for image in images).values()
    return {
        "files": len(files),
        "images": len(images),
        "rejected": dict(Counter(row.reason for row in rejected)),
        "near-duplicates": sum(size for size in group_sizes if size > 1),
        "relabelled": corrected.relabelled,
        "new": len(opened),
    }


def summary(counts: InspectionCounts) -> str:
    """Return the log line for the counts of `inspect_folder`.

    Of the rejected files, the line counts only the excluded files. A warning lists the others.
    """
    grouped = f", {counts['near-duplicates']:,} of them near-duplicates" if counts["near-duplicates"] else ""
    by_operator = [(counts["relabelled"], "relabelled"), (counts["rejected"].get(EXCLUDED, 0), "excluded")]
    listed = ", ".join(f"{count:,} {word}" for count, word in by_operator if count)
    corrected = f"; {corrections.NAME}: {listed}" if listed else ""
    files = formatting.describe_reuse(counts["files"], "files", counts["new"])
    return f"{files} -> {counts['images']:,} images{grouped}{corrected}"


def inspect(
    files: Iterable[RawFile],
    raw: Path,
    folder: Path,
    map: Map = map,
    reserve_memory: limits.ReserveMemory = contextlib.nullcontext,
    etags: Mapping[str, str] | None = None,
    previous: Iterable[Path] = (),
    pieces: Path | None = None,
    min_side: int = MIN_SIDE,
    max_pixels: int = limits.MAX_PIXELS,
) -> tuple[list[Image], list[Rejected]]:
    """Read, hash and decode every new or changed file once; return the usable images and the rejected files, each
    sorted by path.

    - `map` works like the builtin. It may call its function in other processes. It yields the results in order, and a
      WorkerDied for a file whose process died.
    - `reserve_memory` is entered with the number of bytes that decoding an image needs. It may raise TooLittleMemory.
    - `etags` maps the path of each downloaded file to its ETag.
    - `previous` are folders of earlier inspections of this `raw`. The result for a file is reused if the file's version
      (see `inspected_files.version`) is the same.
    - `folder` gets all results at the end. After every PIECE_FILES new results, `pieces` gets a folder with these
      results. If the inspection is stopped, the next inspection can use these folders as `previous`.

    The rows depend only on the files, unless there is too little memory for one of them.

    Reasons for a rejection:

    - "empty"
    - "unreadable": not an image in one of `decoding.FORMATS`, damaged, a disk error, or the decoding process died
    - "truncated": the data ends before the image does
    - "too many bytes", "too many scans": see `limits`; checked before decoding
    - "too many pixels": more than `max_pixels`, or decoding needs over `limits.MAX_MEMORY`; checked before decoding
    - "too little memory": the image needs more memory than `reserve_memory` can provide
    - "too small": the shortest side is below `min_side` pixels
    - "duplicate": the file has the same bytes and the same label as a file with an earlier path, and that file is used
    - "conflict": files with the same bytes have several labels; none of these files is used

    If the corrections give exactly one new label to files with the same bytes, all of these files get this label.
    """
    files = sorted(files)
    earlier = PreviousInspection(previous)
    versions = [inspected_files.version(raw / file.path, (etags or {}).get(file.path)) for file in files]
    reused = [earlier.find(file, version) for file, version in zip(files, versions, strict=True)]
    inspect_one = partial(
        inspect_file, raw=raw, reserve_memory=reserve_memory, min_side=min_side, max_pixels=max_pixels
    )
    is_new = [outcome is None for outcome in reused]
    new = list(compress(files, is_new))
    results = _keep(new, list(compress(versions, is_new)), map(inspect_one, new), pieces)
    outcomes = (next(results) if outcome is None else outcome for outcome in reused)
    with (folder / inspected_files.THUMBNAILS).open("wb") as file:
        decoded, rejected, rows = _collect(files, versions, outcomes, file)
    unique, copies = _remove_copies(decoded)
    thumbnails = inspected_files.open_thumbnails(folder)
    images, known = near_duplicates.group(
        list(unique.values()), thumbnails, np.array(list(unique), np.int64), earlier.known
    )
    inspected_files.write(folder, rows, known)
    return images, sorted(rejected + copies)


def find(raw: Path) -> Iterator[RawFile]:
    """Yield the files of a `raw/` folder that was not downloaded, sorted by path.

    The first folder of a path is the label. Files directly in `raw` have no label and are omitted, and so are system
    files and folders (`manifest.is_system_file`). Links to files count as files. Links to folders are not followed,
    because they can form a cycle, and because a run would not notice changes in the linked folders. A link to a folder
    is yielded like a file, and `inspect` rejects it because it is not a regular file. Raises NoUsableInput if a folder
    cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise NoUsableInput(
            f"Cannot list the folder {error.filename} ({error.strerror}). Make it readable, or remove it."
        ) from error

    found, ignored = [], 0
    for folder, subfolders, names in os.walk(raw, onerror=stop):
        ignored += sum(map(manifest.is_system_file, names + subfolders))
        subfolders[:] = [name for name in subfolders if not manifest.is_system_file(name)]
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        below = Path(folder).relative_to(raw).as_posix()
        if below == ".":
            found += [RawFile(name, name) for name in links]
        else:
            label = below.split("/", 1)[0]
            found += [RawFile(f"{below}/{name}", label) for name in names + links if not manifest.is_system_file(name)]
    if ignored:
        log.info("  %s: %s", raw, manifest.describe_system_files(ignored, "files and folders"))
    yield from sorted(found)


def expect(
    raw: Path, objects: Iterable[SourceObject] | None, corrected_labels: Mapping[str, str], previous: Path
) -> tuple[int, int]:
    """Return how many files an inspection will open, and how many results it will reuse from the folder `previous`.

    `objects` are the objects that were or will be downloaded into `raw`; None if an operator put the files there.
    `corrected_labels` comes from `corrections.read`.
    """
    if objects is None:
        versions = {file.path: inspected_files.version(raw / file.path, None) for file in find(raw)}
    else:
        versions = {source.path: inspected_files.describe(source.size, source.etag) for source in objects}
    files = corrections.apply([_raw_file(path) for path in versions], corrected_labels).files
    unchanged = inspected_files.count_unchanged(previous, {file.path: versions[file.path] for file in files})
    return len(files) - unchanged, unchanged


def check_rejected(usable: Mapping[str, int], rejected: Iterable[Rejected], limit: float, report: Path) -> None:
    """Raise NoUsableInput if more than `limit` (0..1) of the files of any label could not be decoded.

    `usable` maps each label to its number of usable images.

    A file could not be decoded if its reason is in `UNDECODABLE`. Duplicates, conflicts and small images count as
    decoded. Excluded files and rows without a label do not count at all. `report` is the path of `rejected.csv`.
    """
    rejected = [row for row in rejected if row.label and row.reason != EXCLUDED]
    undecodable = [row for row in rejected if row.reason in UNDECODABLE]
    totals = Counter(usable) + Counter(row.label for row in rejected)
    counts = Counter(row.label for row in undecodable)
    over = sorted(label for label in counts if counts[label] > limit * totals[label])
    if over:
        example = next(row for row in undecodable if row.label == over[0])
        listed = ", ".join(f"{label} ({counts[label]} of {totals[label]} files)" for label in over)
        raise NoUsableInput(
            f"More than {formatting.percent(limit)} of the files cannot be decoded for {listed}; for example "
            f"{example.path}: {example.reason}, {example.detail}. {report} lists every file with its reason. Fix or "
            "remove the files. If they were downloaded, do so in the bucket, and delete the folder raw. Or raise "
            f"MAX_REJECTED_PCNT (now {limit:g})."
        )


def _raw_file(path: str) -> RawFile:
    return RawFile(path, path.split("/", 1)[0])


def _etags(raw: Path) -> dict[str, str]:
    """Return path -> ETag of each downloaded file."""
    return {source.path: source.etag for source in manifest.read(raw / manifest.LISTING, manifest.SourceObject)}


def _unlabelled_files(raw: Path) -> Iterator[Rejected]:
    for path in sorted(raw.iterdir()):
        if path.is_file() and not manifest.is_system_file(path.name):
            yield Rejected(path.name, "", "no label", "directly in raw/, not in the folder of a label")


def _collect(
    files: Sequence[RawFile],
    versions: Sequence[str | None],
    results: Iterable[Result | WorkerDied],
    thumbnails: BinaryIO,
) -> tuple[list[Image], list[Rejected], list[InspectedFile]]:
    """Separate the decoded images from the rejected files, and write the thumbnails to a file.

    Also returns the rows of the files whose results can be reused.
    """
    decoded: list[Image] = []
    rejected: list[Rejected] = []
    rows: list[InspectedFile] = []
    for file, version, result in zip(files, versions, results, strict=True):
        if isinstance(result, WorkerDied):
            rejected.append(Rejected(*file, "unreadable", limits.explain(result)))
            continue
        if isinstance(result, TemporaryRejection):
            rejected.append(result.rejected)
            continue
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            image, thumbnail = result
            decoded.append(image)
            thumbnails.write(thumbnail)
        rows.append(InspectedFile.of(file, version or "", result))
    return decoded, rejected, rows


def _keep(
    files: Sequence[RawFile],
    versions: Sequence[str | None],
    results: Iterable[Result | WorkerDied],
    pieces: Path | None,
) -> Iterator[Result | WorkerDied]:
    """Yield the results. If `pieces` is a folder, store the results there before they are yielded.

    PIECE_FILES results at a time are stored in a new folder in `pieces`, together with the versions of their files.
    """
    remaining, run = iter(results), uuid.uuid4().hex[:8]  # because of `run`, no piece of an earlier run is replaced
    for first in range(0, len(files), PIECE_FILES):
        each = slice(first, first + PIECE_FILES)
        found = list(islice(remaining, len(files[each])))
        if pieces is not None:
            with commit(pieces / f"{run}-{first:08d}") as folder:
                with (folder / inspected_files.THUMBNAILS).open("wb") as file:
                    rows = _collect(files[each], versions[each], found, file)[2]
                inspected_files.write(folder, rows, near_duplicates.NOTHING_KNOWN)
        yield from found


def _remove_copies(decoded: list[Image]) -> tuple[dict[int, Image], list[Rejected]]:
    """Return the images to keep (position in `decoded` -> image), and the rejected duplicates and conflicts.

    If images with the same bytes have the same label, the first of them is kept. If they have several labels, none of
    them is kept.
    """
    positions_by_hash = defaultdict(list)
    for position, image in enumerate(decoded):
        positions_by_hash[image.sha256].append(position)
    unique: dict[int, Image] = {}
    rejected: list[Rejected] = []
    for positions in positions_by_hash.values():
        copies = _apply_corrected_label([decoded[position] for position in positions])
        first = copies[0]
        conflicting = next((copy for copy in copies if copy.label != first.label), None)
        if conflicting is None:
            unique[positions[0]] = first
            detail = f"the same file as {first.path}"
            rejected += [Rejected(copy.path, copy.label, "duplicate", detail) for copy in copies[1:]]
        else:
            rejected += [_conflict(copy, conflicting if copy.label == first.label else first) for copy in copies]
    return unique, rejected


def _apply_corrected_label(copies: list[Image]) -> list[Image]:
    """If the copies have exactly one corrected label, give it to all copies.

    A copy has a corrected label if its label differs from the name of its folder below raw/.
    """
    corrected = {copy.label for copy in copies if copy.label != copy.path.split("/", 1)[0]}
    return [copy._replace(label=label) for label in corrected for copy in copies] if len(corrected) == 1 else copies


def _conflict(image: Image, other: Image) -> Rejected:
    return Rejected(image.path, image.label, "conflict", f"the same file as {other.path}, which has another label")
