"""A server with as much of S3 as reading takes: GET and HEAD of the files of a folder, with ranges, and what it sent.

It takes a thread of this process for each connection: what is measured are bytes and requests, not times.
"""

import re
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self

__all__ = ["FileServer"]


class FileServer:
    """`with FileServer(folder) as server`: `server.store()` reads the folder's files.

    Args:
        folder: What it serves, as a bucket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock()
        self._bytes = self._gets = 0

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"files": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def store(self) -> Any:
        """A store of obstore, as for S3."""
        from obstore.store import S3Store

        return S3Store(
            "bucket",
            endpoint=f"http://127.0.0.1:{self._server.server_port}",
            region="us-east-1",
            skip_signature=True,
            client_options={"allow_http": True},
        )

    def add(self, nbytes: int) -> None:
        """Count an answer to a GET."""
        with self._lock:
            self._bytes += nbytes
            self._gets += 1

    def counts(self) -> tuple[int, int]:
        """Bytes of the answers to GETs, sent or on their way, and how many these are."""
        with self._lock:
            return self._bytes, self._gets


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        body = self._answer()
        self.files.add(len(body))
        with suppress(ConnectionError):  # whoever asked has gone
            self.wfile.write(body)

    def _answer(self) -> bytes:
        """Send the header; returns the body."""
        path = self.files.folder / self.path.removeprefix("/bucket/").partition("?")[0]
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        begin, end = 0, size
        if asked and asked[1]:
            begin, end = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
        elif asked:
            begin = max(0, size - int(asked[2]))
        with path.open("rb") as file:
            file.seek(begin)
            body = file.read(end - begin)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{size:x}"')
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
