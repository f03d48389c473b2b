"""The shards that a layout consists of, and writing them.

Shards are written in *units* that finish together: the trunk, then each layer's top and bottom,
because an expert is read once and cut into both.

Peak memory: three experts beside what the source holds (the expert being cut, its pieces, and the
segments whose digests are not ready), or one trunk tensor where that is larger.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from moepack.budget import layer_segment
from moepack.manifest import (
    FORMAT_VERSION,
    TRUNK_FILE,
    SegmentGroup,
    SegmentRecord,
    ShardEntry,
    TrunkEntry,
    shard_file,
)
from moepack.model_spec import ModelSpec, TensorInfo
from moepack.plan import LayerLayout, Layout
from moepack.progress import Progress
from moepack.records import record
from moepack.safetensors_io import ShardDraft, draft_shard
from moepack.segments import ALIGNMENT_BYTES, PARTS, Bits, Part, SegmentShape, cut_expert


class Source(Protocol):
    """Where weights come from: :class:`moepack.checkpoint.Checkpoint`, or a test's own."""

    @property
    def spec(self) -> ModelSpec:
        """The model."""

    @property
    def weights_digest(self) -> str:
        """Identity of its weights."""

    @property
    def auxiliary_files(self) -> tuple[Path, ...]:
        """Files to carry along."""

    def trunk_tensor(self, name: str) -> Bits:
        """Bit patterns of a trunk tensor, in the shape that the spec says."""

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        """Bit patterns of a whole expert, by the names of ``segments.EXPERT_TENSORS``."""


class Shard(NamedTuple):
    """One shard to write. ``part`` and ``shape`` are None for the trunk."""

    path: str
    draft: ShardDraft
    part: Part | None
    shape: SegmentShape | None

    @property
    def entry(self) -> ShardEntry:
        """As the manifest lists it."""
        header = self.draft.header
        digest = hashlib.sha256(header).hexdigest()
        return ShardEntry(self.path, self.draft.size_bytes, len(header), digest)


class Unit(NamedTuple):
    """Shards that are finished together. ``cut`` is None for the trunk."""

    cut: LayerLayout | None
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """For the journal and for messages."""
        return "trunk" if self.cut is None else f"layer {self.cut.layer}"

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(shard.draft.size_bytes for shard in self.shards)


@record
class FinishedUnit:
    """What the manifest will say of a unit whose files are written."""

    name: str
    shards: tuple[ShardEntry, ...]
    trunk: tuple[TrunkEntry, ...]
    groups: tuple[SegmentGroup, ...]


def draft_units(spec: ModelSpec, layout: Layout) -> tuple[Unit, ...]:
    """Every shard of a pack, in the order of the manifest: sizes and headers, no data."""
    trunk = draft_shard(([tensor] for tensor in spec.trunk), _metadata(content="trunk"))
    units = [Unit(None, (Shard(TRUNK_FILE, trunk, None, None),))]
    for cut in layout.layers:
        shards = []
        for part in PARTS:
            shape = layer_segment(spec, cut, part)
            if shape is not None:
                draft = _draft_layer(spec, cut.layer, part, shape)
                shards.append(Shard(shard_file(cut.layer, part), draft, part, shape))
        units.append(Unit(cut, tuple(shards)))
    return tuple(units)


def _draft_layer(spec: ModelSpec, layer: int, part: Part, shape: SegmentShape) -> ShardDraft:
    blocks = (
        [
            TensorInfo(f"layers.{layer}.experts.{expert}.{item.name}", item.dtype, item.shape)
            for item in shape.tensors
        ]
        for expert in range(spec.moe(layer).num_experts)
    )
    metadata = _metadata(content="experts", layer=str(layer), part=part, variant="base")
    return draft_shard(blocks, metadata)


def _metadata(**fields: str) -> dict[str, str]:
    return {"format": "moepack", "version": str(FORMAT_VERSION), **fields}


def write_unit(source: Source, unit: Unit, folder: Path, progress: Progress) -> FinishedUnit:
    """Write a unit's files, flushed to the disk.

    Raises
    ------
    OSError
        When a file cannot be written.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=len(PARTS)))
        writers = [
            stack.enter_context(_ShardWriter(folder / shard.path, shard.draft, pool))
            for shard in unit.shards
        ]
        if unit.cut is None:
            return _write_trunk(source, unit, writers[0], progress)
        return _write_layer(source, unit, unit.cut, writers, progress)


def _write_trunk(
    source: Source, unit: Unit, writer: _ShardWriter, progress: Progress
) -> FinishedUnit:
    for info in source.spec.trunk:
        tensor = source.trunk_tensor(info.name)
        if tensor.shape != info.shape or tensor.nbytes != info.size_bytes:
            raise ValueError(f"got {tensor.shape} {tensor.dtype}, expected {info}")
        bits = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        progress.advance(writer.append(bits.data))
    entries = [
        TrunkEntry(info.name, *placed)
        for info, placed in zip(source.spec.trunk, writer.finish(), strict=True)
    ]
    return FinishedUnit(unit.name, (unit.shards[0].entry,), tuple(entries), ())


def _write_layer(
    source: Source,
    unit: Unit,
    cut: LayerLayout,
    writers: list[_ShardWriter],
    progress: Progress,
) -> FinishedUnit:
    for expert in range(source.spec.moe(cut.layer).num_experts):
        weights = source.expert(cut.layer, expert)
        for shard, writer in zip(unit.shards, writers, strict=True):
            assert shard.shape is not None
            assert shard.part is not None
            progress.advance(writer.append(cut_expert(weights, shard.shape, shard.part)))
    groups = []
    for shard, writer in zip(unit.shards, writers, strict=True):
        assert shard.shape is not None
        assert shard.part is not None
        segments = tuple(
            SegmentRecord(expert, *placed) for expert, placed in enumerate(writer.finish())
        )
        groups.append(
            SegmentGroup(
                cut.layer, shard.part, "base", cut.encoding, shard.path, shard.shape, segments
            )
        )
    entries = tuple(shard.entry for shard in unit.shards)
    return FinishedUnit(unit.name, entries, (), tuple(groups))


class _Placed(NamedTuple):
    offset_bytes: int
    crc32: int
    sha256: str


class _ShardWriter:
    """Writes blocks at the places of a draft, while their digests are computed beside it."""

    def __init__(self, path: Path, draft: ShardDraft, pool: ThreadPoolExecutor) -> None:
        self._path = path
        self._draft = draft
        self._pool = pool
        self._digests: list[Future[tuple[int, str]]] = []

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Never into a file that is there: it might be a link to another pack's.
        self._path.unlink(missing_ok=True)
        self._file = self._path.open("xb")
        self._file.write(self._draft.header)
        return self

    def append(self, payload: bytes | memoryview) -> int:
        """Write one block and its padding; the bytes that this took."""
        if self._digests:
            self._digests[-1].result()  # at most one payload waits, so that memory stays bounded
        self._digests.append(self._pool.submit(digests, payload))
        padding = bytes(-len(payload) % ALIGNMENT_BYTES)
        return self._file.write(payload) + self._file.write(padding)

    def finish(self) -> list[_Placed]:
        """Flush to the disk; where each block is, and its digests."""
        self._file.flush()
        os.fsync(self._file.fileno())
        assert self._file.tell() == self._draft.size_bytes, self._path
        return [
            _Placed(offset_bytes, *digest.result())
            for offset_bytes, digest in zip(self._draft.offsets_bytes, self._digests, strict=True)
        ]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Closing flushes, and on a full disk fails again: the first failure is the one to report.
        if error is None:
            self._file.close()
            return
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


def digests(payload: bytes | memoryview) -> tuple[int, str]:
    """CRC-32 and SHA-256, as the index lists them."""
    return zlib.crc32(payload), hashlib.sha256(payload).hexdigest()
