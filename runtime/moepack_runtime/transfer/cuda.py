"""Pinned RAM to VRAM, on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from moepack.errors import DeviceError, OutOfMemoryError, TransferError
from moepack.segments import SegmentId
from moepack.units import format_size
from moepack_runtime.direct_io import allocate
from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer
from moepack_runtime.transfer.host import HostTransfer


class PinnedSegments:
    """Segments in pinned RAM: what a :class:`CudaTransfer` copies from.

    The memory is ours (huge pages, filled by direct reads) and registered with CUDA: torch's own
    pinned allocator rounds up to powers of two. Peak memory: the stored bytes of the segments.

    Parameters
    ----------
    disk
        Reads every segment once, here. Closed with the segments (its store is asked for the trunk
        meanwhile), and when this fails.
    stored_bytes
        The segments, and what each takes.

    Raises
    ------
    DeviceError
        When there is no CUDA device.
    OutOfMemoryError
        When the system refuses the memory, or CUDA refuses to pin it.
    TransferError, DamagedSegmentError
        When a segment cannot be read.
    """

    def __init__(self, disk: HostTransfer, stored_bytes: Mapping[SegmentId, int]) -> None:
        self._disk = disk
        self._memory: torch.Tensor | None = None
        self.segments: dict[SegmentId, torch.Tensor] = {}
        try:
            _require_cuda()
            self._memory = _pinned(sum(stored_bytes.values()))
            self._load(self._memory, stored_bytes)
        except BaseException:
            self.close()
            raise

    def _load(self, memory: torch.Tensor, stored_bytes: Mapping[SegmentId, int]) -> None:
        offset_bytes = 0
        for segment, size_bytes in stored_bytes.items():
            self.segments[segment] = memory[offset_bytes : offset_bytes + size_bytes]
            offset_bytes += size_bytes
        tickets = [self._disk.start(segment, place) for segment, place in self.segments.items()]
        for ticket in tickets:
            self._disk.wait(ticket)

    def close(self) -> None:
        """Unpin the memory, close the disk. No copy may be in flight."""
        memory, self._memory = self._memory, None
        try:
            self._disk.close()
        finally:
            if memory is not None:
                self.segments = {}
                _cuda_runtime().cudaHostUnregister(memory.data_ptr())


class _CudaTicket(Ticket):
    __slots__ = ("begin", "end")

    def __init__(
        self, segment: SegmentId, stored_bytes: int, begin: torch.cuda.Event, end: torch.cuda.Event
    ) -> None:
        super().__init__(segment, stored_bytes)
        self.begin = begin
        self.end = end

    def arrived(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]


class CudaTransfer(Transfer):
    """Copies segments from pinned RAM to VRAM.

    The work that the consumer's current stream has been given before :meth:`start` may still read
    the destination, so the copy waits for it: start a prefetch *before* queueing the computation
    that it is to overlap. ``wait`` does not hold up the processor: it makes the consumer's
    current stream wait, and returns.

    A copy is handed to the device when it is started: priorities do not reorder, and nothing can
    be cancelled.

    Parameters
    ----------
    pinned
        Where segments are copied from. Closed with the transfer.
    """

    def __init__(self, pinned: PinnedSegments, device: torch.device) -> None:
        _require_cuda()
        self._pinned = pinned
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._closed = False
        self._in_flight: deque[_CudaTicket] = deque()  # in the order of the stream
        self._statistics = LinkStatistics(0, 0, 0.0)

    @override
    def allocate(self, size_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"{self._device} has no {format_size(size_bytes)} left; close what else uses it, "
                "or plan with a smaller --vram"
            ) from None

    @override
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        self._require_open(segment)
        source = self._pinned.segments[segment]
        begin = _event()
        end = _event()
        # Whoever read the slot before was queued on the consumer's stream. The destination is
        # also memory that the allocator gave to that stream; record_stream is not needed since
        # close() waits for the copies before anybody can free it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            begin.record(self._stream)
            destination[: source.nbytes].copy_(source, non_blocking=True)
            end.record(self._stream)
        ticket = _CudaTicket(segment, source.nbytes, begin, end)
        self._in_flight.append(ticket)
        self._collect()
        return ticket

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _CudaTicket)
        self._require_open(ticket.segment)
        torch.cuda.current_stream(self._device).wait_event(ticket.end)

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _CudaTicket)
        return ticket.arrived()

    @override
    def cancel(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _CudaTicket)
        return False

    def _require_open(self, segment: SegmentId) -> None:
        if self._closed:
            raise TransferError(f"{segment}: the transfer is closed; open the engine again")

    def _collect(self) -> None:
        """Count the copies that have arrived."""
        while self._in_flight and self._in_flight[0].arrived():
            ticket = self._in_flight.popleft()
            self._statistics = LinkStatistics(
                self._statistics.bytes + ticket.stored_bytes,
                self._statistics.reads + 1,
                self._statistics.busy_s + ticket.begin.elapsed_time(ticket.end) / 1e3,
            )

    @property
    @override
    def statistics(self) -> LinkStatistics:
        """``busy_s``: the time that copies took on the device, one after the other."""
        self._collect()
        return self._statistics

    @override
    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._stream.synchronize()  # raises when the device has failed
            finally:
                self._pinned.close()


def _require_cuda() -> None:
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


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
