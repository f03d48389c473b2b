"""The shards that a layout consists of, and writing them.

Shards are written in *units* that finish together: the trunk, then each layer's top and bottom,
because an expert is read once and cut into both. A layer's low copies are a unit of their own,
which takes reading its experts again: so a pack without them gives a pack with them all the rest.

Peak memory: three experts (the one being cut, one being written, and one whose digests are being
computed) beside what the source itself keeps, or two trunk tensors where they are larger (a rounded
one takes half of what it is made from: a tensor and two times its codes, at most). Quantised
experts take no more: less than one while it is rounded and cut (a byte for each weight, and INT4's
of gate and up once more), and two as they are stored; and 12 MiB for each core, which rounds a
piece of its own (:mod:`moepack.quantise`).
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from moepack.budget import layer_segment
from moepack.calibration import Calibration
from moepack.encodings import encoding
from moepack.layout import LayerLayout, Layout
from moepack.manifest import (
    TRUNK_FILE,
    SegmentGroup,
    SegmentRecord,
    ShardEntry,
    TrunkEntry,
    shard_file,
    version_for,
)
from moepack.model_spec import ModelSpec
from moepack.progress import Progress
from moepack.quantise import quantise_expert, stored_tensors
from moepack.records import record
from moepack.rounding import ROUNDING
from moepack.safetensors_io import ShardDraft, draft_shard
from moepack.segments import (
    ALIGNMENT_BYTES,
    BASE,
    LOW,
    PARTS,
    Bits,
    Part,
    SegmentShape,
    cut_expert_into,
)
from moepack.trunk import stored_trunk, trunk_parts


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


class Cut(NamedTuple):
    """The part of a layer's experts that a shard holds.

    ``shapes`` is what a segment of each of the layer's encodings holds; the layer of a variant is
    that of :attr:`moepack.layout.Layout.low_layers`.
    """

    layout: LayerLayout
    part: Part
    shapes: Mapping[str, SegmentShape]
    variant: str = BASE

    def shape(self, expert: int) -> SegmentShape:
        """What the segment of one expert holds."""
        return self.shapes[self.layout.encoding_of(expert)]

    @property
    def largest_bytes(self) -> int:
        """Of the largest of its segments."""
        return max(shape.size_bytes for shape in self.shapes.values())


class Shard(NamedTuple):
    """One shard to write. ``cut`` is None for the trunk."""

    path: str
    draft: ShardDraft
    cut: Cut | None

    @property
    def entry(self) -> ShardEntry:
        """As the manifest lists it."""
        header = self.draft.header
        digest = hashlib.sha256(header).hexdigest()
        return ShardEntry(self.path, self.draft.size_bytes, len(header), digest)


class Unit(NamedTuple):
    """Shards that are finished together. ``layer`` is None for the trunk."""

    layer: int | None
    shards: tuple[Shard, ...]
    variant: str = BASE

    @property
    def name(self) -> str:
        """For the journal."""
        if self.layer is None:
            return "trunk"
        return f"layer {self.layer}" + ("" if self.variant == BASE else f" ({self.variant})")

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
    units = [Unit(None, (Shard(TRUNK_FILE, _draft_trunk(spec, layout.trunk), None),))]
    low_layers = layout.low_layers or (None,) * len(layout.layers)
    for cut, low in zip(layout.layers, low_layers, strict=True):
        units.append(_draft_layer(spec, cut, BASE, layout.calibration))
        if low is not None:
            units.append(_draft_layer(spec, low, LOW, layout.calibration))
    return tuple(units)


def _draft_trunk(spec: ModelSpec, trunk: str) -> ShardDraft:
    fields = {"content": "trunk"}
    if trunk:
        fields |= {"encoding": trunk, "rounding": str(ROUNDING)}
    metadata = _metadata(version=version_for((), trunk), **fields)
    return draft_shard(([tensor] for tensor in stored_trunk(spec, trunk)), metadata)


def _draft_layer(spec: ModelSpec, layout: LayerLayout, variant: str, calibration: str) -> Unit:
    layer = layout.layer
    shards = []
    for part in PARTS:
        shapes = {
            name: shape
            for name in layout.classes
            if (shape := layer_segment(spec, layout, part, name)) is not None
        }
        if shapes:
            cut = Cut(layout, part, shapes, variant)
            draft = _draft_experts(cut, spec.moe(layer).num_experts, calibration)
            shards.append(Shard(shard_file(layer, part, variant), draft, cut))
    return Unit(layer, tuple(shards), variant)


def _draft_experts(cut: Cut, experts: int, calibration: str) -> ShardDraft:
    layer, names = cut.layout.layer, cut.layout.classes
    blocks = (
        [
            replace(item, name=f"layers.{layer}.experts.{expert}.{item.name}")
            for item in cut.shape(expert).tensors
        ]
        for expert in range(experts)
    )
    fields = {"layer": str(layer), "part": cut.part, "variant": cut.variant}
    version = version_for(names)
    if version > 1:
        # Part of the header, by which layers are reused: codes of another search are made anew.
        fields |= {"encoding": ",".join(names), "rounding": str(ROUNDING)}
        if calibration:
            fields["calibration"] = calibration
    return draft_shard(blocks, _metadata(version=version, content="experts", **fields))


def _metadata(*, version: int = 1, **fields: str) -> dict[str, str]:
    return {"format": "moepack", "version": str(version), **fields}


def write_unit(
    source: Source,
    unit: Unit,
    folder: Path,
    progress: Progress,
    calibration: Calibration | None = None,
    trunk: str = "",
) -> FinishedUnit:
    """Write a unit's files, flushed to the disk.

    Parameters
    ----------
    trunk
        What the trunk's large matrices are stored in.
    calibration
        What rounding is weighed by; None: every weight counts the same.

    Raises
    ------
    OSError
        When a file cannot be written.
    NonFiniteWeightError
        When a weight that is to be rounded is NaN or infinite.
    """
    with ExitStack() as stack:
        threads = max(len(PARTS), os.cpu_count() or 1)
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=threads))
        writers = [
            stack.enter_context(_ShardWriter(folder / shard.path, shard.draft, pool))
            for shard in unit.shards
        ]
        progress.advance(sum(len(shard.draft.header) for shard in unit.shards))
        if unit.layer is None:
            return _write_trunk(source, unit, trunk, writers[0], pool, progress)
        stored = _Stored(source, calibration, pool)
        return _write_layer(stored, unit, unit.layer, writers, progress)


def _write_trunk(
    source: Source,
    unit: Unit,
    trunk: str,
    writer: _ShardWriter,
    pool: Executor,
    progress: Progress,
) -> FinishedUnit:
    parts = trunk_parts(source.spec, trunk)
    for part in parts:
        for bits in stored_tensors(source.trunk_tensor(part.source.name), part, pool):
            progress.advance(writer.append(bits.data))
    names = (tensor.name for part in parts for tensor in part.tensors)
    entries = [
        TrunkEntry(name, *placed) for name, placed in zip(names, writer.finish(), strict=True)
    ]
    return FinishedUnit(unit.name, (unit.shards[0].entry,), tuple(entries), ())


class _Stored(NamedTuple):
    """The experts of a source as they are to be stored."""

    source: Source
    calibration: Calibration | None
    pool: Executor

    def expert(self, layer: int, expert: int, name: str) -> Mapping[str, Bits]:
        """A whole one in the encoding of that name."""
        weights = self.source.expert(layer, expert)
        if not encoding(name).quantised:
            return weights
        calibration = self.calibration
        importance = None if calibration is None else calibration.importance(layer, expert)
        return quantise_expert(
            weights,
            encoding(name),
            self.source.spec.dtype,
            f"layer {layer}, expert {expert}",
            importance=importance,
            pool=self.pool,
        )


def _write_layer(
    stored: _Stored,
    unit: Unit,
    layer: int,
    writers: Sequence[_ShardWriter],
    progress: Progress,
) -> FinishedUnit:
    cuts = [shard.cut for shard in unit.shards if shard.cut is not None]
    # Two buffers for each shard: one segment is cut while the digests of the last are computed.
    buffers = [np.empty((2, cut.largest_bytes), np.uint8) for cut in cuts]
    for expert in range(stored.source.spec.moe(layer).num_experts):
        weights = stored.expert(layer, expert, cuts[0].layout.encoding_of(expert))
        for cut, writer, pair in zip(cuts, writers, buffers, strict=True):
            shape = cut.shape(expert)
            segment = pair[expert % 2, : shape.size_bytes]
            cut_expert_into(weights, shape, cut.part, segment)
            progress.advance(writer.append(segment.data))
        del weights  # before the next expert is read
    groups: list[SegmentGroup] = []
    for shard, cut, writer in zip(unit.shards, cuts, writers, strict=True):
        groups += _groups(shard.path, cut, writer.finish())
    entries = tuple(shard.entry for shard in unit.shards)
    return FinishedUnit(unit.name, entries, (), tuple(groups))


def _groups(path: str, cut: Cut, placed: Sequence[_Placed]) -> Iterator[SegmentGroup]:
    """What the manifest says of a shard of experts: a group for each encoding."""
    for name, shape in cut.shapes.items():
        yield SegmentGroup(
            layer=cut.layout.layer,
            part=cut.part,
            variant=cut.variant,
            encoding=name,
            shard=path,
            shape=shape,
            segments=tuple(
                SegmentRecord(expert, *place)
                for expert, place in enumerate(placed)
                if cut.layout.encoding_of(expert) == name
            ),
        )


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

    def append(self, payload: memoryview) -> int:
        """Write one block and its padding; the bytes that this took.

        The payload must stay as it is until the next but one is appended.
        """
        if self._digests:
            self._digests[-1].result()  # at most one payload waits: the caller has two buffers
        self._digests.append(self._pool.submit(_digests, payload))
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


def _digests(payload: memoryview) -> tuple[int, str]:
    """CRC-32 and SHA-256, as the index lists them."""
    return zlib.crc32(payload), hashlib.sha256(payload).hexdigest()
