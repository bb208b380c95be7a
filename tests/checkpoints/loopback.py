"""A server on this machine that stands for the Hugging Face hub and for a release page.

It speaks as much of the hub's protocol as a download needs: a HEAD request that answers with the
commit, the length and the SHA-256 of a large file, and a redirect to where the bytes are. Paths
that begin with ``/plain/`` are an ordinary web server's. What goes wrong is set for each file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: Contents by name.
        faults: By name, ``'short'``: the connection ends after half; ``'chunk'``: in the middle
            of a chunk; ``'damaged'``: one byte is another one; absent: none.
        requests: Method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        """Scheme, host and port."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """The headers of `do_GET`."""
        self._answer()

    def do_GET(self) -> None:
        """A file, a redirect to it, or 404."""
        self._answer()

    def _answer(self) -> None:
        self.server.requests.append((self.command, self.path))
        name = self.path.rpartition("/")[2].partition("?")[0]
        on_hub = "/resolve/" in self.path
        content = self.server.files.get(name)
        if content is None:
            self.send_response(404)
            if on_hub:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("X-Error-Code", "EntryNotFound")
            self._end(b"")
        elif on_hub:
            self.send_response(302)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
            # Large files are kept on another host, which the hub's client takes note of.
            storage = f"http://localhost:{self.server.server_port}/storage/{name}"
            self.send_header("Location", storage)
            self._end(b"")
        elif self.path.startswith("/moved/"):
            self.send_response(301)
            self.send_header("Location", f"{self.server.address}/plain/{name}")
            self._end(b"")
        else:
            self._send(content, self.server.faults.get(name, ""))

    def _send(self, content: bytes, fault: str) -> None:
        if fault == "damaged":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault == "chunk":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(f"{len(content):x}\r\n".encode() + content[: len(content) // 2])
            self.close_connection = True
            return
        # A client that takes up where it was cut off gets no further than before.
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].partition("-")[0])
        end = len(content) // 2 if fault == "short" else len(content)
        self.send_response(206 if start else 200)
        if start:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self._end(content[start:], sent=max(end - start, 0))
        self.close_connection = True

    def _end(self, content: bytes, sent: int | None = None) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])


@contextmanager
def serve() -> Iterator[Server]:
    """A running server."""
    with Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
