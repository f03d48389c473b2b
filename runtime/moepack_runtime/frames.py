"""Frames: memory of the fast tier through which experts pass on their way from the link."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from moepack.segments import Part
from moepack_runtime.observers import Timeline
from moepack_runtime.pieces import Piece
from moepack_runtime.transfer import Ticket, Transfer


class Fetch:
    """An expert in flight, or there: its frame, and a ticket for each part that was missing.

    ``demanded``: the parts that were asked for once the routing was known.
    """

    __slots__ = ("demanded", "expert", "frame", "tickets")

    def __init__(self, expert: int, frame: Piece, tickets: dict[Part, Ticket]) -> None:
        self.expert = expert
        self.frame = frame
        self.tickets = tickets
        self.demanded: set[Part] = set()


class Frames:
    """The free frames, and those that come free once something that nobody wants has arrived.

    Parameters
    ----------
    frames
        Each takes one whole expert of any layer.

    Attributes
    ----------
    timeline : Timeline or None
        Is shown what arrives unwanted.
    """

    def __init__(self, frames: Iterable[Piece], transfer: Transfer) -> None:
        self._free = deque(frames)
        self._transfer = transfer
        self._unwanted: deque[tuple[Piece, list[Ticket]]] = deque()
        self.timeline: Timeline | None = None

    def take(self) -> Piece | None:
        """A free frame, or None."""
        if self._unwanted and not self._free:
            self._collect()
        return self._free.popleft() if self._free else None

    def give(self, frame: Piece) -> None:
        """Take a frame back that nothing is written into any more, or another of its size."""
        self._free.append(frame)

    def abandon(self, fetch: Fetch) -> list[Ticket]:
        """Take back the frame of a fetch that nobody wants: what is queued does not come.

        Returns
        -------
        list of Ticket
            What crosses the link all the same, or a part of it: it was under way.
        """
        under_way = [t for t in fetch.tickets.values() if not self._transfer.cancel(t)]
        for ticket in under_way:
            self._transfer.break_off(ticket)
        if under_way:
            self._unwanted.append((fetch.frame, under_way))
            self._collect()
        else:
            self._free.append(fetch.frame)
        return under_way

    def _collect(self) -> None:
        """Take back the frames of what has arrived unwanted."""
        for _ in range(len(self._unwanted)):
            frame, tickets = self._unwanted.popleft()
            if all(map(self._transfer.is_ready, tickets)):
                self._let_go(frame, tickets)
            else:
                self._unwanted.append((frame, tickets))

    def wait(self) -> Ticket | None:
        """Wait until one more frame is free: what arrived in it; None where none is to come."""
        if not self._unwanted:
            return None
        frame, tickets = self._unwanted.popleft()
        self._let_go(frame, tickets)
        return tickets[-1]

    def _let_go(self, frame: Piece, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._transfer.wait(ticket)
            if self.timeline is not None:
                self.timeline.fetched(ticket, "ahead_wasted")
        self._free.append(frame)
