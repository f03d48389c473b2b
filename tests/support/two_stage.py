"""A disk, a bus and one processor, event by event: the plain simulation of three tiers.

The engine's transfer to a device, with one segment in the hands of each of its lanes at a time: the
lane from RAM until its copy is over, the lane from the disk until its read is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from tests.support.simulation import Costs, Seen

NEVER = 1e30


@dataclass
class Segment:
    """One segment of an expert: what it computes, its copy (0 where it is there), its read.

    ``ahead`` is the place, among what was asked for ahead, of the transfer that brings it.
    """

    compute: float
    fetch: float
    read: float = 0.0
    ahead: int | None = None


Experts = Sequence[Sequence[Segment]]


@dataclass
class Ticket:
    """Something asked for; ``taken`` by its lane, ``came`` to the bus, ``done``: the times."""

    copy: float
    read: float
    asked: float
    taken: float = NEVER
    came: float = NEVER
    done: float = NEVER


@dataclass
class Machine:
    """The lanes and the bus, run on in steps of whatever happens next."""

    demands: list[Ticket] = field(default_factory=list)
    prefetches: list[Ticket] = field(default_factory=list)
    at_bus: list[Ticket] = field(default_factory=list)
    reading: Ticket | None = None
    from_ram: Ticket | None = None
    crossing: Ticket | None = None
    now: float = 0.0
    bounces: int = 2
    in_bounces: list[Ticket] = field(default_factory=list)

    def _queued(self, disk: bool) -> Ticket | None:
        for queue in (self.demands, self.prefetches):
            for ticket in queue:
                if ticket.taken == NEVER and (ticket.read > 0) == disk and ticket.asked <= self.now:
                    return ticket
        return None

    def settle(self) -> None:
        """Whatever begins now."""
        self.in_bounces = [each for each in self.in_bounces if each.done > self.now]
        room = self.reading is None and len(self.in_bounces) < self.bounces
        if room and (ticket := self._queued(disk=True)) is not None:
            ticket.taken = self.now
            self.reading = ticket
            self.in_bounces.append(ticket)
        if self.from_ram is None and (ticket := self._queued(disk=False)) is not None:
            ticket.taken = ticket.came = self.now
            self.from_ram = ticket
            self.at_bus.append(ticket)
        if self.crossing is None and self.at_bus:
            # What came first; from RAM where both came at once.
            self.crossing = min(self.at_bus, key=lambda each: (each.came, each.read > 0))
            self.at_bus.remove(self.crossing)
            self.crossing.done = self.now + self.crossing.copy

    def _next(self) -> float:
        ends = [NEVER]
        if self.reading is not None:
            ends.append(self.reading.taken + self.reading.read)
        if self.crossing is not None:
            ends.append(self.crossing.done)
        ends += [
            each.asked
            for each in (*self.demands, *self.prefetches)
            if each.taken == NEVER and each.asked > self.now
        ]
        return min(ends)

    def run_to(self, until: float) -> None:
        """Let everything happen that does before a moment; what ends then has not been seen off."""
        while self.now < until:
            self.settle()
            then = self._next()
            self.now = min(then, until)
            self._see_off()

    def _see_off(self) -> None:
        if self.crossing is not None and self.crossing.done <= self.now:
            if self.crossing is self.from_ram:
                self.from_ram = None
            self.crossing = None
        if self.reading is not None and self.reading.taken + self.reading.read <= self.now:
            self.reading.came = self.now
            self.at_bus.append(self.reading)
            self.reading = None

    def run_for(self, ticket: Ticket) -> float:
        """Until one is there."""
        while ticket.done == NEVER:
            self._see_off()
            self.settle()
            if ticket.done == NEVER:
                self.now = self._next()
                assert self.now < NEVER, "it was never asked for"
        self.run_to(ticket.done)
        return ticket.done


class TwoStage:
    """Passes over layers, as an engine with frames runs them."""

    def __init__(
        self, *, as_ready: bool, frames: int, costs: Costs | None = None, bounces: int = 2
    ) -> None:
        self.now = 0.0
        self.machine = Machine(bounces=bounces)
        self.costs = costs or Costs()
        self.as_ready = as_ready
        self.frames = frames
        self.ahead: list[list[Ticket | None]] = []

    def run(
        self,
        before: float,
        guess: float,
        after: float,
        experts: Experts,
        nexts: Sequence[Sequence[tuple[float, float]]],
    ) -> Seen:
        """One pass; ``nexts`` are copy and read of what is asked for ahead of the next one."""
        routed = self.now + before
        self.machine.run_to(routed)
        one = _Pass(self, experts, routed)
        one.ask(nexts, routed + guess)
        one.seen.begin = routed + guess + after + self.costs.of_ahead(one.seen)
        one.seen.end = self.now = one.compute()
        self.machine.demands.clear()
        return one.seen


class _Pass:
    """One pass, from its routing on."""

    def __init__(self, engine: TwoStage, experts: Experts, routed: float) -> None:
        self._engine = engine
        self._experts = experts
        self._routed = routed
        self.seen = Seen(routed, 0.0, 0.0)
        tickets = [ticket for expert in engine.ahead for ticket in expert]
        begun = {n: t for n, t in enumerate(tickets) if t is not None and t.taken < routed}
        engine.machine.prefetches.clear()
        self.seen.begun = set(begun)
        #: Of each expert the ticket that brings each segment.
        self._brings: list[list[Ticket | None]] = [
            [begun.get(-1 if p.ahead is None or not p.fetch else p.ahead) for p in expert]
            for expert in experts
        ]
        self._early = [[t is not None for t in found] for found in self._brings]
        self._flying = [any(part.fetch for part in expert) for expert in experts]
        # What is fetched, in the order of asking; first what comes already.
        coming = [n for n, early in enumerate(self._early) if any(early)]
        self._order = sorted(coming, key=lambda n: self._rank(n, begun))
        self._missing = [n for n in range(len(experts)) if self._flying[n] and n not in coming]
        self._free = engine.frames - len(coming)
        self._note()

    def _rank(self, number: int, begun: Collection[int]) -> int:
        parts = self._experts[number]
        return min(p.ahead for p in parts if p.fetch and p.ahead is not None and p.ahead in begun)

    def _note(self) -> None:
        place = 0
        self._places: list[range] = []
        for expert, tickets in zip(self._experts, self._brings, strict=True):
            self._places.append(range(place, place + len(expert)))
            for part, ticket in zip(expert, tickets, strict=True):
                if part.fetch and ticket is None:
                    self.seen.demanded.add(place)
                if not part.fetch or (ticket is not None and ticket.done <= self._routed):
                    self.seen.ready.add(place)
                place += 1

    def ask(self, nexts: Sequence[Sequence[tuple[float, float]]], asked: float) -> None:
        """The parts that complete what is coming, then whatever there are frames for."""
        for number in self._order:
            self._demand(number, self._routed)
        self._nexts, self._asked = nexts, asked
        self._engine.ahead = [[None] * len(expert) for expert in nexts]
        self._unasked = [n for n, expert in enumerate(nexts) if any(copy for copy, _ in expert)]
        self._fetch_on(self._routed)

    def _demand(self, number: int, at: float) -> None:
        tickets = self._brings[number]
        for place, part in enumerate(self._experts[number]):
            if part.fetch and tickets[place] is None:
                tickets[place] = ticket = Ticket(part.fetch, part.read, at)
                self._engine.machine.demands.append(ticket)

    def _fetch_on(self, at: float) -> None:
        while self._missing and self._free:
            self._free -= 1
            self._order.append(self._missing[0])
            self._demand(self._missing.pop(0), at)
        while self._unasked and self._free and not self._missing:
            self._free -= 1
            number = self._unasked.pop(0)
            for place, (copy, read) in enumerate(self._nexts[number]):
                if copy:
                    ticket = Ticket(copy, read, max(at, self._asked))
                    self._engine.ahead[number][place] = ticket
                    self._engine.machine.prefetches.append(ticket)

    def compute(self) -> float:
        """Everything; when it ends."""
        now = self.seen.begin
        if not self._engine.as_ready:
            for number, expert in enumerate(self._experts):
                now = self._consume(number, range(len(expert)), now)
            return now
        now += sum(p.compute for expert in self._experts for p in expert if not p.fetch)
        while self._order:
            self._engine.machine.run_to(now)
            number = next((n for n in self._order if self._is_there(n, now)), self._order[0])
            parts = [place for place, part in enumerate(self._experts[number]) if part.fetch]
            parts.sort(key=lambda place: not self._early[number][place])
            now = self._consume(number, parts, now)
        return now

    def _is_there(self, number: int, now: float) -> bool:
        return all(ticket is None or ticket.done <= now for ticket in self._brings[number])

    def _consume(self, number: int, places: Iterable[int], now: float) -> float:
        machine = self._engine.machine
        for place in places:
            part, ticket = self._experts[number][place], self._brings[number][place]
            if part.fetch:
                assert ticket is not None, "consumed before it has a frame"
                now = max(now, machine.run_for(ticket))
            costs = self._engine.costs.of_segment(self.seen, self._places[number][place])
            now += part.compute + costs
        if self._flying[number]:
            self._order.remove(number)
            self._free += 1
            machine.run_to(now)
            self._fetch_on(now)
        return now
