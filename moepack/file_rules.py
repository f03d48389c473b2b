"""The rules of a packed folder that take its files, and none of its weights, to check.

Are the files that the manifest names there, inside the folder, as long as declared? Do the index
and each shard's safetensors header agree? Each broken rule has its own error. The rules of the
manifest alone are in :mod:`moepack.index_rules`.
"""

from __future__ import annotations

import hashlib
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from moepack.errors import (
    PackFormatError,
    SegmentBoundsError,
    SegmentOverlapError,
    TruncatedShardError,
    UnsafePathError,
)
from moepack.index_rules import check_plausible, require
from moepack.manifest import TRUNK_FILE, AuxiliaryEntry, Manifest, ShardEntry
from moepack.safetensors_io import PAD_PREFIX, TensorSpan, parse_header, read_header
from moepack.segments import ALIGNMENT_BYTES, SegmentTensor, align_up


def safe_path(folder: Path, relative: str) -> Path:
    """Where a path of the manifest leads: inside the folder, or nowhere.

    Parameters
    ----------
    folder
        Absolute, without links.

    Raises
    ------
    UnsafePathError
        When the path is absolute, climbs, is not spelled plainly, or is a link out of the folder.
    """
    pure = PurePosixPath(relative)
    plain = relative.isprintable() and "\\" not in relative and str(pure) == relative
    if not plain or pure.is_absolute() or ".." in pure.parts or not pure.name:
        raise UnsafePathError(
            f"{folder}: the manifest names the file {relative!r}, expected a plain path inside "
            "the folder; do not use this folder"
        )
    path = folder / pure
    try:
        target = path.resolve()
    except RuntimeError:  # a loop of links, as Python 3.11 and 3.12 report it
        raise UnsafePathError(f"{path}: a link to itself; do not use this folder") from None
    if not target.is_relative_to(folder):
        raise UnsafePathError(
            f"{path}: a link to {target}, expected a file inside the folder; do not use this folder"
        )
    return path


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every file that the manifest names is inside the folder, and as long as declared.

    Raises
    ------
    UnsafePathError, DeclaredSizeError, TruncatedShardError, PackFormatError
    """
    files: tuple[ShardEntry | AuxiliaryEntry, ...] = (*manifest.shards, *manifest.auxiliary)
    paths = {item.path: safe_path(folder, item.path) for item in files}
    require(len(paths) == len(files), "a file is listed twice")
    check_plausible("the folder", sum(item.size_bytes for item in files))
    for item in files:
        path = paths[item.path]
        try:
            status = path.stat()
        except FileNotFoundError:
            raise PackFormatError(f"{path}: missing; pack again") from None
        if not stat.S_ISREG(status.st_mode):
            raise PackFormatError(f"{path}: not a regular file; pack again")
        if status.st_size != item.size_bytes:
            raise TruncatedShardError(
                f"{path}: {status.st_size} bytes, the index says {item.size_bytes}"
                f"{_first_lost(manifest, item.path, status.st_size)}; pack again"
            )


def _first_lost(manifest: Manifest, name: str, size_bytes: int) -> str:
    """Which segment a shortened shard loses first, for the message."""
    lost = [
        (entry.offset_bytes, str(entry.id))
        for entry in manifest.entries()
        if entry.path == name and entry.offset_bytes + entry.stored_bytes > size_bytes
    ]
    return f" (lost from {min(lost)[1]} on)" if lost else ""


class _Block(NamedTuple):
    """What the index says of an aligned run of tensors: a segment, or one trunk tensor."""

    what: str
    prefix: str
    offset_bytes: int
    size_bytes: int
    tensors: tuple[SegmentTensor, ...]

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + align_up(self.size_bytes)

    def spans(self, data_bytes: int) -> Iterator[TensorSpan]:
        """Its tensors as the header has to list them, in a file whose data is at data_bytes."""
        start_bytes = self.offset_bytes - data_bytes
        ends = [tensor.offset_bytes for tensor in self.tensors[1:]] + [self.size_bytes]
        for tensor, end_bytes in zip(self.tensors, ends, strict=True):
            yield TensorSpan(
                self.prefix + tensor.name,
                tensor.dtype,
                tensor.shape,
                start_bytes + tensor.offset_bytes,
                start_bytes + end_bytes,
            )


def _blocks(manifest: Manifest) -> dict[str, list[_Block]]:
    """What the index says of each shard, by its path."""
    blocks: defaultdict[str, list[_Block]] = defaultdict(list)
    for info in manifest.trunk_tensors():
        tensors = (SegmentTensor(info.name, info.dtype, info.shape, 0),)
        blocks[TRUNK_FILE].append(
            _Block(f"trunk tensor {info.name}", "", info.offset_bytes, info.size_bytes, tensors)
        )
    for entry in manifest.entries():
        prefix = f"layers.{entry.id.layer}.experts.{entry.id.expert}."
        blocks[entry.path].append(
            _Block(str(entry.id), prefix, entry.offset_bytes, entry.size_bytes, entry.shape.tensors)
        )
    return blocks


def check_shards(folder: Path, manifest: Manifest) -> None:
    """The index stays inside each shard and agrees with its safetensors header.

    The headers are read, the data is not. The sizes of the files are those declared
    (:func:`check_files`).

    Raises
    ------
    SegmentBoundsError, SegmentOverlapError, DeclaredSizeError, TruncatedShardError, PackFormatError
    """
    blocks = _blocks(manifest)
    listed = {shard.path for shard in manifest.shards}
    for name in blocks:
        require(name in listed, f"{name} holds segments and is not listed as a shard")
    for shard in manifest.shards:
        path = folder / shard.path
        placed = sorted(blocks.get(shard.path, ()), key=lambda block: block.offset_bytes)
        _check_bounds(path, placed, shard.header_bytes, shard.size_bytes)
        header = read_header(path)
        if len(header) != shard.header_bytes:
            raise PackFormatError(
                f"{path}: its data starts at {len(header)}, the index says {shard.header_bytes}; "
                "pack again"
            )
        if hashlib.sha256(header).hexdigest() != shard.header_sha256:
            raise PackFormatError(f"{path}: its header does not match its digest; pack again")
        spans = parse_header(header, path)
        if spans and spans[-1].end_bytes != shard.size_bytes - shard.header_bytes:
            raise PackFormatError(
                f"{path}: its header describes {spans[-1].end_bytes} bytes of data, it holds "
                f"{shard.size_bytes - shard.header_bytes}; pack again"
            )
        _check_agreement(path, placed, spans, shard.header_bytes)


def _check_bounds(path: Path, placed: Iterable[_Block], header_bytes: int, size_bytes: int) -> None:
    end_bytes = header_bytes
    before = "the header"
    for block in placed:
        at = f"{path}: {block.what} is at {block.offset_bytes}..{block.end_bytes}"
        if block.offset_bytes % ALIGNMENT_BYTES:
            raise SegmentBoundsError(
                f"{at}, expected a multiple of {ALIGNMENT_BYTES}; do not use this folder"
            )
        if block.offset_bytes < header_bytes or block.end_bytes > size_bytes:
            raise SegmentBoundsError(
                f"{at}, expected it within {header_bytes}..{size_bytes}; do not use this folder"
            )
        if block.offset_bytes < end_bytes:
            raise SegmentOverlapError(
                f"{at}, but {before} ends at {end_bytes}; do not use this folder"
            )
        end_bytes = block.end_bytes
        before = block.what


def _check_agreement(
    path: Path, placed: Iterable[_Block], spans: Iterable[TensorSpan], data_bytes: int
) -> None:
    found = {span.name: span for span in spans}
    for block in placed:
        for expected in block.spans(data_bytes):
            got = found.pop(expected.name, None)
            if got != expected:
                raise PackFormatError(
                    f"{path}: {block.what}: the header lists {_describe(got)}, the index "
                    f"{_describe(expected)}; pack again"
                )
    for name, span in found.items():
        if not name.startswith(PAD_PREFIX) or span.dtype != "U8":
            raise PackFormatError(
                f"{path}: holds the tensor {name} that the index does not list; pack again"
            )


def _describe(span: TensorSpan | None) -> str:
    if span is None:
        return "nothing"
    return f"{span.name} {span.dtype}{list(span.shape)} at {span.begin_bytes}..{span.end_bytes}"
