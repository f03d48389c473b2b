"""Where a model's weights come from: a packed folder, or a plain checkpoint cut on the fly."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from isal import isal_zlib
from typing_extensions import override

from moepack.budget import TRUNK_ALIGNMENT_BYTES, layer_segment, trunk_bytes
from moepack.calibration import Calibration, calibration_for
from moepack.encodings import EncodedTensor, encoding
from moepack.errors import DamagedSegmentError, PlanMismatchError, TransferError
from moepack.formats import PackedModel, TrunkTensor
from moepack.layout import Layout
from moepack.manifest import TRUNK_FILE, SegmentEntry
from moepack.model_spec import ModelSpec
from moepack.quantise import quantise_expert, stored_tensors
from moepack.segments import (
    BASE,
    LOW,
    PARTS,
    Bits,
    Part,
    SegmentId,
    SegmentShape,
    align_up,
    cut_expert,
)
from moepack.trunk import require_trunk, stored_trunk, trunk_parts
from moepack.units import MIB
from moepack_runtime.direct_io import Buffer, DirectFile, Wanted, allocate
from moepack_runtime.progress import NO_PROGRESS, Progress, working
from moepack_runtime.weights import TORCH_DTYPE

# Of the memory through which the trunk is read, at most.
_TRUNK_STEP_BYTES = 8 * MIB

_CPU = torch.device("cpu")

_log = logging.getLogger(__name__)


class CheckMode(StrEnum):
    """Which segments are compared with their CRC-32 when they are read."""

    FIRST = "first"  # each one the first time
    ALWAYS = "always"
    NEVER = "never"


class SegmentStore(ABC):
    """The weights of one model: its trunk as tensors, its routed experts as segments."""

    @abstractmethod
    def shape(self, segment: SegmentId) -> SegmentShape:
        """What a segment holds.

        Raises
        ------
        PackError, PlanMismatchError
            When there is no such segment.
        """

    @abstractmethod
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        """Read a segment. Called from several threads at once.

        Parameters
        ----------
        destination
            As many bytes as the segment stores, 4 KiB aligned. The padding after its tensors is
            written too, with anything.
        wanted
            Where a store can break off, it reads as long as this is true; None: to the end.

        Returns
        -------
        int
            Bytes read: as many as it stores, or fewer; then the destination holds anything.

        Raises
        ------
        TransferError
            When it cannot be read, naming the file.
        DamagedSegmentError
            When it is not what was packed.
        """

    @abstractmethod
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device = _CPU,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        """Every stored tensor of the trunk, in one block of the device's memory.

        By the names of :func:`moepack.trunk.stored_trunk`. The block takes
        :func:`moepack.budget.trunk_bytes`; it is freed when the last tensor goes. Peak memory
        beyond it: a few MiB of RAM, and of a plain checkpoint one tensor, with its codes where it
        is rounded.

        Raises
        ------
        TransferError
            When it cannot be read.
        DamagedSegmentError
            When it is not what was packed, naming the tensor.
        OutOfMemoryError
            When there is no room for it.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. Closing twice does nothing."""


def _allocate_trunk(
    spec: ModelSpec, trunk: str, device: torch.device
) -> Iterator[tuple[EncodedTensor, torch.Tensor, torch.Tensor]]:
    """For each stored tensor: itself, its bytes (uint8, flat), and the tensor over those bytes."""
    size_bytes = trunk_bytes(spec, trunk)
    if device.type == "cpu":
        memory = allocate(size_bytes)
    else:
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    offset_bytes = 0
    for info in stored_trunk(spec, trunk):
        flat = memory[offset_bytes : offset_bytes + info.size_bytes]
        yield info, flat, flat.view(TORCH_DTYPE[info.dtype]).view(info.shape)
        offset_bytes += align_up(info.size_bytes, TRUNK_ALIGNMENT_BYTES)


def _trunk_step(spec: ModelSpec, trunk: str) -> torch.Tensor:
    """Memory through which the trunk is read: no more than its largest tensor takes."""
    largest_bytes = max(tensor.size_bytes for tensor in stored_trunk(spec, trunk))
    return allocate(align_up(min(_TRUNK_STEP_BYTES, largest_bytes)))


def _loading_trunk(
    progress: Progress, spec: ModelSpec, trunk: str
) -> AbstractContextManager[Progress]:
    size_bytes = sum(tensor.size_bytes for tensor in stored_trunk(spec, trunk))
    return working(progress, "load the trunk", size_bytes)


class PackStore(SegmentStore):
    """A packed folder, read past the page cache.

    Attributes
    ----------
    direct : bool
        Whether every read goes past the page cache. Where the file system does not allow that,
        this is False and a warning says so.

    Raises
    ------
    PackError
        When the folder is not a sound pack.
    TransferError
        When a file cannot be opened.
    """

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self._checked: set[SegmentId] = set()
        self._files: dict[str, DirectFile] = {}
        paths = dict.fromkeys([TRUNK_FILE, *(entry.path for entry in packed.entries.values())])
        try:
            for path in paths:
                self._files[path] = DirectFile(packed.folder / path)
        except BaseException:
            self.close()
            raise
        indirect = [file for file in self._files.values() if not file.direct]
        self.direct = not indirect
        if indirect:
            _log.warning(
                "%s is read through the page cache (%s): it takes memory beyond the budget, and "
                "its speed says nothing about the disk",
                packed.folder,
                indirect[0].reason,
            )

    @classmethod
    def open(cls, folder: Path) -> PackStore:
        """Open a packed folder. Raises as :meth:`PackedModel.open` does, too."""
        return cls(PackedModel.open(folder))

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        return self._packed.entry(segment).shape

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        entry = self._packed.entry(segment)
        room = destination[: entry.stored_bytes]
        try:
            read_bytes = self._files[entry.path].read_while(wanted, room, entry.offset_bytes)
        except TransferError as failure:
            raise TransferError(f"{segment}: {failure}") from None
        if read_bytes == entry.stored_bytes:
            self._compare(segment, entry, destination, check)
        return read_bytes

    def _compare(
        self, segment: SegmentId, entry: SegmentEntry, destination: Buffer, check: CheckMode
    ) -> None:
        """Compare what was read with its digest."""
        if check is CheckMode.NEVER or (check is CheckMode.FIRST and segment in self._checked):
            return
        # In a tenth of zlib's time, which is two thirds of the read's, and without the
        # interpreter lock, so that the other readers go on.
        if isal_zlib.crc32(destination[: entry.size_bytes].data) != entry.crc32:
            raise DamagedSegmentError(
                f"{segment}: its bytes in {self._packed.path(entry)} do not match their checksum; "
                "check the folder with moepack verify, then pack again"
            )
        self._checked.add(segment)

    @override
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device = _CPU,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        spec, trunk = self._packed.spec, self._packed.layout.trunk
        step = _trunk_step(spec, trunk)
        with _loading_trunk(progress, spec, trunk):
            for (info, flat, tensor), entry in zip(
                _allocate_trunk(spec, trunk, device), self._packed.trunk, strict=True
            ):
                self._read_trunk_tensor(entry, flat, step, check, progress)
                tensors[info.name] = tensor
        return tensors

    def _read_trunk_tensor(
        self,
        entry: TrunkTensor,
        destination: torch.Tensor,
        step: torch.Tensor,
        check: CheckMode,
        progress: Progress,
    ) -> None:
        checksum = 0
        buffer: Buffer = step.numpy()
        for done in range(0, entry.size_bytes, buffer.nbytes):
            count = min(buffer.nbytes, entry.size_bytes - done)
            self._files[TRUNK_FILE].read_into(
                buffer[: align_up(count)], entry.offset_bytes + done, needed_bytes=count
            )
            destination[done : done + count].copy_(step[:count])
            if check is not CheckMode.NEVER:
                checksum = isal_zlib.crc32(buffer[:count].data, checksum)
            progress.advance(count)
        if check is not CheckMode.NEVER and checksum != entry.crc32:
            raise DamagedSegmentError(
                f"trunk tensor {entry.name}: its bytes in {self._packed.trunk_path} do not match "
                "their checksum; check the folder with moepack verify, then pack again"
            )

    @override
    def close(self) -> None:
        for file in self._files.values():
            file.close()


class ExpertSource(Protocol):
    """A checkpoint, as far as a store needs one: bit patterns under canonical names."""

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        """One whole routed expert, under the names of :data:`moepack.segments.EXPERT_TENSORS`."""

    def trunk_tensor(self, name: str) -> Bits:
        """One trunk tensor, in its shape."""


class CheckpointStore(SegmentStore):
    """A plain checkpoint whose experts are cut for a layout as they are asked for.

    For running without a pack, and to compare packs against: a layer that the layout wants
    quantised is rounded as packing would round it, every time that an expert is asked for. There
    are no checksums to compare with, so ``check`` makes no difference. One thread reads at a time.
    Peak memory: two whole experts beyond the destinations (a top and a bottom are asked for one
    after the other), and one more with what rounding takes.

    Parameters
    ----------
    calibration
        What rounding is weighed by, where the layout names one.

    Raises
    ------
    PlanMismatchError
        When the layout asks for another dtype than the model has, or for another calibration.
    UnknownEncodingError, GroupMismatchError
        When its experts, or its trunk, cannot be stored as the layout wants.
    NonFiniteWeightError
        While reading, when a weight that is to be rounded is NaN or infinite.
    """

    def __init__(
        self,
        source: ExpertSource,
        spec: ModelSpec,
        layout: Layout,
        calibration: Calibration | None = None,
    ) -> None:
        require_trunk(layout.trunk)
        self._calibration = calibration_for(spec, layout, calibration)
        self._source = source
        self._spec = spec
        self._trunk = layout.trunk
        self._cuts = {(cut.layer, BASE): cut for cut in layout.layers}
        self._cuts |= {(cut.layer, LOW): cut for cut in layout.low_layers}
        self._shapes: dict[tuple[int, Part, str], SegmentShape] = {}
        for cut in self._cuts.values():
            for name in cut.classes:
                if not encoding(name).quantised and name != spec.dtype:
                    raise PlanMismatchError(
                        f"layer {cut.layer} is planned as {name}, the checkpoint holds "
                        f"{spec.dtype}; expected that, or a quantised encoding; plan again"
                    )
                for part in PARTS:
                    shape = layer_segment(spec, cut, part, name)
                    if shape is not None:
                        self._shapes[cut.layer, part, name] = shape
        self._recent: OrderedDict[tuple[int, int, str], Mapping[str, Bits]] = OrderedDict()
        self._lock = threading.Lock()

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        cut = self._cuts.get((segment.layer, segment.variant))
        if cut is not None:
            name = cut.encoding_of(segment.expert)
            shape = self._shapes.get((segment.layer, segment.part, name))
            if shape is not None:
                return shape
        raise PlanMismatchError(f"the layout has no segment {segment}; plan again")

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        shape = self.shape(segment)
        with self._lock:
            weights = self._expert(segment.layer, segment.expert, segment.variant)
            bits = cut_expert(weights, shape, segment.part)
        destination[: shape.size_bytes] = np.frombuffer(bits, np.uint8)
        return shape.stored_bytes

    def _expert(self, layer: int, expert: int, variant: str) -> Mapping[str, Bits]:
        weights = self._recent.pop((layer, expert, variant), None)
        if weights is None:
            weights = self._source.expert(layer, expert)
            stored = encoding(self._cuts[layer, variant].encoding_of(expert))
            if stored.quantised:
                what = f"layer {layer}, expert {expert}"
                importance = None
                if self._calibration is not None:
                    importance = self._calibration.importance(layer, expert)
                weights = quantise_expert(
                    weights, stored, self._spec.dtype, what, importance=importance
                )
        self._recent[layer, expert, variant] = weights
        if len(self._recent) > 2:
            self._recent.popitem(last=False)
        return weights

    @override
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device = _CPU,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        step = _trunk_step(self._spec, self._trunk)
        with _loading_trunk(progress, self._spec, self._trunk):
            rooms = _allocate_trunk(self._spec, self._trunk, device)
            for (info, flat, tensor), source in zip(rooms, self._trunk_bits(), strict=True):
                # Through memory of ours: torch takes no array that may only be read.
                for done in range(0, info.size_bytes, step.nbytes):
                    count = min(step.nbytes, info.size_bytes - done)
                    step.numpy()[:count] = source[done : done + count]
                    flat[done : done + count].copy_(step[:count])
                    progress.advance(count)
                tensors[info.name] = tensor
        return tensors

    def _trunk_bits(self) -> Iterator[Bits]:
        """The bytes of every stored tensor, in their order."""
        for part in trunk_parts(self._spec, self._trunk):
            yield from stored_tensors(self._source.trunk_tensor(part.source.name), part)

    @override
    def close(self) -> None:
        self._recent.clear()
