"""Checking a packed folder: every byte against its digest, or against zero.

The structure is checked by opening the folder, with an error of its own for each broken rule. Then
everything that is wrong with the bytes is collected, so that one pass names all damage.

Peak memory: one chunk of 4 MiB for each thread.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moepack.errors import DamagedSegmentError, PlanError
from moepack.formats import PackedModel
from moepack.manifest import MANIFEST_FILE, PLAN_FILE, TRUNK_FILE
from moepack.progress import NO_PROGRESS, Progress
from moepack.records import record

_CHUNK_BYTES = 4 << 20
_MAX_THREADS = 4


@record
class Damage:
    """Something that is not as it was packed.

    Attributes
    ----------
    path : str
        The file, relative to the folder.
    what : str
        The segment or tensor, as people call it: ``layer 3, expert 17, top (base)``.
    reason : str
        How it differs.
    """

    path: str
    what: str
    reason: str


@record
class VerifyReport:
    """What was checked and what was found. ``extra_files`` do no harm: nothing reads them."""

    folder: str
    size_bytes: int
    segments: int
    trunk_tensors: int
    duration_s: float
    damages: tuple[Damage, ...]
    extra_files: tuple[str, ...]

    def raise_if_damaged(self) -> None:
        """Turn damage into an error.

        Raises
        ------
        DamagedSegmentError
            Naming what is damaged first, and how much more there is.
        """
        if not self.damages:
            return
        first = self.damages[0]
        more = f", and {len(self.damages) - 1} more" if len(self.damages) > 1 else ""
        raise DamagedSegmentError(
            f"{self.folder}/{first.path}: {first.what}: {first.reason}{more}; "
            "pack again (what is whole is reused)"
        )


def verify(folder: Path, *, progress: Progress = NO_PROGRESS) -> VerifyReport:
    """Check every byte of a packed folder.

    Raises
    ------
    PackError
        When the folder's structure is broken: see :meth:`PackedModel.open`.
    """
    started_s = time.perf_counter()
    model = PackedModel.open(folder)
    manifest = model.manifest
    sizes_bytes = {item.path: item.size_bytes for item in manifest.shards}
    sizes_bytes |= {item.path: item.size_bytes for item in manifest.auxiliary}
    size_bytes = sum(sizes_bytes.values())
    damages: list[Damage] = []
    progress.start(f"verify {model.folder.name}", size_bytes)
    try:
        for path in sizes_bytes:
            damages += damages_in(model, path, progress)
    finally:
        progress.done()
    try:
        model.plan()
    except PlanError as failure:
        damages.append(Damage(PLAN_FILE, "the plan", str(failure)))
    known = {MANIFEST_FILE, PLAN_FILE, *sizes_bytes}
    return VerifyReport(
        folder=str(model.folder),
        size_bytes=size_bytes,
        segments=len(model.entries),
        trunk_tensors=len(model.trunk),
        duration_s=time.perf_counter() - started_s,
        damages=tuple(damages),
        extra_files=tuple(name for name in _files(model.folder) if name not in known),
    )


def damages_in(
    model: PackedModel, path: str, progress: Progress = NO_PROGRESS
) -> tuple[Damage, ...]:
    """Everything that is wrong with one file of an opened folder.

    Its size, and the header of a shard, were checked when the folder was opened.
    """
    regions = _regions(model, path)
    damages: list[Damage] = []
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max_workers=threads)
    with (model.folder / path).open("rb", buffering=0) as file:
        try:
            checks = pool.map(lambda region: _check(file.fileno(), region), regions)
            for region, reason in zip(regions, checks, strict=True):
                if reason is not None:
                    damages.append(Damage(path, region.what, reason))
                progress.advance(region.end_bytes - region.begin_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
    return tuple(damages)


class _Region(NamedTuple):
    """Bytes of a file: a payload with its digests, or padding (``sha256`` None) of zeros."""

    what: str
    begin_bytes: int
    end_bytes: int
    crc32: int | None = None
    sha256: str | None = None


def _regions(model: PackedModel, path: str) -> list[_Region]:
    """A file from end to end."""
    for item in model.manifest.auxiliary:
        if item.path == path:
            return [_Region("the whole file", 0, item.size_bytes, None, item.sha256)]
    shard = next(item for item in model.manifest.shards if item.path == path)
    regions = [_Region("the header", 0, shard.header_bytes, None, shard.header_sha256)]
    for payload in sorted(_payloads(model, path), key=lambda region: region.begin_bytes):
        regions += [*_padding(regions[-1], payload.begin_bytes), payload]
    return [*regions, *_padding(regions[-1], shard.size_bytes)]


def _payloads(model: PackedModel, path: str) -> Iterator[_Region]:
    if path == TRUNK_FILE:
        for tensor in model.trunk:
            end_bytes = tensor.offset_bytes + tensor.size_bytes
            what = f"trunk tensor {tensor.name}"
            yield _Region(what, tensor.offset_bytes, end_bytes, tensor.crc32, tensor.sha256)
    for entry in model.entries.values():
        if entry.path == path:
            end_bytes = entry.offset_bytes + entry.size_bytes
            yield _Region(str(entry.id), entry.offset_bytes, end_bytes, entry.crc32, entry.sha256)


def _padding(before: _Region, end_bytes: int) -> Iterable[_Region]:
    if before.end_bytes < end_bytes:
        yield _Region(f"the padding after {before.what}", before.end_bytes, end_bytes)


def _check(handle: int, region: _Region) -> str | None:
    """Why a region is damaged; None where it is whole."""
    sha256 = hashlib.sha256()
    crc32 = 0
    zero = True
    try:
        for chunk in _chunks(handle, region.begin_bytes, region.end_bytes):
            if region.sha256 is None:
                zero = zero and not chunk.strip(b"\0")
            else:
                sha256.update(chunk)
                crc32 = zlib.crc32(chunk, crc32) if region.crc32 is not None else 0
    except EOFError:
        return "the file ends inside it"
    except OSError as failure:
        return f"cannot be read: {failure.strerror}"
    if region.sha256 is None:
        return None if zero else "holds something other than zeros"
    if sha256.hexdigest() != region.sha256:
        return "its bytes do not match their SHA-256"
    if region.crc32 is not None and crc32 != region.crc32:
        return "its bytes match their SHA-256 and not their CRC-32: the index is wrong"
    return None


def _chunks(handle: int, begin_bytes: int, end_bytes: int) -> Iterator[bytes]:
    while begin_bytes < end_bytes:
        chunk = os.pread(handle, min(_CHUNK_BYTES, end_bytes - begin_bytes), begin_bytes)
        if not chunk:
            raise EOFError
        yield chunk
        begin_bytes += len(chunk)


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
