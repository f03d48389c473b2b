"""One link and one processor, expert by expert: the plain simulation that replays are held to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple


@dataclass
class Segment:
    """One segment of an expert: what it computes, its fetch (0 where it is there).

    ``ahead`` is the place, among what was asked for ahead, of the transfer that brings it.
    """

    compute: float
    fetch: float
    ahead: int | None = None


Experts = Sequence[Sequence[Segment]]


class Costs(NamedTuple):
    """What a transfer costs the processor, and the first of a pass besides.

    ``demand`` and ``burst``: of those that are demanded. ``ahead`` and ``ahead_burst``: of those
    that were begun ahead, the latter only where nothing is demanded.
    """

    demand: float = 0.0
    burst: float = 0.0
    ahead: float = 0.0
    ahead_burst: float = 0.0

    def of_ahead(self, seen: Seen) -> float:
        """Of all that was begun ahead in a pass."""
        alone = bool(seen.begun) and not seen.demanded
        return self.ahead * len(seen.begun) + self.ahead_burst * alone

    def of_segment(self, seen: Seen, place: int) -> float:
        """Of one segment."""
        if place not in seen.demanded:
            return 0.0
        return self.demand + self.burst * (place == min(seen.demanded))


@dataclass
class Seen:
    """What one pass did, by the place of a segment or of what was asked for ahead.

    ``computed``: its segments, with what their transfers cost.
    """

    routed: float
    begin: float
    end: float
    computed: float = 0.0
    ready: set[int] = field(default_factory=set)
    demanded: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    saved: float = 0.0


class Simulation:
    """One serial link, one compute queue, and frames that each hold one expert in flight.

    Where transfers go in pieces of ``piece`` seconds, one that turns out wrong ends with the piece
    that is under way.
    """

    def __init__(
        self,
        *,
        as_ready: bool,
        frames: int,
        costs: Costs | None = None,
        piece: float | None = None,
    ) -> None:
        self.now = self.link = 0.0
        self._as_ready = as_ready
        self._frames = frames
        self.costs = costs or Costs()
        self._piece = piece
        # When each frame may be filled ahead of the next routing, in the order of being taken.
        self._frees = [0.0] * frames

    def run(
        self,
        before: float,
        guess: float,
        after: float,
        experts: Experts,
        ahead: Sequence[Sequence[float]],
    ) -> Seen:
        """One pass: ``ahead`` are the seconds of what was asked for ahead, expert by expert.

        0 stands for nothing; the places of segments run on from one expert to the next.
        """
        routed = self.now + before
        seen = Seen(routed, 0.0, 0.0)
        came = self._fetch_ahead(routed, ahead)
        seen.begun = set(came)
        arrives: list[list[float | None]] = []  # None: still to be asked for
        place = 0
        for expert in experts:
            arrives.append([])
            for part in expert:
                arrival = (
                    routed
                    if part.fetch == 0
                    else came.get(-1 if part.ahead is None else part.ahead)
                )
                arrives[-1].append(arrival)
                if arrival is None:
                    seen.demanded.add(place)
                elif arrival <= routed:
                    seen.ready.add(place)
                place += 1
        used = {part.ahead for expert in experts for part in expert if part.fetch}
        seen.saved = self._break_off(routed, ahead, came, used)
        seen.begin = routed + guess + after + self.costs.of_ahead(seen)
        places = itertools.count()
        experts = [
            [
                replace(part, compute=part.compute + self.costs.of_segment(seen, next(places)))
                for part in expert
            ]
            for expert in experts
        ]
        seen.computed = sum(part.compute for expert in experts for part in expert)
        seen.end = self.now = self._consume(experts, arrives, routed, seen.begin)
        self._frees = [max(free, routed + guess) for free in self._frees]
        return seen

    def _fetch_ahead(self, routed: float, ahead: Sequence[Sequence[float]]) -> dict[int, float]:
        """When what was begun before the routing was known arrives, by its place."""
        came: dict[int, float] = {}
        frees = iter(self._frees)
        place = -1
        for expert in ahead:
            free = next(frees) if any(expert) else 0.0
            for seconds in expert:
                place += 1
                start = max(self.link, free)
                if seconds and start >= routed:
                    return came
                if seconds:
                    came[place] = self.link = start + seconds
        return came

    def _break_off(
        self,
        routed: float,
        ahead: Sequence[Sequence[float]],
        came: dict[int, float],
        used: set[int | None],
    ) -> float:
        """End what is under way for nobody; the seconds of the link that this saves."""
        last = max(came, default=None)
        if self._piece is None or last is None or last in used or came[last] <= routed:
            return 0.0
        now = came[last] - [seconds for expert in ahead for seconds in expert][last]
        while now < routed:
            now += self._piece
        saved = max(0.0, came[last] - now)
        self.link -= saved
        return saved

    def _consume(
        self, experts: Experts, arrives: list[list[float | None]], routed: float, begin: float
    ) -> float:
        """Compute everything; leaves in ``_frees`` the frames as they come free."""
        fetched = [any(part.fetch for part in expert) for expert in experts]
        brought = [
            has and any(a is not None for p, a in zip(e, arrival, strict=True) if p.fetch)
            for e, arrival, has in zip(experts, arrives, fetched, strict=True)
        ]
        # The rest of what is coming needs no frame of its own, and goes first.
        for number, expert in enumerate(experts):
            if brought[number]:
                self._ask(expert, arrives[number], routed)
        free = [routed] * (self._frames - sum(brought))
        waiting = [n for n in range(len(experts)) if fetched[n] and not brought[n]]

        def fetch_on() -> None:
            while waiting and free:
                number = waiting.pop(0)
                self._ask(experts[number], arrives[number], free.pop(0))

        fetch_on()
        order = list(range(len(experts)))
        now = begin
        if self._as_ready:
            for expert in experts:
                now += sum(part.compute for part in expert if part.fetch == 0)
            order = sorted((n for n in order if brought[n]), key=lambda n: _first(experts[n]))
            order += [n for n in range(len(experts)) if fetched[n] and not brought[n]]
        for number in order:
            for part, arrival in zip(experts[number], arrives[number], strict=True):
                if self._as_ready and part.fetch == 0:
                    continue
                assert arrival is not None, "consumed before it has a frame"
                now = max(now, arrival) + part.compute
            if fetched[number]:
                free.append(now)
                fetch_on()
        self._frees = free
        return now

    def _ask(self, expert: Sequence[Segment], arrives: list[float | None], begin: float) -> None:
        """Fetch the parts of an expert that nothing has brought."""
        for place, part in enumerate(expert):
            if arrives[place] is None:
                self.link = max(self.link, begin) + part.fetch
                arrives[place] = self.link


def _first(expert: Sequence[Segment]) -> int:
    return min(part.ahead for part in expert if part.fetch and part.ahead is not None)
