"""One link and one processor, expert by expert: the plain simulation that replays are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Segment:
    """One segment of an expert: what it computes, its fetch (0 where it is there).

    ``ahead`` is the place, among what was asked for ahead, of the transfer that brings it.
    """

    compute: float
    fetch: float
    ahead: int | None = None


Experts = Sequence[Sequence[Segment]]


@dataclass
class Seen:
    """What one pass did, by the place of a segment or of what was asked for ahead."""

    routed: float
    end: float
    ready: set[int] = field(default_factory=set)
    demanded: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)


class Simulation:
    """One serial link and one compute queue."""

    def __init__(self, *, as_ready: bool, frames: int) -> None:
        self.now = self.link = self.asked = 0.0
        self._as_ready = as_ready
        self._frames = frames

    def run(self, before: float, after: float, experts: Experts, ahead: Sequence[float]) -> Seen:
        """One pass: ``ahead`` are the seconds of what was asked for ahead, 0 for nothing."""
        routed = self.now + before
        seen = Seen(routed, 0.0)
        # What was asked for ahead, one after the other, as long as the routing is not known.
        clock = max(self.link, self.asked)
        came: dict[int, float] = {}
        for number, seconds in enumerate(ahead):
            if seconds == 0:
                continue
            if clock >= routed:
                break
            clock += seconds
            came[number] = self.link = clock
            seen.begun.add(number)
        place = 0
        for expert in experts:
            for part in expert:
                arrival = None if part.ahead is None else came.get(part.ahead)
                if part.fetch == 0 or (arrival is not None and arrival <= routed):
                    seen.ready.add(place)
                elif arrival is None:
                    seen.demanded.add(place)
                place += 1
        consume = self._consume_as_ready if self._as_ready else self._consume_in_order
        seen.end = self.now = consume(experts, came, routed, after)
        self.asked = routed
        return seen

    def _consume_as_ready(
        self, experts: Experts, came: dict[int, float], routed: float, after: float
    ) -> float:
        """What is there first, then each segment as it arrives."""
        computed = routed + after
        late = []
        for part in (part for expert in experts for part in expert):
            arrival = None if part.ahead is None else came.get(part.ahead)
            if part.fetch == 0 or (arrival is not None and arrival <= routed):
                computed += part.compute
            elif arrival is not None:
                late.append((arrival, part.compute))
            else:
                self.link = max(self.link, routed) + part.fetch
                late.append((self.link, part.compute))
        for arrival, seconds in sorted(late):
            computed = max(computed, arrival) + seconds
        return computed

    def _consume_in_order(
        self, experts: Experts, came: dict[int, float], routed: float, after: float
    ) -> float:
        """Expert by expert; a fetch waits for the frame of the one so many fetches before it."""
        computed = routed
        free = [routed] * self._frames
        fetched = 0
        for expert in experts:
            arrivals = [0.0 if part.ahead is None else came.get(part.ahead, 0.0) for part in expert]
            demanded = [part.fetch > 0 and part.ahead not in came for part in expert]
            if any(demanded):
                self.link = max(self.link, routed, free[fetched % self._frames])
            for place, part in enumerate(expert):
                if demanded[place]:
                    self.link += part.fetch
                    arrivals[place] = self.link
            for part, arrival in zip(expert, arrivals, strict=True):
                there = routed if part.fetch == 0 else arrival
                computed = max(computed, there) + part.compute
            if any(demanded):
                free[fetched % self._frames] = computed
                fetched += 1
        return computed + after
