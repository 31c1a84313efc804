"""What an operator does with registered models: look, compare, promote, take back, predict. Answers go to stdout."""

import csv
import io
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dgmd_pipeline import comparison, production, registry, settings, tasks
from dgmd_pipeline.errors import NoUsableInput, PipelineError, Refused, SettingsError
from dgmd_pipeline.folders import human
from dgmd_pipeline.progress import progress

if TYPE_CHECKING:
    import keras

    from dgmd_pipeline.review import Contender, Review
    from dgmd_pipeline.settings import Settings

log = logging.getLogger(__name__)


def models(values: "Settings", as_json: bool) -> None:
    """Show the versions of the model, the newest first."""
    store, found = _registered(values)
    promoted = {
        event.version: event for event in production.history(store, values.model_name) if event.done is not False
    }
    rows = [_row(entry, promoted.get(entry.version)) for entry in found]
    if as_json:
        _print_json(rows)
        return
    print(f"{values.model_name} at {settings.redact(store.uri)}")
    head = ("version", "created", "environment", "accuracy", "difference", "latency", "size")
    shown = [_shown(row) for row in rows]
    title, *lines = _table([head, *([row[name] for name in head] for row in shown)])
    print(title)
    for line, row in zip(lines, shown, strict=True):
        print(line)
        if row["promoted"]:  # in a line of its own: a terminal is not wide enough for one
            print(f"{'':9}promoted {row['promoted']}")
    if any(registry.CANDIDATE in row["aliases"] for row in rows):
        print("* candidate: what `promote` takes")


def _row(entry: registry.Entry, event: production.Event | None) -> dict[str, Any]:
    def number(name: str) -> float | None:
        value = entry.tags.get(f"dgmd.{name}")
        return None if value is None else float(value)

    return {
        "version": entry.version,
        "created": datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="seconds"),
        "environment": entry.tags.get(registry.ENVIRONMENT, registry.NON_PRODUCTION),
        "aliases": list(entry.aliases),
        "accuracy": number("validation_accuracy"),
        "difference": number("difference"),
        "compared_with": entry.tags.get("dgmd.compared_with"),
        "latency_p50_ms": number("latency_p50_ms"),
        "bytes": number("bytes"),
        "run": entry.run_id,
        "promoted_by": event and event.who,
        "promoted_at": event and event.when,
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    def words(name: str, form: str) -> str:
        return "" if row[name] is None else form.format(row[name])

    against = f" v{row['compared_with']}" if row["compared_with"] else ""
    return {
        "version": str(row["version"]),
        "created": row["created"][:10],
        "environment": row["environment"] + (" *" if registry.CANDIDATE in row["aliases"] else ""),
        "accuracy": words("accuracy", "{:.4f}"),
        "difference": words("difference", "{:+.4f}") + against,
        "latency": words("latency_p50_ms", "{:.0f} ms"),
        "size": "" if row["bytes"] is None else human(int(row["bytes"])),
        "promoted": f"{row['promoted_at'][:10]} by {row['promoted_by']}" if row["promoted_at"] else "",
    }


def promote(values: "Settings", version: str, yes: bool, force: bool, reason: str, as_json: bool) -> None:
    """Show what is known of a version, see that it can be loaded, and make it production.

    Raises Refused where a condition does not hold and `force` is not given.
    """
    if force and not reason:
        raise SettingsError('--force wants to know why: --reason "..."; it is kept in the history.')
    store, found = _registered(values)
    entry = _chosen(found, version, values.model_name)
    now = production.current(store, values.model_name)
    if entry.version == now:
        _say(f"{values.model_name} version {now} is production already.", as_json, version=now, promoted=False)
        return
    for each in found:
        if now is None and each.stage == production.STAGE:
            log.warning(
                "version %d has the stage %s and not the alias: it counts for nothing and is archived by a promotion; "
                "docs/moving.md has the lines that make it count",
                each.version, each.stage,
            )  # fmt: skip
    with _scratch() as folder:
        candidate = _loaded(store, values.model_name, entry, folder)
        former = next((each for each in found if each.version == now), None)
        known = _reviewed(values, store, entry, candidate, former, folder)
    limits = comparison.Limits(values.max_class_drop, values.max_latency_ratio)
    gates = comparison.gates(*known, limits)
    if not as_json:
        _print_review(values.model_name, entry, now, known, gates)
    closed = [gate for gate in gates if gate.passed is False]
    if closed and not force:
        if as_json:
            _print_json({"version": entry.version, "promoted": False, "gates": [gate._asdict() for gate in gates]})
        raise Refused(
            f"Version {entry.version} is not promoted. {' '.join(gate.text for gate in closed)} "
            'If it shall be production all the same: --force --reason "...".'
        )
    _ask(f"Make version {entry.version} production{f' instead of {now}' if now else ''}?", yes)
    event = production.switch(
        store, values.model_name, entry.version, now,
        action="promote", who=settings.operator(), why=reason, gates=gates, forced=bool(closed),
    )  # fmt: skip
    _say(
        f"{values.model_name} version {entry.version} is production"
        + (f"; version {now} was. `rollback` goes back to it." if now else "."),
        as_json, version=entry.version, promoted=True, event=event._asdict(), gates=[gate._asdict() for gate in gates],
    )  # fmt: skip


def rollback(values: "Settings", yes: bool, reason: str, as_json: bool) -> None:
    """Make the version production that was it before, by the history. Raises Refused where there is none."""
    store, found = _registered(values)
    now = production.current(store, values.model_name)
    earlier = production.before(production.history(store, values.model_name), now)
    there = {entry.version: entry for entry in found}
    for version in [version for version in earlier if version not in there]:
        log.warning("version %d was production, too, but is not in the registry any more", version)
    earlier = [version for version in earlier if version in there and version != now]
    if now is None or not earlier:
        raise Refused(
            f"{values.model_name} has no earlier production version to go back to"
            + (f"; version {now} was the first." if now else ": nothing is production.")
        )
    version = earlier[-1]
    with _scratch() as folder:
        try:
            _loaded(store, values.model_name, there[version], folder)
        except registry.Foreign as error:  # it was production all the same
            log.warning("%s Whether it can be loaded is not tried.", error)
    _ask(f"Go back from version {now} to version {version}?", yes)
    event = production.switch(
        store, values.model_name, version, now, action="rollback", who=settings.operator(), why=reason
    )
    _say(
        f"{values.model_name} version {version} is production again; version {now} was.",
        as_json, version=version, event=event._asdict(),
    )  # fmt: skip


def history(values: "Settings", as_json: bool) -> None:
    """Show who made which version production, and why."""
    store, _ = _registered(values)
    events = production.history(store, values.model_name)
    if as_json:
        _print_json([event._asdict() for event in events])
        return
    rows: list[Sequence[str]] = [("when", "what", "from", "to", "who", "why")]
    for event in events:
        what = event.action + (" (forced)" if event.forced else "") + ("" if event.done else " (not carried out)")
        rows.append((event.when[:16], what, str(event.former or ""), str(event.version), event.who, event.why))
    _print_table(rows)


def compare(values: "Settings", one: str, other: str, as_json: bool) -> None:
    """Compare two versions on the validation pictures in DATA_DIR that neither was trained on."""
    from dgmd_pipeline import model, review

    store, found = _registered(values)
    entries = [_chosen(found, word, values.model_name) for word in (one, other)]
    pictures = tasks.validation(values)
    if pictures is None:
        raise NoUsableInput(
            f"There are no validation records in {values.data_dir}: give the command where the pipeline runs."
        )
    with _scratch() as folder:
        log.info("Loading versions %d and %d from the registry ...", *(entry.version for entry in entries))
        model.start_tensorflow()
        here, there = (
            tasks.contender(store, values.model_name, entry, folder / str(entry.version)) for entry in entries
        )
        here = here._replace(probabilities=review.predictions(here, pictures))
        known = review.review(here, there, pictures, folder)
    if known.comparison is None:
        raise PipelineError(known.missing)
    if as_json:
        _print_json({"version": entries[0].version, "comparison": known.comparison, "assessment": known.assessment})
        return
    gates = comparison.gates(*known, comparison.Limits(values.max_class_drop, values.max_latency_ratio))
    _print_review(values.model_name, entries[0], entries[1].version, known, gates)


def predict(values: "Settings", files: Sequence[Path], version: str, form: str) -> None:
    """Print label and probability of picture files, or of all in folders, by a registered version.

    Raises NoUsableInput at the end where a file could not be read.
    """
    from PIL import Image

    from dgmd_pipeline import images, model

    paths = list(_files(files))
    if not paths:
        raise NoUsableInput(f"There are no files in {', '.join(map(str, files))}: name picture files, or folders.")
    store, found = _registered(values, repair=False)
    entry = _chosen(found, version, values.model_name)
    rows, unread = [], []
    log.info("Loading %s version %d from the registry ...", values.model_name, entry.version)
    with _scratch() as folder:
        fetched = registry.fetch(store, values.model_name, entry, folder)
        model.start_tensorflow()
        network = _network(fetched.path, values.model_name, entry)
        import numpy as np

        for path in progress(paths, "predict", len(paths), "images"):
            try:
                picture = np.asarray(images.open_rgb(path))[np.newaxis]
            except (*images.DAMAGED, Image.DecompressionBombError) as error:
                unread.append(path)
                log.warning("%s is no picture that can be read (%s)", path, type(error).__name__)
                continue
            probabilities = network.predict_on_batch(picture)[0]
            best = int(probabilities.argmax())
            rows.append({"file": str(path), "label": fetched.labels[best], "probability": float(probabilities[best])})
    _print_predictions(rows, form)
    if unread:
        raise NoUsableInput(f"{len(unread):,} of {len(paths):,} files could not be read; the first one is {unread[0]}.")


def _print_predictions(rows: list[dict[str, Any]], form: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files as they are
    if form == "json":
        _print_json(rows)
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, ["file", "label", "probability"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        table = [(row["label"], f"{row['probability']:.4f}", row["file"]) for row in rows]
        _print_table([("label", "probability", "file"), *table])


def _files(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
        elif path.is_file():
            yield path
        else:
            raise NoUsableInput(f"There is no file or folder {path}.")


def _registered(values: "Settings", repair: bool = True) -> tuple[registry.Store, list[registry.Entry]]:
    """Return the registry and the model's versions, after mending what a command that was cut off has left."""
    store = tasks.store(values)
    if store is None:
        raise NoUsableInput(
            f"There is no registry: MLFLOW_TRACKING_URI is not set, and {values.data_dir} holds no embedded one. Set "
            "the one, or DATA_DIR, or run the pipeline first."
        )
    found = registry.entries(store, values.model_name)
    if not found:
        raise NoUsableInput(
            f"There is no version of {values.model_name} in the registry: correct MODEL_NAME, or run the pipeline "
            "first."
        )
    if repair and (mended := production.repair(store, values.model_name)):
        log.warning("mended: %s", "; ".join(mended))
        found = registry.entries(store, values.model_name)
    return store, found


def _chosen(found: Sequence[registry.Entry], word: str, name: str) -> registry.Entry:
    """Return the version of a number or an @alias."""
    for entry in found:
        if str(entry.version) == word or (word.startswith("@") and word[1:] in entry.aliases):
            return entry
    if word == f"@{registry.CANDIDATE}" and found:
        raise NoUsableInput(
            f"No version of {name} waits for a promotion; the newest is {found[0].version}. Name the one that is meant."
        )
    versions = ", ".join(str(entry.version) for entry in found[:10])
    aliases = ", ".join(f"@{alias}" for entry in found for alias in entry.aliases) or "no alias"
    raise NoUsableInput(f"{name} has no version {word}: the newest are {versions}, and there is {aliases}.")


def _loaded(store: registry.Store, name: str, entry: registry.Entry, folder: Path) -> "Contender":
    """Fetch a version and see that it can be used."""
    import numpy as np

    from dgmd_pipeline import model

    log.info("Loading version %d from the registry ...", entry.version)
    contender = tasks.contender(store, name, entry, folder / str(entry.version))
    model.start_tensorflow()
    network = _network(contender.path, name, entry)
    found = network.predict_on_batch(np.zeros((1, 64, 64, 3), np.uint8)).shape
    if found != (1, len(contender.labels)):
        raise PipelineError(
            f"{name} version {entry.version} gives probabilities of shape {found} where {len(contender.labels)} labels "
            "are stored with it: it is damaged. Train a new one."
        )
    return contender


def _network(path: Path, name: str, entry: registry.Entry) -> "keras.Model":
    from dgmd_pipeline import model

    try:
        return model.load(path)
    except PipelineError as error:
        reason = str(error.__cause__).strip().split("\n")[0].replace(str(path), path.name)
        raise PipelineError(
            f"{name} version {entry.version} is damaged in the registry, it cannot be loaded ({reason}). Train a "
            "new one, or take another version."
        ) from error


def _reviewed(
    values: "Settings",
    store: registry.Store,
    entry: registry.Entry,
    candidate: "Contender",
    now: registry.Entry | None,
    folder: Path,
) -> "Review":
    """Return what the version's run found out; anew where production is another by now, or something is missing."""
    from dgmd_pipeline import review

    name = tasks.EvaluateModel.name
    for file in (review.COMPARISON, review.ASSESSMENT):
        if registry.artifact(store, entry, f"{name}/{file}", folder) is None:
            return review.Review(None, "", None, f"The run of version {entry.version} holds no {name}/{file}.")
    known = review.read(folder / name)
    if now is None or (known.comparison or {}).get("run") != now.run_id:
        of_another = ("latency_ratio", "production_latency_p50_ms", "production_bytes", "size_ratio")
        alone = known.assessment and {key: value for key, value in known.assessment.items() if key not in of_another}
        earlier = f"version {known.comparison['version']}" if known.comparison else "no version"
        missing = now and (
            f"Version {entry.version} was compared with {earlier}, production is version {now.version}, and there are "
            f"no validation records in {values.data_dir} to compare them on."
        )
        known = review.Review(None, missing or "", alone, known.untried)
    pictures = None if known.assessment and not known.missing else tasks.validation(values)
    if pictures is None:
        return known
    log.info("%s ...", f"Production is version {now.version}: comparing" if now else "Trying the model in a process")
    try:
        there = tasks.contender(store, values.model_name, now, folder / str(now.version)) if now else None
        found = review.review(candidate, there, pictures, folder)
    except PipelineError as error:  # production is an older pipeline's, say; --force replaces it
        return known._replace(missing=str(error))
    if found.assessment and known.assessment:  # what was measured against the training itself stays true
        kept = {name: known.assessment[name] for name in ("predictions_equal", "largest_difference")}
        found = found._replace(assessment=found.assessment | kept)
    return found


def _print_review(
    name: str, entry: registry.Entry, other: int | None, known: "Review", gates: Sequence[comparison.Gate]
) -> None:
    """Print what is known of a version beside another."""
    rows: list[Sequence[str]] = [("", f"version {entry.version}", f"version {other}" if other else "", "")]
    if found := known.comparison:
        interval = f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
        rows.append((
            "accuracy", f"{found['accuracy']:.4f}", f"{found['production_accuracy']:.4f}",
            f"{100 * found['difference']:+.1f} points ({interval})",
        ))  # fmt: skip
        rows.append(("images", f"{found['images']:,}", "", f"{found['gained']:,} gained, {found['lost']:,} lost"))
    else:
        rows.append(("accuracy", entry.tags.get("dgmd.validation_accuracy", ""), "", ""))
    if tried := known.assessment:
        timed = tried.get("latency_ratio")
        rows.append((
            "one picture", f"{tried['latency_p50_ms']:.0f} ms",
            f"{tried['production_latency_p50_ms']:.0f} ms" if timed else "", f"{timed:.2f} times" if timed else "",
        ))  # fmt: skip
        rows.append((
            "size", human(tried["bytes"]), human(tried["production_bytes"]) if timed else "",
            f"{tried['size_ratio']:.2f} times" if timed else "",
        ))  # fmt: skip
        rows.append(("memory", human(tried["peak_memory_bytes"]), "", ""))
        rows.append(("load", f"{tried['load_seconds']:.1f} s", "", ""))
    print(f"{name} version {entry.version}, run {entry.run_id}")
    _print_table(rows)
    for row in (found or {}).get("classes", ()):
        if row["gained"] or row["lost"]:
            print(
                f"  {row['label']}: {row['production_recall']:.0%} -> {row['recall']:.0%} of {row['images']:,} "
                f"({row['gained']:,} gained, {row['lost']:,} lost)"
            )
    for kind in ("here", "there"):
        if labels := (found or {}).get(f"labels_only_{kind}"):
            version = entry.version if kind == "here" else other
            print(f"  only version {version} knows: {', '.join(labels)}")
    for gate in gates:
        state = {True: "holds", False: "FAILS", None: "-"}[gate.passed]
        print(f"  {gate.name:11} {state:6} {gate.text}")


def _ask(question: str, yes: bool) -> None:
    """Go on where the answer is yes. Raises Refused where it is not, SettingsError where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError(f"{question} Nobody can be asked here: give --yes.")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # stdout may be JSON for somebody else
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("Nothing was changed.")


@contextmanager
def _scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="dgmd-") as folder:
        yield Path(folder)


def _say(text: str, as_json: bool, **values: Any) -> None:
    if as_json:
        _print_json(values)
    else:
        print(text)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    print(*_table(rows), sep="\n")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
