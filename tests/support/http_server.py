"""A local HTTP server that answers as a test says."""

import contextlib
import http.server
import socket
import struct
import threading
from collections.abc import Callable, Iterator

Request = http.server.BaseHTTPRequestHandler


@contextlib.contextmanager
def serve(answer: Callable[[Request], None]) -> Iterator[str]:
    """Call `answer` in a thread for each request, whatever its method, and give the server's URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name):
            if name.startswith("do_"):
                return lambda: answer(self)
            raise AttributeError(name)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # `shutdown` waits for one interval.
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(request: Request, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
    """Answer a request. A `length` larger than the body's truncates the response."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    request.wfile.write(body)
    if length is not None:
        request.close_connection = True


def reset(request: Request) -> None:
    """Answer a request with a reset of the connection."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.close_connection = True
    request.rfile.close()  # the connection is closed with the last file that uses it
    request.connection.close()
