"""Pinned RAM to VRAM, on a stream of its own."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from time import perf_counter, sleep

import torch
from typing_extensions import override

from moepack.errors import DeviceError, OutOfMemoryError, TransferError
from moepack.ram_tier import COPIES_AHEAD
from moepack.segments import SegmentId
from moepack.units import format_size
from moepack_runtime.transfer.base import Priority, Ticket
from moepack_runtime.transfer.pinned import PinnedSegments, require_cuda
from moepack_runtime.transfer.queued import STALL_S, Carry, Lane, QueuedTicket, QueuedTransfer

_DRIVER = "libcuda.so.1"


class _CudaTicket(QueuedTicket):
    """A copy to the device.

    Attributes
    ----------
    free
        Recorded at the start: once it has passed, the destination is not in use. None where the
        copy stream has been told.
    since, there
        The copy stream was at its predecessor's end, or began with this one; and is done with it.
    """

    __slots__ = ("free", "since", "there")

    def __init__(
        self,
        lane: Lane,
        segment: SegmentId,
        stored_bytes: int,
        destination: torch.Tensor,
        priority: Priority,
    ) -> None:
        super().__init__(lane, segment, stored_bytes, destination, priority)
        self.free: torch.cuda.Event | None = None
        self.since: torch.cuda.Event | None = None
        self.there: torch.cuda.Event | None = None


class _Events:
    """Events to be recorded again: making one takes longer than recording it."""

    def __init__(self, *, timed: bool) -> None:
        self._timed = timed
        self._idle: list[torch.cuda.Event] = []

    def take(self) -> torch.cuda.Event:
        """One that nobody asks any more."""
        if self._idle:
            return self._idle.pop()
        return torch.cuda.Event(enable_timing=self._timed)  # type: ignore[no-untyped-call]

    def give(self, event: torch.cuda.Event) -> None:
        """Take one back."""
        self._idle.append(event)


class CudaTransfer(QueuedTransfer):
    """Copies segments from pinned RAM to VRAM; those that RAM does not hold, from the disk.

    What RAM holds the consumer hands to the copy stream itself: demands at once, prefetches as long
    as few copies are in flight, whenever it calls. So a demand waits for those few at most, what is
    queued can be cancelled, and the stream goes from copy to copy without anybody being woken: a
    thread that hands them over needs the interpreter's lock for each, against a consumer that is
    all Python (on an H100, of five experts of 12 MiB and their computing, 2.1 ms instead of 1.4).
    Waiting asks the device over and over: an event that blocks took 0.14 ms longer to be noticed,
    and the consumer has nothing else to do. The copy itself is one call of the driver with the
    handle of the copy stream: to make that torch's current stream and back takes 27 us, and
    ``copy_`` another 16.

    ``wait``, too, is called by the consumer's thread alone.

    What has to be read from the disk first goes through carriers, each with a bounce. It does not
    hold up what RAM has.

    Two hazards, and why they cannot happen:

    - *The destination is still being read* by what the consumer has queued. :meth:`start` records
      an event on the consumer's current stream, behind all of that, and the copy stream waits for
      the event before the copy. (So start a prefetch *before* queueing the computation that it is
      to overlap.) What was started later has a later event, so with one consumer stream nothing is
      held up that could have gone on. An event is recorded again only after the copy stream has
      been told to wait for it: that wait is for what the event had captured then, as CUDA's
      documentation of ``cudaEventRecord`` says.
    - *The copy is not there yet* when it is read. :meth:`wait` returns when the event behind the
      copy has passed, so the bytes are in VRAM before the consumer can launch what reads them, on
      any stream; its stream needs no further wait. Such an event is recorded again only after
      its copy is over, and the next one, which is timed from there.

    The destination is memory that torch's allocator gave to the consumer's stream. The ticket
    keeps it until the copy is over, so it cannot be given to somebody else meanwhile, and
    ``record_stream`` is not needed. A bounce is read into again only after the copy out of it is
    over.

    Parameters
    ----------
    pinned
        Where segments are copied from. Closed with the transfer. Each of its bounces has a carrier.
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
        self._ram = Lane()  # without carriers: only prefetches wait in it
        self._in_flight: deque[_CudaTicket] = deque()
        self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._free_events, self._timed_events = _Events(timed=False), _Events(timed=True)
        self._consumer: tuple[int, torch.cuda.Stream] | None = None
        super().__init__([len(pinned.bounces)], "copier", stall_s)
        (self._disk,) = self._lanes

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
        lane = self._ram if segment in self._pinned.segments else self._disk
        ticket = _CudaTicket(lane, segment, stored_bytes, destination, priority)
        if lane is self._disk:
            ticket.free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ticket.free.record(self._consumer_stream())
            self._enqueue(ticket)
            return ticket
        self._enter(ticket)
        if priority is Priority.DEMAND:
            self._free.record(self._consumer_stream())
            self._issue(ticket, self._free)
        else:
            ticket.free = self._free_events.take()
            ticket.free.record(self._consumer_stream())
            lane.prefetches.append(ticket)
            self._advance()
        return ticket

    def _consumer_stream(self) -> torch.cuda.Stream:
        """The current stream: to look it up takes torch 15 us, to see that it is the same 0.2."""
        handle = torch._C._cuda_getCurrentRawStream(self._stream.device.index)
        if self._consumer is None or self._consumer[0] != handle:
            self._consumer = handle, torch.cuda.current_stream(self._device)
        return self._consumer[1]

    def _issue_prefetch(self, ticket: QueuedTicket) -> None:
        """Hand one over that has waited in the lane."""
        assert isinstance(ticket, _CudaTicket)
        assert ticket.free is not None, "it has been handed over"
        self._issue(ticket, ticket.free)
        self._free_events.give(ticket.free)
        ticket.free = None

    def _issue(self, ticket: _CudaTicket, free: torch.cuda.Event) -> None:
        """Hand a copy to the stream."""
        assert ticket.destination is not None
        source = self._pinned.segments[ticket.segment]
        ticket.begin_s = perf_counter()
        ticket.there = self._timed_events.take()
        try:
            self._stream.wait_event(free)
            if self._in_flight:
                ticket.since = self._in_flight[-1].there
            else:
                ticket.since = self._timed_events.take()
                ticket.since.record(self._stream)
            copy_to_device(ticket.destination, source, self._stream)
            ticket.there.record(self._stream)
        except RuntimeError as failure:
            ticket.error = self._refused(ticket, failure)
        self._in_flight.append(ticket)

    def _advance(self) -> None:
        """See what has arrived, and let prefetches follow."""
        in_flight, waiting = self._in_flight, self._ram.prefetches
        while in_flight and self._is_over(in_flight[0]):
            in_flight.popleft()
        while waiting and len(in_flight) < COPIES_AHEAD:
            self._issue_prefetch(waiting.popleft())

    def _is_over(self, ticket: _CudaTicket) -> bool:
        """Whether the oldest copy in flight has arrived, or never will; it is done then."""
        took_s = 0.0
        if ticket.error is None:
            assert ticket.since is not None
            assert ticket.there is not None
            try:
                if not ticket.there.query():  # type: ignore[no-untyped-call]
                    return False
                took_s = ticket.since.elapsed_time(ticket.there) / 1e3
                self._timed_events.give(ticket.since)
                if len(self._in_flight) == 1:  # else the next one is timed from there
                    self._timed_events.give(ticket.there)
            except RuntimeError as failure:
                ticket.error = self._refused(ticket, failure)
        ticket.begin_s = max(ticket.begin_s, self._ram.last_end_s)
        ticket.end_s = self._ram.last_end_s = min(ticket.begin_s + took_s, perf_counter())
        ticket.destination = ticket.since = ticket.there = None
        self._finished.append(ticket)
        ticket.done = True
        return True

    def _refused(self, ticket: QueuedTicket, failure: RuntimeError) -> TransferError:
        named = TransferError(
            f"{ticket.segment}: {self._device} did not take it "
            f"({str(failure).splitlines()[0]}); the device has failed, run again"
        )
        named.__cause__ = failure
        return named

    @override
    def _sleep_on(self, ticket: QueuedTicket) -> None:
        if ticket.lane is not self._ram:
            super()._sleep_on(ticket)
            return
        assert not ticket.cancelled, f"{ticket.segment}: waiting for a cancelled one"
        if ticket.lane.remove(ticket):
            ticket.priority = Priority.DEMAND
            self._issue_prefetch(ticket)
        since_s = perf_counter()
        while True:
            self._advance()
            if ticket.done:
                return
            # Asked behind that: the process may have been stopped (Ctrl-Z) since the last time.
            if perf_counter() - max(since_s, self._ram.last_end_s) > self._stall_s:
                raise self._stalled(ticket)
            if self._carriers:
                sleep(0)  # asking the device holds the interpreter's lock, which carriers need

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, QueuedTicket)
        if not ticket.done and ticket.lane is self._ram:
            self._advance()
        return ticket.done

    @override
    def _settle(self) -> None:
        self._advance()
        super()._settle()

    @override
    def _carrier(self, lane: int, number: int) -> Carry:
        # Both are of the thread: the current device, and that device's current stream.
        torch.cuda.set_device(self._stream.device)
        torch.cuda.set_stream(self._stream)
        bounce = self._pinned.bounces[number]
        there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

        def copy(ticket: QueuedTicket) -> None:
            assert isinstance(ticket, _CudaTicket)
            assert ticket.destination is not None
            assert ticket.free is not None
            source = self._pinned.fetch(ticket.segment, bounce)
            try:
                self._stream.wait_event(ticket.free)
                ticket.destination[: source.nbytes].copy_(source, non_blocking=True)
                there.record(self._stream)
                there.synchronize()
            except RuntimeError as failure:
                raise self._refused(ticket, failure) from failure

        return torch.inference_mode()(copy)

    @override
    def close(self) -> None:
        self._closed = True
        while self._ram.prefetches:
            self._drop(self._ram.prefetches.popleft())
        deadline_s = perf_counter() + self._stall_s
        while self._in_flight and perf_counter() < deadline_s:
            self._advance()
        super().close()

    @override
    def _release(self) -> None:
        # What was given up may still have its copy in flight.
        idle = not self._in_flight and not any(carrier.is_alive() for carrier in self._carriers)
        self._pinned.close(unpin=idle)


def copy_to_device(
    destination: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream
) -> None:
    """Queue a copy of all of ``source``, which is pinned, to where ``destination`` begins.

    Torch does not know of it: keep both until it is over.

    Raises
    ------
    RuntimeError
        When the device refuses.
    DeviceError
        When there is no library of the driver.
    """
    result = _copy_function()(
        destination.data_ptr(), source.data_ptr(), source.nbytes, stream.cuda_stream
    )
    if result != 0:
        raise RuntimeError(f"CUDA error {result} from cuMemcpyHtoDAsync")


@functools.cache
def _copy_function() -> ctypes._NamedFuncPointer:
    # Keeps the interpreter's lock: to have it back from a carrier may take longer than the call.
    try:
        found = ctypes.PyDLL(_DRIVER).cuMemcpyHtoDAsync_v2
    except OSError as failure:
        raise DeviceError(
            f"{_DRIVER} cannot be loaded ({failure}), expected the library of CUDA's driver; "
            "install NVIDIA's driver, or profile and plan with --device cpu"
        ) from failure
    found.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    found.restype = ctypes.c_int
    return found
