"""Where a model's weights come from: a store, and the one that reads a packed folder.

That of a plain checkpoint is :mod:`moepack_runtime.checkpoint_store`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path

import torch
from isal import isal_zlib
from typing_extensions import override

from moepack.budget import TRUNK_ALIGNMENT_BYTES, trunk_bytes
from moepack.encodings import EncodedTensor
from moepack.errors import DamagedSegmentError, TransferError
from moepack.formats import PackedModel, TrunkTensor
from moepack.manifest import TRUNK_FILE, SegmentEntry
from moepack.model_spec import ModelSpec
from moepack.segments import SegmentId, SegmentShape, align_up
from moepack.trunk import stored_trunk
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


def allocate_trunk(
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


def trunk_step(spec: ModelSpec, trunk: str) -> torch.Tensor:
    """Memory through which the trunk is read: no more than its largest tensor takes."""
    largest_bytes = max(tensor.size_bytes for tensor in stored_trunk(spec, trunk))
    return allocate(align_up(min(_TRUNK_STEP_BYTES, largest_bytes)))


def loading_trunk(
    progress: Progress, spec: ModelSpec, trunk: str
) -> AbstractContextManager[Progress]:
    """Loading the trunk as one piece of work, which ends with the block."""
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
        step = trunk_step(spec, trunk)
        with loading_trunk(progress, spec, trunk):
            for (info, flat, tensor), entry in zip(
                allocate_trunk(spec, trunk, device), self._packed.trunk, strict=True
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
