"""The transfer that engines are tested against: all that the contract allows, at its worst."""

from __future__ import annotations

from random import Random
from time import perf_counter, sleep

import torch
from typing_extensions import override

from moepack.segments import SegmentId
from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer

# All bits set is a NaN in bfloat16, float16, float32 and float64.
_POISON = 0xFF


class _HostileTicket(Ticket):
    __slots__ = ("arrived", "destination", "due_s", "inner", "scratch")

    def __init__(
        self, inner: Ticket, scratch: torch.Tensor, destination: torch.Tensor, due_s: float
    ) -> None:
        super().__init__(inner.segment, inner.stored_bytes)
        self.inner = inner
        self.scratch = scratch
        self.destination = destination
        self.due_s = due_s
        self.arrived = False


class HostileTransfer(Transfer):
    """Delivers nothing before it is waited for, in any order, after any delay.

    Memory is NaN when it is allocated. A destination turns to NaN when its segment is started and
    stays so until ``wait``: an engine that computes with a segment it has not waited for shows it
    in its result. One that writes into a destination on its way, or starts two segments into it,
    fails an assertion. Cancelling fails at random, as it may.

    Parameters
    ----------
    inner
        What really moves the bytes, into memory apart. Closed with this transfer.
    seed
        Of the delays and refusals.
    max_delay_s
        The longest delay of one segment beyond the inner transfer's.
    """

    def __init__(self, inner: Transfer, seed: int, *, max_delay_s: float = 1e-3) -> None:
        self._inner = inner
        self._random = Random(seed)
        self._max_delay_s = max_delay_s

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
        return _HostileTicket(inner, scratch[: inner.stored_bytes], destination, due_s)

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _HostileTicket)
        if ticket.arrived:
            return
        sleep(max(0.0, ticket.due_s - perf_counter()))
        self._inner.wait(ticket.inner)
        assert bool((ticket.destination == _POISON).all()), (
            f"{ticket.segment}: its destination was written to while it was on its way"
        )
        ticket.destination.copy_(ticket.scratch)
        ticket.arrived = True
        ticket.scratch = ticket.destination  # frees the memory apart

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _HostileTicket)
        return perf_counter() >= ticket.due_s and self._inner.is_ready(ticket.inner)

    @override
    def cancel(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _HostileTicket)
        return self._random.random() < 0.5 and self._inner.cancel(ticket.inner)

    @property
    @override
    def statistics(self) -> LinkStatistics:
        return self._inner.statistics

    @override
    def close(self) -> None:
        self._inner.close()
