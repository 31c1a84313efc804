"""A minimal S3 endpoint in a separate process: listings and objects of a local folder.

It answers `ListObjectsV2` and `GetObject` (also with a range) without authentication, and sends files by `sendfile`. A
complete server would dominate the measurement on two cores. Like S3 for objects uploaded since December 2024, it sends
the checksum CRC-64/NVME to a client that asks for checksums.
"""

import base64
import hashlib
import multiprocessing
import os
import socketserver
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from awscrt import checksums

BUCKET, PREFIX = "benchmark", "images"
PAGE = 1000
VARIABLES = {
    "AWS_DATA_BUCKET": BUCKET,
    "AWS_DATA_PATH": PREFIX,
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 512
    folder: Path
    objects: list[tuple[str, int]]  # key below the prefix, bytes
    etags: dict[Path, str]  # with quotes
    checksums: dict[Path, str]  # CRC-64/NVME, base64


class _Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        with suppress(ConnectionError):  # clients may close the connection at any time
            self._answer()

    def _answer(self) -> None:
        while words := self.rfile.readline().split():
            headers = {}
            while (line := self.rfile.readline()).strip():
                name, _, value = line.partition(b":")
                headers[name.strip().lower()] = value.strip()
            url = urlsplit(words[1].decode())
            key = unquote(url.path).removeprefix(f"/{BUCKET}").lstrip("/")
            if key:
                self._send_object(self.server.folder / key.removeprefix(f"{PREFIX}/"), headers)
            else:
                self._send("200 OK", self._page(parse_qs(url.query)))

    def _send(self, status: str, body: bytes, *more: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/xml", *more]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)

    def _send_object(self, path: Path, headers: dict[bytes, bytes]) -> None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            self._send("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>")
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            first, last = 0, size - 1
            status, more = "200 OK", ""
            if headers.get(b"x-amz-checksum-mode") == b"ENABLED":
                more = f"x-amz-checksum-crc64nvme: {self.server.checksums[path]}\r\n"
            if span := headers.get(b"range"):
                start, _, end = span.removeprefix(b"bytes=").partition(b"-")
                first, last = int(start), min(int(end or last), last)
                status, more = "206 Partial Content", f"Content-Range: bytes {first}-{last}/{size}\r\n"
            self.wfile.write(
                f"HTTP/1.1 {status}\r\nContent-Length: {last - first + 1}\r\nETag: {self.server.etags[path]}\r\n{more}"
                "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: image/jpeg\r\n\r\n".encode()
            )
            while first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last - first + 1)

    def _page(self, query: dict[str, list[str]]) -> bytes:
        first = int(query.get("continuation-token", ["0"])[0])
        last = first + int(query.get("max-keys", [PAGE])[0])
        more = last < len(self.server.objects)
        encoded = quote if "encoding-type" in query else escape
        items = "".join(
            f"<Contents><Key>{encoded(f'{PREFIX}/{key}')}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{self.server.etags[self.server.folder / key]}</ETag><Size>{size}</Size></Contents>"
            for key, size in self.server.objects[first:last]
        )
        encoding = "<EncodingType>url</EncodingType>" if "encoding-type" in query else ""
        token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
        return (
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{BUCKET}'
            f"</Name>{encoding}<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}"
            "</ListBucketResult>"
        ).encode()


def _serve(folder: Path, port: "multiprocessing.Queue[int]") -> None:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        files = [path for path in folder.glob("*/**/*") if path.is_file()]
        server.folder = folder
        server.etags, server.checksums = {}, {}
        for path in files:
            content = path.read_bytes()
            server.etags[path] = f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
            server.checksums[path] = base64.b64encode(checksums.crc64nvme(content).to_bytes(8, "big")).decode()
        server.objects = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)
        port.put(server.server_address[1])
        server.serve_forever()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the files below `folder` as objects of BUCKET below PREFIX, and provide the endpoint's URL."""
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=_serve, args=(folder, port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get(timeout=60)}"
    finally:
        process.terminate()
