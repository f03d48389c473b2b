"""What is fetched for a layer before its routing is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from moepack.plan import PrefetchMode
from moepack.segments import Part, SegmentId
from moepack_runtime.frames import Fetch, Frames
from moepack_runtime.slots import LayerSlots
from moepack_runtime.transfer import Priority, Ticket, Transfer


class Guess(NamedTuple):
    """The experts that a layer will probably need.

    Attributes
    ----------
    ranking : sequence of int
        In the order in which they are to come.
    mode : str
        Which parts of them are fetched; ``off`` for none.
    most : int
        How many of them may hold a frame before the layer's turn.
    named : collection of int or None
        Those that count as predicted, for one token; None where that is not asked.
    """

    ranking: Sequence[int]
    mode: PrefetchMode
    most: int
    named: Collection[int] | None


class Claim(NamedTuple):
    """What fetching ahead has brought for a pass.

    Attributes
    ----------
    fetches : dict
        Needed expert -> its fetch, under way or there.
    wasted : list of Ticket
        What crosses the link though nobody needs it.
    named : collection of int or None
        Of the guess, where there was one.
    """

    fetches: dict[int, Fetch]
    wasted: list[Ticket]
    named: Collection[int] | None


class Ahead:
    """The prefetches of one layer at a time: the next one to run."""

    def __init__(self, frames: Frames, transfer: Transfer) -> None:
        self._frames = frames
        self._transfer = transfer
        self._layer: LayerSlots | None = None
        self._most = 0
        self._named: Collection[int] | None = None
        self._queue: deque[tuple[int, list[Part]]] = deque()
        self._fetches: dict[int, Fetch] = {}

    def ask(self, layer: LayerSlots, guess: Guess) -> None:
        """Queue what a guess lacks; :meth:`push` lets it go."""
        assert not self._fetches, "the prefetches of a layer have not been claimed"
        self._layer = layer
        self._most = guess.most
        self._named = guess.named
        self._queue.clear()
        if guess.mode == "off":
            return
        for expert in dict.fromkeys(guess.ranking):  # a frame each, whatever a predictor says
            missing = layer.missing(expert)
            if not missing or (guess.mode == "bottoms" and "top" in missing and layer.is_cut):
                continue
            if len(self._queue) == guess.most:
                break
            self._queue.append((expert, missing))

    def push(self) -> None:
        """Fetch on, as far as there are frames."""
        while self._queue and len(self._fetches) < self._most:
            frame = self._frames.take()
            if frame is None:
                return
            assert self._layer is not None
            expert, missing = self._queue.popleft()
            tickets = {
                part: self._transfer.start(
                    SegmentId(self._layer.number, expert, part),
                    self._layer.room(frame, expert, part),
                    Priority.PREFETCH,
                )
                for part in missing
            }
            self._fetches[expert] = Fetch(expert, frame, tickets)

    def claim(self, layer: LayerSlots, needed: Collection[int]) -> Claim:
        """End fetching ahead for a layer whose routing is known.

        What is needed and has not begun goes back, to be demanded in its turn; what is not needed
        comes only if it is under way.
        """
        mine = layer is self._layer
        fetches, wasted = {}, []
        for expert, fetch in self._fetches.items():
            if mine and expert in needed and self._begun(fetch):
                fetches[expert] = fetch
            else:
                wasted += self._frames.abandon(fetch)
        named = self._named if mine else None
        self._fetches, self._layer, self._named = {}, None, None
        self._queue.clear()
        return Claim(fetches, wasted, named)

    def forget(self) -> None:
        """Take back all that was asked for; what is under way comes for nobody."""
        for fetch in self._fetches.values():
            self._frames.abandon(fetch)
        self._fetches, self._layer, self._named = {}, None, None
        self._queue.clear()

    def _begun(self, fetch: Fetch) -> bool:
        """Whether a part is under way: then the others stay queued, and are demanded by waiting."""
        cancelled = [
            part for part, ticket in fetch.tickets.items() if self._transfer.cancel(ticket)
        ]
        for part in cancelled:
            del fetch.tickets[part]
        return bool(fetch.tickets)
