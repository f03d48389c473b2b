"""The rules of the packed folder that can be checked without reading weights.

Two parts: the manifest against itself (does the index describe this model under this layout,
whole?), and the manifest against the files (are they there, inside the folder, as long as declared,
and do their safetensors headers agree with the index?). Each broken rule has its own error.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from moepack.budget import layer_segment
from moepack.errors import (
    DeclaredSizeError,
    PackFormatError,
    SegmentBoundsError,
    SegmentOverlapError,
    TruncatedShardError,
    UnsafePathError,
)
from moepack.manifest import TRUNK_FILE, AuxiliaryEntry, Manifest, SegmentGroup, ShardEntry
from moepack.model_spec import DTYPE_BYTES, ModelSpec
from moepack.safetensors_io import PAD_PREFIX, TensorSpan, parse_header, read_header
from moepack.segments import ALIGNMENT_BYTES, PARTS, SegmentTensor, align_up
from moepack.units import TIB, format_size

_SHA256 = re.compile(r"[0-9a-f]{64}")

#: More than thirty times the largest open model.
MAX_DECLARED_BYTES = 64 * TIB


# The manifest against itself ------------------------------------------------------------------


def check_manifest(manifest: Manifest) -> None:
    """The index describes this model, under this layout, and leaves nothing out.

    Raises
    ------
    DeclaredSizeError
        When the model is larger than any real one.
    PackFormatError
        For every other disagreement.
    """
    spec, layout = manifest.spec, manifest.layout
    _check_sizes(spec)
    _require(layout.model_digest == spec.digest, "the layout is for another model than the spec")
    _require(layout.digest == manifest.layout_digest, "the layout does not match its digest")
    _require(
        tuple(cut.layer for cut in layout.layers) == spec.moe_layers,
        "the layers of the layout are not the layers with experts",
    )
    for cut in layout.layers:
        width = spec.moe(cut.layer).intermediate_size
        _require(cut.encoding in DTYPE_BYTES, f"layer {cut.layer} is encoded as {cut.encoding!r}")
        _require(
            cut.width == width and 0 <= cut.split <= width,
            f"layer {cut.layer} is split at {cut.split} of {cut.width}, its width is {width}",
        )
    _check_groups(manifest)
    names = tuple(tensor.name for tensor in spec.trunk)
    _require(
        tuple(item.name for item in manifest.trunk) == names,
        "the trunk's index does not list the model's trunk tensors in order",
    )
    for digest in _digests(manifest):
        _require(_SHA256.fullmatch(digest) is not None, f"{digest!r} is not a SHA-256")


def _check_sizes(spec: ModelSpec) -> None:
    """Refuse sizes that no model has before anything is computed from them."""
    _require(spec.hidden_size > 0, f"a hidden size of {spec.hidden_size}")
    _require(spec.dtype in DTYPE_BYTES, f"the dtype {spec.dtype!r}")
    for info in spec.trunk:
        _require(info.dtype in DTYPE_BYTES, f"{info.name} has the dtype {info.dtype!r}")
        _require(all(size > 0 for size in info.shape), f"{info.name} has the shape {info.shape}")
        _check_plausible(info.name, info.size_bytes)
    for number in spec.moe_layers:
        moe = spec.moe(number)
        _require(
            moe.num_experts > 0 and moe.intermediate_size > 0,
            f"layer {number} has {moe.num_experts} experts of width {moe.intermediate_size}",
        )
        _check_plausible(f"layer {number}", moe.num_experts * spec.expert_bytes(number))


def _check_groups(manifest: Manifest) -> None:
    """Every expert has its base segments, each once and of the geometry of its layout."""
    spec = manifest.spec
    base = {
        (cut.layer, part): (shape, cut.encoding)
        for cut in manifest.layout.layers
        for part in PARTS
        if (shape := layer_segment(spec, cut, part)) is not None
    }
    experts: defaultdict[tuple[int, str, str], list[int]] = defaultdict(list)
    contents: dict[str, tuple[int, str, str] | None] = {TRUNK_FILE: None}
    for group in manifest.groups:
        what = f"layer {group.layer}, {group.part} ({group.variant})"
        expected = base.get((group.layer, group.part))
        _require(expected is not None, f"{what} is not part of the layout")
        if group.variant == "base":
            _require(
                (group.shape, group.encoding) == expected,
                f"the segments of {what} are not cut as the layout says",
            )
        else:
            _check_shape(what, group)
        key = (group.layer, group.part, group.variant)
        _require(
            contents.setdefault(group.shard, key) == key,
            f"{group.shard} holds {what} and something else",
        )
        experts[key] += [item.expert for item in group.segments]
    for (layer, part, variant), numbers in experts.items():
        known = range(spec.moe(layer).num_experts)
        what = f"layer {layer}, {part} ({variant})"
        _require(len(set(numbers)) == len(numbers), f"{what} lists an expert twice")
        _require(all(number in known for number in numbers), f"{what} lists an unknown expert")
    for layer, part in base:
        missing = spec.moe(layer).num_experts - len(experts[layer, part, "base"])
        _require(missing == 0, f"layer {layer}, {part} lacks {missing} experts")


def _check_shape(what: str, group: SegmentGroup) -> None:
    """The geometry of a variant that the layout does not describe is consistent in itself."""
    shape = group.shape
    starts_bytes = [tensor.offset_bytes for tensor in shape.tensors]
    _require(
        starts_bytes == sorted(starts_bytes)
        and starts_bytes[:1] == [0]
        and starts_bytes[-1] <= shape.size_bytes
        and shape.stored_bytes == align_up(shape.size_bytes),
        f"the tensors of {what} do not fill their segment",
    )


def _digests(manifest: Manifest) -> Iterator[str]:
    yield from (shard.header_sha256 for shard in manifest.shards)
    yield from (item.sha256 for item in manifest.trunk)
    yield from (item.sha256 for item in manifest.auxiliary)
    yield from (item.sha256 for group in manifest.groups for item in group.segments)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise PackFormatError(f"manifest.json: {what}; pack again")


def _check_plausible(what: str, size_bytes: int) -> None:
    if size_bytes > MAX_DECLARED_BYTES:
        raise DeclaredSizeError(
            f"manifest.json: {what} declares {format_size(size_bytes)}, expected at most "
            f"{format_size(MAX_DECLARED_BYTES)} in all; do not use this folder"
        )


# The manifest against the files ---------------------------------------------------------------


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
    _require(len(paths) == len(files), "a file is listed twice")
    _check_plausible("the folder", sum(item.size_bytes for item in files))
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
        _require(name in listed, f"{name} holds segments and is not listed as a shard")
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
