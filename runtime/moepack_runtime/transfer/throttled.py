"""A link of a given bandwidth and latency, to study slow links on any machine."""

from __future__ import annotations

import contextlib
import heapq
import math
from collections import deque
from time import perf_counter, sleep

import torch
from typing_extensions import override

from moepack.errors import MoepackError
from moepack.segments import PIECE_BYTES, SegmentId
from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer

# Timers fire late by about this much; the rest of a sleep is spent looking at the clock.
_SPIN_S = 200e-6


class _ThrottledTicket(Ticket):
    __slots__ = ("cancelled", "inner", "priority", "start_s")

    def __init__(self, inner: Ticket, priority: Priority, start_s: float) -> None:
        super().__init__(inner.segment, inner.stored_bytes)
        self.inner = inner
        self.priority = priority
        self.start_s = start_s
        self.begin_s = math.inf  # until its turn on the link has come
        self.end_s = math.inf
        self.cancelled = False


class ThrottledTransfer(Transfer):
    """One serial link in front of another transfer; never faster than that.

    The link carries one segment at a time, demands before prefetches, each for ``latency_s +
    bytes / rate_bytes_per_s``. It is a calculation, not a thread: whenever it is asked, it works
    out what such a link would have done by now, and a wait sleeps until the calculated arrival.

    ``cancel`` waits for the inner transfer where that is already past cancelling. A ticket's times
    are those of the calculated link.

    Parameters
    ----------
    inner
        What really moves the bytes. Closed with this transfer.
    rate_bytes_per_s, latency_s
        Of the link.
    """

    def __init__(self, inner: Transfer, rate_bytes_per_s: float, latency_s: float = 0.0) -> None:
        if not (rate_bytes_per_s > 0 and 0 <= latency_s < math.inf):
            raise ValueError(f"no link has {rate_bytes_per_s} bytes/s and {latency_s} s latency")
        self._inner = inner
        self._rate_bytes_per_s = rate_bytes_per_s
        self._latency_s = latency_s
        self._queue: list[tuple[Priority, int, _ThrottledTicket]] = []  # a heap, with stale entries
        self._sequence = 0
        self._free_s = 0.0  # when the link has carried everything whose turn has come
        self._carrying: deque[_ThrottledTicket] = deque()  # had their turn, not yet counted
        self._carried = LinkStatistics(0, 0, 0.0)

    @override
    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self._inner.allocate(size_bytes)

    @override
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        inner = self._inner.start(segment, destination, priority)
        now_s = perf_counter()
        # First: what was queued before this one may have had its turn before it came.
        self._advance(now_s)
        ticket = _ThrottledTicket(inner, priority, now_s)
        self._push(ticket)
        return ticket

    def _push(self, ticket: _ThrottledTicket) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (ticket.priority, self._sequence, ticket))

    def _advance(self, now_s: float) -> None:
        """Give the link to everybody whose turn has come by ``now_s``; count what has arrived."""
        while self._queue and self._free_s <= now_s:
            self._carry_next()
        while self._carrying and self._carrying[0].end_s <= now_s:
            ticket = self._carrying.popleft()
            self._carried = LinkStatistics(
                self._carried.bytes + ticket.crossed_bytes,
                self._carried.reads + 1,
                self._carried.busy_s + ticket.end_s - ticket.begin_s,
            )

    def _carry_next(self) -> None:
        ticket = heapq.heappop(self._queue)[2]
        if ticket.cancelled or ticket.end_s < math.inf:
            return
        ticket.begin_s = max(self._free_s, ticket.start_s)
        service_s = self._latency_s + ticket.stored_bytes / self._rate_bytes_per_s
        ticket.end_s = self._free_s = ticket.begin_s + service_s
        self._carrying.append(ticket)

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _ThrottledTicket)
        assert not ticket.cancelled, f"{ticket.segment}: waiting for a cancelled one"
        self._advance(perf_counter())
        if ticket.end_s == math.inf:
            if ticket.priority is not Priority.DEMAND:
                ticket.priority = Priority.DEMAND
                self._push(ticket)
            # Nobody can start anything while the consumer waits: the order is settled.
            while ticket.end_s == math.inf:
                self._carry_next()
        self._inner.wait(ticket.inner)
        _sleep_until(ticket.end_s)

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _ThrottledTicket)
        now_s = perf_counter()
        self._advance(now_s)
        return ticket.end_s <= now_s and self._inner.is_ready(ticket.inner)

    @override
    def cancel(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _ThrottledTicket)
        self._advance(perf_counter())
        if ticket.cancelled or ticket.end_s < math.inf:
            return ticket.cancelled
        if not self._inner.cancel(ticket.inner):
            # The bytes are on their way in truth though not on the link: see them land.
            with contextlib.suppress(MoepackError):
                self._inner.wait(ticket.inner)
        ticket.cancelled = True
        return True

    @override
    def break_off(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _ThrottledTicket)
        self._inner.break_off(ticket.inner)
        now_s = perf_counter()
        self._advance(now_s)
        # What has had its turn and is not the last has ended.
        if not self._carrying or ticket is not self._carrying[-1] or ticket.end_s <= now_s:
            return
        # After a wait that failed its turn may be settled and yet to come.
        share = max(0.0, now_s - ticket.begin_s) / (ticket.end_s - ticket.begin_s)
        pieces = math.ceil(share * ticket.stored_bytes / PIECE_BYTES)
        ticket.crossed_bytes = min(pieces * PIECE_BYTES, ticket.stored_bytes)
        share = ticket.crossed_bytes / ticket.stored_bytes
        ticket.end_s = self._free_s = ticket.begin_s + share * (ticket.end_s - ticket.begin_s)

    @property
    @override
    def statistics(self) -> LinkStatistics:
        """Of the calculated link; ``busy_s`` of the inner one where that was busy for longer."""
        now_s = perf_counter()
        self._advance(now_s)
        begun_s = sum(max(0.0, now_s - ticket.begin_s) for ticket in self._carrying)
        busy_s = max(self._carried.busy_s + begun_s, self._inner.statistics.busy_s)
        return self._carried._replace(busy_s=busy_s)

    @override
    def close(self) -> None:
        self._inner.close()


def _sleep_until(deadline_s: float) -> None:
    """Return within microseconds after the deadline, on the clock of ``perf_counter``."""
    remaining_s = deadline_s - perf_counter()
    if remaining_s > _SPIN_S:
        sleep(remaining_s - _SPIN_S)
    while perf_counter() < deadline_s:
        sleep(0)  # lets the readers have the interpreter
