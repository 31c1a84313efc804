"""A network between two processes that can be cut. Then nothing arrives, and no connection is closed."""

import contextlib
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def proxy(address: str) -> Iterator[tuple[str, threading.Event]]:
    """Give an address that forwards to `address` (tcp://host:port), and an event. Until it is set, nothing arrives."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    flowing, sockets = threading.Event(), []
    flowing.set()
    server = socket.create_server(("127.0.0.1", 0))

    def forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                flowing.wait()
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = server.accept()[0], socket.create_connection((host, int(port)))
                sockets.extend(pair)
                for ends in (pair, pair[::-1]):
                    threading.Thread(target=forward, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}", flowing
    finally:
        flowing.set()
        for each in (server, *sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
