"""Folders that lie: a manifest changed and signed again, a header written by an enemy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[dict[str, Any]], object]


def change_manifest(folder: Path, change: Change, *, version: int = 1) -> None:
    """Change the manifest and give it a digest that fits."""
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    for name in ("format", "version", "digest"):
        del document[name]
    change(document)
    content = json.dumps(document).removeprefix("{").encode()
    digest = hashlib.sha256(content).hexdigest()
    first = f'{{"format":"moepack","version":{version},"digest":"{digest}",\n'
    path.write_bytes(first.encode() + content)


def change_header(folder: Path, shard: str, change: Change) -> None:
    """Change a shard's header, keep its length, and make the manifest believe it."""
    path = folder / shard
    data = path.read_bytes()
    size_bytes = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size_bytes])
    change(document)
    text = json.dumps(document, separators=(",", ":")).encode().ljust(size_bytes)
    assert len(text) == size_bytes
    write_header(folder, shard, data[:8] + text)


def write_header(folder: Path, shard: str, header: bytes) -> None:
    """Replace the first bytes of a shard, and make the manifest believe them."""
    path = folder / shard
    data = path.read_bytes()
    path.write_bytes(header + data[len(header) :])

    def believe(document: dict[str, Any]) -> None:
        entry = next(item for item in document["shards"] if item["path"] == shard)
        entry["header_sha256"] = hashlib.sha256(header).hexdigest()

    change_manifest(folder, believe)
