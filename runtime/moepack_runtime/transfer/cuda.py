"""Pinned RAM to VRAM, on a stream of its own."""

from __future__ import annotations

import torch
from typing_extensions import override

from moepack.errors import OutOfMemoryError, TransferError
from moepack.ram_tier import COPIERS
from moepack.segments import SegmentId
from moepack.units import format_size
from moepack_runtime.transfer.base import Priority, Ticket
from moepack_runtime.transfer.pinned import PinnedSegments, require_cuda
from moepack_runtime.transfer.queued import STALL_S, Carry, Lane, QueuedTicket, QueuedTransfer

# The lanes of a CudaTransfer.
_FROM_RAM, _FROM_DISK = 0, 1


class _CudaTicket(QueuedTicket):
    """``free`` is recorded at the start: once it has passed, the destination is not in use."""

    __slots__ = ("free",)

    def __init__(
        self,
        lane: Lane,
        segment: SegmentId,
        stored_bytes: int,
        destination: torch.Tensor,
        priority: Priority,
        free: torch.cuda.Event,
    ) -> None:
        super().__init__(lane, segment, stored_bytes, destination, priority)
        self.free = free


class CudaTransfer(QueuedTransfer):
    """Copies segments from pinned RAM to VRAM; those that RAM does not hold, from the disk.

    A few copiers each take the most urgent segment, hand one copy to the copy stream, and wait
    until it is there: so priorities reorder, what is queued can be cancelled, and the stream never
    holds more than a few copies that nobody can take back. What has to be read from the disk first
    has copiers of its own: it does not hold up what RAM has.

    Two hazards, and why they cannot happen:

    - *The destination is still being read* by what the consumer has queued. :meth:`start` records
      an event on the consumer's current stream, behind all of that, and the copy stream waits for
      the event before the copy. (So start a prefetch *before* queueing the computation that it is
      to overlap.) What was started later has a later event, so with one consumer stream nothing is
      held up that could have gone on.
    - *The copy is not there yet* when it is read. :meth:`wait` returns when the copier has seen the
      event behind the copy pass, so the bytes are in VRAM before the consumer can launch what
      reads them, on any stream; its stream needs no further wait.

    The destination is memory that torch's allocator gave to the consumer's stream. The ticket
    keeps it until the copy is over, so it cannot be given to somebody else meanwhile, and
    ``record_stream`` is not needed.

    A copier waits for its copy without the interpreter's lock, and without a core: its event blocks
    instead of spinning. A bounce is read into again only after the copy out of it is over.

    Parameters
    ----------
    pinned
        Where segments are copied from. Closed with the transfer. Each of its bounces has a copier.
    stall_s
        Seconds without a finished copy after which a wait gives up.
    """

    _task = "copy"
    _suspect = "the device, and the disk that holds the model"

    def __init__(
        self, pinned: PinnedSegments, device: torch.device, *, stall_s: float = STALL_S
    ) -> None:
        require_cuda()
        self._pinned = pinned
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        super().__init__([COPIERS, len(pinned.bounces)], "copier", stall_s)

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
        stored_bytes = self._pinned.stored_bytes(segment)
        assert destination.nbytes >= stored_bytes, (segment, destination.nbytes, stored_bytes)
        free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(torch.cuda.current_stream(self._device))
        lane = self._lanes[_FROM_RAM if segment in self._pinned.segments else _FROM_DISK]
        ticket = _CudaTicket(lane, segment, stored_bytes, destination, priority, free)
        self._enqueue(ticket)
        return ticket

    @override
    def _carrier(self, lane: int, number: int) -> Carry:
        # Both are of the thread: the current device, and that device's current stream.
        torch.cuda.set_device(self._stream.device)
        torch.cuda.set_stream(self._stream)
        bounce = self._pinned.bounces[number] if lane == _FROM_DISK else None
        there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

        def copy(ticket: QueuedTicket) -> None:
            assert isinstance(ticket, _CudaTicket)
            assert ticket.destination is not None
            source = self._pinned.fetch(ticket.segment, bounce)
            try:
                self._stream.wait_event(ticket.free)
                ticket.destination[: source.nbytes].copy_(source, non_blocking=True)
                there.record(self._stream)
                there.synchronize()
            except RuntimeError as failure:
                raise TransferError(
                    f"{ticket.segment}: {self._device} did not take it "
                    f"({str(failure).splitlines()[0]}); the device has failed, run again"
                ) from failure

        return torch.inference_mode()(copy)

    @override
    def _release(self) -> None:
        # A copier that was given up may still have its copy in flight.
        self._pinned.close(unpin=not any(copier.is_alive() for copier in self._carriers))
