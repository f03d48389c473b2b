"""A hub on loopback: as much of the Hugging Face hub's API as its real client needs.

It serves folders as repositories, counts what it sends, and misbehaves on request.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """What is served, and what has been."""

    repositories: dict[str, Path] = dataclasses.field(default_factory=dict)
    #: Repositories that exist, and that this user may not read.
    gated: set[str] = dataclasses.field(default_factory=set)
    #: File to the number of bytes after which the first longer answer is cut.
    cut_once: dict[str, int] = dataclasses.field(default_factory=dict)
    ignore_ranges: bool = False
    endpoint: str = ""
    sent_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    ranges: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Count from zero."""
        with self.lock:
            self.sent_bytes.clear()
            self.ranges.clear()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port, until the block is left."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
            self._tree(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._error(404, "RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _repository(self, name: str) -> Path | None:
        if name in self.hub.gated:
            self._error(403, "GatedRepo")
            return None
        if name not in self.hub.repositories:
            self._error(404, "RepoNotFound")
            return None
        return self.hub.repositories[name]

    def _info(self, name: str) -> None:
        folder = self._repository(name)
        if folder is None:
            return
        siblings = [
            {"rfilename": path.name, "size": path.stat().st_size, **_digests(path, "sha256")}
            for path in sorted(folder.iterdir())
        ]
        data = {"id": name, "modelId": name, "sha": COMMIT, "tags": [], "siblings": siblings}
        self._json({**data, "private": False, "downloads": 0, "likes": 0})

    def _tree(self, name: str) -> None:
        folder = self._repository(name)
        if folder is None:
            return
        files = []
        for path in sorted(folder.iterdir()):
            digests = _digests(path, "oid")
            entry = {"type": "file", "path": path.name, "size": path.stat().st_size}
            files.append({**entry, "oid": digests["blobId"], "lfs": digests["lfs"]})
        self._json(files)

    def _json(self, data: object) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send("api", body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str, file: str) -> None:
        folder = self._repository(name)
        if folder is None:
            return
        path = folder / file
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        size = path.stat().st_size
        start, stop = 0, size
        wanted = self.headers.get("Range")
        if wanted and not self.hub.ignore_ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(size, int(last) + 1) if last else size
            with self.hub.lock:
                self.hub.ranges.append((file, wanted))
        self.send_response(206 if wanted and not self.hub.ignore_ranges else 200)
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as stream:
            stream.seek(start)
            body = stream.read(stop - start)
        with self.hub.lock:
            cut = len(body) > self.hub.cut_once.get(file, size)
            limit = self.hub.cut_once.pop(file) if cut else size
        self._send(file, body[:limit])
        if cut:
            self.close_connection = True

    def _send(self, what: str, body: bytes) -> None:
        if self.command == "HEAD":
            return
        for start in range(0, len(body), 1 << 20):
            piece = body[start : start + (1 << 20)]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent_bytes[what] += len(piece)


@functools.cache
def _etag(path: Path) -> str:
    """Weights are kept as large files, by their SHA-256; the others by what git calls them."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _digests(path: Path, key: str) -> dict[str, object]:
    """As the hub's answers list them; ``key`` is what that answer calls the SHA-256."""
    if path.suffix != ".safetensors":
        return {"blobId": _etag(path), "lfs": None}
    lfs = {key: _etag(path), "size": path.stat().st_size, "pointerSize": 134}
    return {"blobId": "0" * 40, "lfs": lfs}
