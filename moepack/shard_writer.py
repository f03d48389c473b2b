"""Writing the shards of a layout, unit by unit.

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
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from moepack.calibration import Calibration
from moepack.encodings import encoding
from moepack.manifest import (
    SegmentGroup,
    SegmentRecord,
    TrunkEntry,
)
from moepack.model_spec import ModelSpec
from moepack.progress import Progress
from moepack.quantise import quantise_expert, stored_tensors
from moepack.safetensors_io import ShardDraft
from moepack.segments import (
    ALIGNMENT_BYTES,
    PARTS,
    Bits,
    cut_expert_into,
)
from moepack.shards import Cut, FinishedUnit, Unit
from moepack.trunk import trunk_parts


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
