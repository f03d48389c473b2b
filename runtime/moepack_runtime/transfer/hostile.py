"""The transfer that engines are tested against: all that the contract allows, at its worst."""

from __future__ import annotations

from random import Random
from time import perf_counter, sleep

import torch
from typing_extensions import override

from moepack.segments import SegmentId
from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer

# How many tickets seem not to have arrived until they are waited for.
_SHY = 0.25

# How often cancelling fails.
_STUBBORN = 0.5

# All bits set is a NaN in bfloat16, float16, float32 and float64.
_POISON = 0xFF


class _HostileTicket(Ticket):
    __slots__ = ("arrived", "cancelled", "destination", "due_s", "inner", "scratch", "shy")

    def __init__(
        self,
        inner: Ticket,
        scratch: torch.Tensor,
        destination: torch.Tensor,
        due_s: float,
        *,
        shy: bool,
    ) -> None:
        super().__init__(inner.segment, inner.stored_bytes)
        self.inner = inner
        self.scratch = scratch
        self.destination = destination
        self.due_s = due_s
        self.shy = shy
        self.arrived = False
        self.cancelled = False


class HostileTransfer(Transfer):
    """Delivers nothing before it is waited for, in any order, after any delay.

    Memory is NaN when it is allocated. A destination turns to NaN when its segment is started and
    stays so until ``wait``: an engine that computes with a segment it has not waited for shows it
    in its result. One that writes into a destination on its way, or starts two segments into it,
    fails an assertion, as one that waits for what it has cancelled. Cancelling fails at random, as
    it may, and some segments never become ready unless they are waited for. A ticket's times are
    the inner one's.

    Parameters
    ----------
    inner
        What really moves the bytes, into memory apart. Closed with this transfer.
    seed
        Of the delays and refusals.
    max_delay_s
        The longest delay of one segment beyond the inner transfer's.
    shy
        The fraction of segments that never become ready by themselves.
    """

    def __init__(
        self, inner: Transfer, seed: int, *, max_delay_s: float = 1e-3, shy: float = _SHY
    ) -> None:
        self._inner = inner
        self._random = Random(seed)
        self._max_delay_s = max_delay_s
        self._shy = shy

    @override
    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self._inner.allocate(size_bytes).fill_(_POISON)

    @override
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        scratch = self._inner.allocate(destination.nbytes)
        inner = self._inner.start(segment, scratch, priority)
        destination = destination[: inner.stored_bytes].fill_(_POISON)
        due_s = perf_counter() + self._random.uniform(0.0, self._max_delay_s)
        shy = self._random.random() < self._shy
        return _HostileTicket(inner, scratch[: inner.stored_bytes], destination, due_s, shy=shy)

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _HostileTicket)
        if ticket.arrived:
            return
        assert not ticket.cancelled, f"{ticket.segment}: waiting for a cancelled one"
        sleep(max(0.0, ticket.due_s - perf_counter()))
        self._inner.wait(ticket.inner)
        assert bool((ticket.destination == _POISON).all()), (
            f"{ticket.segment}: its destination was written to while it was on its way"
        )
        ticket.destination.copy_(ticket.scratch)
        ticket.arrived = True
        ticket.begin_s, ticket.end_s = ticket.inner.begin_s, ticket.inner.end_s
        ticket.crossed_bytes = ticket.inner.crossed_bytes
        ticket.scratch = ticket.destination  # frees the memory apart

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _HostileTicket)
        if ticket.arrived:
            return True
        late = ticket.shy or perf_counter() < ticket.due_s
        return not late and self._inner.is_ready(ticket.inner)

    @override
    def cancel(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _HostileTicket)
        if not ticket.cancelled and self._random.random() >= _STUBBORN:
            ticket.cancelled = self._inner.cancel(ticket.inner)
        return ticket.cancelled

    @override
    def break_off(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _HostileTicket)
        self._inner.break_off(ticket.inner)

    @property
    @override
    def statistics(self) -> LinkStatistics:
        return self._inner.statistics

    @override
    def close(self) -> None:
        self._inner.close()
