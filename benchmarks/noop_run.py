"""The cost of a run with nothing to do, and how it grows with the data.

A tiny pipeline runs to its end once. Then its manifests are extended to N rows, while the records of the steps stay
unchanged, and `python pipeline.py` runs again. The CPU time of the process is compared with `import tensorflow`. The
same is measured with N external files in raw/, which the run has to walk, and with REFRESH=true and an endpoint that
lists N objects.

    python -m benchmarks.noop_run [--rows 1000 100000] [--repeats 3]
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
from PIL import Image

from benchmarks import measure
from dgmd_pipeline import manifest
from dgmd_pipeline.workflow import success_file

PIPELINE = Path(__file__).parent.parent / "pipeline.py"
NOTHING = "Nothing to do: dgmd_model version 1 is registered."
LABELS = 24
SIZE = 54 + 24 * 24 * 3  # bytes of a BMP of 24 x 24 pixels
PAGE = 1000  # objects on a page of an S3 listing


def source(number: int) -> manifest.SourceObject:
    path = f"label {number % LABELS:02d}/label shop_{number:07d}.jpeg"
    return manifest.SourceObject(f"p/{path}", SIZE, f"{number:032x}-2", path)  # of two parts: no MD5 sum


def sources(count: int) -> list[manifest.SourceObject]:
    return sorted(map(source, range(count)), key=lambda each: each.path)


def extend(data_dir: Path, rows: int) -> None:
    """Extend the manifests of a finished run to `rows` rows, and raw/ to as many sparse files."""
    objects = sources(rows)
    for path in (data_dir / "raw" / each.path for each in objects):
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.truncate(SIZE)
    images = [
        manifest.Image(each.path, each.path[:8], f"{n:064x}", "JPEG", 640, 480, f"{n:064x}")
        for n, each in enumerate(objects)
    ]
    examples = [manifest.Example(i.path, i.label, n % LABELS, i.sha256, i.group) for n, i in enumerate(images)]
    cut = len(examples) * 4 // 5
    manifest.write(data_dir / "raw" / "listing.csv", manifest.SourceObject, objects)
    manifest.write(data_dir / "inspected" / "images.csv", manifest.Image, images)
    manifest.write(data_dir / "balanced" / "images.csv", manifest.Example, examples)
    manifest.write(data_dir / "split" / "training.csv", manifest.Example, examples[:cut])
    manifest.write(data_dir / "split" / "validation.csv", manifest.Example, examples[cut:])


def add_external_files(data_dir: Path, files: int) -> None:
    """Add files to the external raw/ of a finished run, and update its records as if it had been made from them."""
    raw = data_dir / "raw"
    for path in (raw / source(number).path for number in range(files)):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    fingerprint = success_file.walk(raw).fingerprint
    for path in data_dir.glob("*/_SUCCESS"):
        record = json.loads(path.read_text())
        if "raw" in record["inputs"]:
            record["inputs"]["raw"] = fingerprint
            path.write_text(json.dumps(record))


def image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (24, 24, 3), np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


class Bucket(BaseHTTPRequestHandler):
    """An endpoint with one bucket of tiny images."""

    protocol_version = "HTTP/1.1"
    objects: list[manifest.SourceObject]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        body = self.page(parse_qs(url.query)) if url.path.count("/") == 1 else image(int(url.path[-12:-5]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def page(self, query: dict[str, list[str]]) -> bytes:
        first = int(query.get("continuation-token", ["0"])[0])
        last = min(first + PAGE, len(self.objects))
        more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < len(self.objects) else ""
        items = "".join(
            f"<Contents><Key>{quote(each.key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{each.etag}&quot;</ETag><Size>{each.size}</Size></Contents>"
            for each in self.objects[first:last]
        )
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{items}"
            "</ListBucketResult>"
        ).encode()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    def cpu(*words: object, says: str = "", **variables: object) -> float:
        return measure.run(sys.executable, *words, says=says, **variables).seconds

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tiny = {"BACKBONE": "cnn", "IMAGE_WIDTH": 16, "IMAGE_HEIGHT": 16, "NUM_SHARDS": 1, "EPOCHS": 1}
    place = {"AWS_DATA_BUCKET": "bucket", "AWS_DATA_PATH": "p", "AWS_EC2_METADATA_DISABLED": "true"}
    variables = tiny | place | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    rows_of: dict[int, dict[str, list[float]]] = {rows: defaultdict(list) for rows in options.rows}
    with tempfile.TemporaryDirectory() as name:
        fetched, own = Path(name, "fetched"), Path(name, "own")
        Bucket.objects = sources(4 * LABELS)
        cpu(PIPELINE, says="version 1, non-production", **variables, DATA_DIR=fetched)
        shutil.copytree(fetched / "raw", own / "raw")
        (own / "raw" / "_SUCCESS").unlink()
        cpu(PIPELINE, says="version 1, non-production", **variables, DATA_DIR=own)
        for rows, seconds in rows_of.items():
            Bucket.objects = sources(rows)
            extend(fetched, rows)
            add_external_files(own, rows)
            for _ in range(options.repeats):
                seconds["import tensorflow"].append(cpu("-c", "import tensorflow"))
                seconds["nothing to do"].append(cpu(PIPELINE, says=NOTHING, **variables, DATA_DIR=fetched))
                seconds["own raw/"].append(cpu(PIPELINE, says=NOTHING, **variables, DATA_DIR=own))
                seconds["REFRESH"].append(
                    cpu(PIPELINE, says="Nothing new in s3", **variables, DATA_DIR=fetched, REFRESH="true")
                )
    server.shutdown()
    show(rows_of)


def show(rows_of: dict[int, dict[str, list[float]]]) -> None:
    claims = []
    for rows, seconds in rows_of.items():
        for name, goal in (("nothing to do", 0.25), ("own raw/", None), ("REFRESH", None)):
            ratios = measure.ratios(seconds[name], seconds["import tensorflow"])
            figures = " / ".join(measure.median(seconds[each], " s") for each in (name, "import tensorflow"))
            what = f"{name}, {rows:,} rows, CPU of `import tensorflow`'s"
            claims.append(measure.Claim(what, ratios, goal, at_least=False, figures=figures))
    measure.show(*claims)


if __name__ == "__main__":
    main()
