"""Segments in pinned RAM: where copies to a device come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moepack.errors import DeviceError, OutOfMemoryError
from moepack.segments import SegmentId
from moepack.units import format_size
from moepack_runtime.direct_io import allocate
from moepack_runtime.progress import NO_PROGRESS, Progress, working
from moepack_runtime.transfer.host import HostTransfer


class PinnedSegments:
    """Segments in pinned RAM, and a way to those that are not.

    The memory is ours (huge pages, filled by direct reads) and registered with CUDA: torch's own
    pinned allocator rounds up to powers of two. All of it is allocated here, :attr:`size_bytes` of
    it: the stored bytes of what is held, and the bounces.

    Parameters
    ----------
    disk
        Reads every held segment once, here, and the others whenever they are asked for. Closed
        with the segments (its store is asked for the trunk meanwhile), and when this fails.
    held
        Segment -> its stored bytes.
    bounces, bounce_bytes
        Pieces of memory for segments that are not held, and the size of each.

    Attributes
    ----------
    segments : dict
        Held segment -> its memory, uint8 [stored bytes].
    bounces : list of torch.Tensor
        uint8 [bounce_bytes] each.

    Raises
    ------
    DeviceError
        When there is no CUDA device.
    OutOfMemoryError
        When the system refuses the memory, or CUDA refuses to pin it.
    TransferError, DamagedSegmentError
        When a segment cannot be read.
    """

    def __init__(
        self,
        disk: HostTransfer,
        held: Mapping[SegmentId, int],
        *,
        bounces: int = 0,
        bounce_bytes: int = 0,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        self._disk = disk
        self._memory: torch.Tensor | None = None
        self.size_bytes = sum(held.values()) + bounces * bounce_bytes
        self.segments: dict[SegmentId, torch.Tensor] = {}
        self.bounces: list[torch.Tensor] = []
        try:
            require_cuda()
            self._memory = _pinned(self.size_bytes)
            self._cut(self._memory, held, bounces, bounce_bytes)
            self._load(progress)
        except BaseException:
            self.close()
            raise

    def _cut(
        self,
        memory: torch.Tensor,
        held: Mapping[SegmentId, int],
        bounces: int,
        bounce_bytes: int,
    ) -> None:
        offset_bytes = 0
        for segment, size_bytes in held.items():
            self.segments[segment] = memory[offset_bytes : offset_bytes + size_bytes]
            offset_bytes += size_bytes
        for _ in range(bounces):
            self.bounces.append(memory[offset_bytes : offset_bytes + bounce_bytes])
            offset_bytes += bounce_bytes

    def _load(self, progress: Progress) -> None:
        tickets = [self._disk.start(segment, place) for segment, place in self.segments.items()]
        total_bytes = sum(ticket.stored_bytes for ticket in tickets)
        with working(progress, "fill the pinned memory", total_bytes):
            for ticket in tickets:
                self._disk.wait(ticket)
                progress.advance(ticket.stored_bytes)

    def stored_bytes(self, segment: SegmentId) -> int:
        """What a segment takes, held or not."""
        held = self.segments.get(segment)
        return self._disk.stored_bytes(segment) if held is None else held.nbytes

    def fetch(self, segment: SegmentId, bounce: torch.Tensor | None) -> torch.Tensor:
        """Memory that holds a segment: its own, or the bounce after a read from the disk.

        Called from several threads at once, each with a bounce of its own.

        Raises
        ------
        TransferError, DamagedSegmentError
            When it cannot be read.
        """
        held = self.segments.get(segment)
        if held is not None:
            return held
        assert bounce is not None, f"{segment} is not held, and there is no bounce"
        return self._disk.read(segment, bounce)

    def close(self, *, unpin: bool = True) -> None:
        """Unpin the memory, close the disk. No copy may be in flight, or it stays pinned."""
        memory, self._memory = self._memory, None
        try:
            self._disk.close()
        finally:
            if memory is not None and unpin:
                self.segments = {}
                self.bounces = []
                _cuda_runtime().cudaHostUnregister(memory.data_ptr())


def require_cuda() -> None:
    """Refuse where there is no GPU.

    Raises
    ------
    DeviceError
        Then.
    """
    if not torch.cuda.is_available():
        raise DeviceError(
            "there is no CUDA device that torch can use; run moepack profile --device cpu, then "
            "plan again"
        )


def _pinned(size_bytes: int) -> torch.Tensor:
    memory = allocate(size_bytes)
    if int(_cuda_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) != 0:
        raise OutOfMemoryError(
            f"CUDA refused to pin {format_size(size_bytes)} of RAM; raise the limit on locked "
            "memory (ulimit -l) or plan with a smaller --ram"
        )
    return memory


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
