"""A private certificate authority, and TLS in front of servers that speak HTTP."""

import contextlib
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit


class Authority:
    """A private certificate authority and the certificate of a server at 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.certificate = folder / "ca.pem"
        self._make("/CN=a private authority", folder / "ca.key", self.certificate)
        signed = ("-CA", self.certificate, "-CAkey", folder / "ca.key")
        server = folder / "server.pem"
        names = ("subjectAltName=IP:127.0.0.1", "basicConstraints=critical,CA:FALSE")
        self._make("/CN=a server", folder / "server.key", server, *signed, *(f"-addext={name}" for name in names))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server, folder / "server.key")

    @staticmethod
    def _make(subject: str, key: Path, certificate: Path, *options: object) -> None:
        key_type = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key)
        files = ("-subj", subject, "-days", "2", "-out", certificate)
        subprocess.run(["openssl", "req", "-x509", *key_type, *files, *options], check=True, capture_output=True)

    @contextlib.contextmanager
    def in_front_of(self, url: str) -> Iterator[str]:
        """Provide an address. What is sent to it is decrypted and forwarded to an HTTP server."""
        server = urlsplit(url)
        context = self._context

        class Connection(socketserver.BaseRequestHandler):
            def handle(self):
                with (
                    contextlib.suppress(OSError),  # of a client that does not trust the certificate, or hangs up
                    context.wrap_socket(self.request, server_side=True) as client,
                    socket.create_connection((server.hostname, server.port)) as behind,
                ):
                    back = threading.Thread(target=copy, args=(behind, client), daemon=True)
                    back.start()
                    copy(client, behind)
                    back.join()

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection) as proxy:
            proxy.daemon_threads = True
            threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            yield f"https://127.0.0.1:{proxy.server_address[1]}"
            proxy.shutdown()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on what one side sends, and that it has sent everything."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
