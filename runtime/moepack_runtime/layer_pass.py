"""One pass over one layer's experts: what is there, what comes, and in which order it is computed.

A pass begins when its routing is known. What was fetched ahead for it is claimed; what is missing
is demanded, in ascending order of experts, as frames come free; behind the demands go the
prefetches for the next layer.

Where the placement says so, a missing expert of a decoded token that is not on its way may be
replaced by its low copy, or left out (:mod:`moepack.on_miss`). A low copy is computed with where it
arrives, in a frame, and never moves into a slot: what is resident stays exact, so that an expert
that matters more to the next token is not taken for one that is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from moepack.on_miss import EXACT, LEFT_OUT, LOWERED, fates
from moepack.residency import Access
from moepack.segments import BASE, LOW, Part, SegmentId
from moepack_runtime.ffn import FfnWeights, QuantisedFfn
from moepack_runtime.frames import Fetch
from moepack_runtime.observers import PassFound
from moepack_runtime.pass_report import PassReport
from moepack_runtime.slots import LayerSlots
from moepack_runtime.transfer import Ticket

if TYPE_CHECKING:
    from moepack_runtime.experts import ExpertMemory


class Arrival(NamedTuple):
    """One segment that can be computed with."""

    expert: int
    part: Part
    weights: FfnWeights | QuantisedFfn


class LayerPass:
    """One pass over one layer: hands out its segments, and fetches on meanwhile."""

    def __init__(
        self,
        memory: ExpertMemory,
        layer: LayerSlots,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[float] | None = None,
    ) -> None:
        self._memory = memory
        self._transfer = memory.transfer
        self._frames = memory.frames
        self._timeline = memory.timeline
        self._layer = layer
        self._needed = sorted({expert for experts in tokens for expert in experts})
        claim = memory.ahead.claim(layer, self._needed)
        self._fetches = claim.fetches
        self._fates = {} if weights is None else self._find_fates(tokens[0], weights)
        self._access: dict[Part, Access] = {
            part: slots.cache.step(tokens, self._fates) for part, slots in layer.slots.items()
        }
        brought = [fetch.tickets.values() for fetch in claim.fetches.values()]
        self._begun = [ticket.segment for tickets in (*brought, claim.wasted) for ticket in tickets]
        self._demanded: list[SegmentId] = []
        self._wasted = claim.wasted
        self._used_bytes = self._demand_bytes = 0
        self._wait_s = 0.0
        self._tokens = tokens
        self._named = claim.named
        self._computing: tuple[SegmentId, float] | None = None
        self._lacking = self._find_lacking()
        self._unready = {expert for expert in self._lacking if not self._is_ready(expert)}
        #: Missing parts that do not come, and are not computed.
        self.left_out: set[tuple[int, Part]] = set()
        for expert, fate in self._fates.items():
            if fate == LEFT_OUT:
                self.left_out.update((expert, part) for part in self._lacking.pop(expert))
        self._missing = deque(expert for expert in self._lacking if expert not in self._fetches)
        for expert, fetch in self._fetches.items():
            self._demand(expert, fetch)  # a part that had not begun
        self._fetch_on()

    def _find_fates(self, token: Sequence[int], weights: Sequence[float]) -> dict[int, int]:
        """What is not exact of a token's experts: missing, not on its way, and not worth it."""
        rule = self._memory.on_miss
        assert rule is not None, "experts are replaced, without a rule"
        missing = {e for e in token if e not in self._fetches and self._layer.missing(e)}
        if not missing:
            return {}
        found = zip(token, fates(weights, rule).tolist(), strict=True)
        return {expert: fate for expert, fate in found if expert in missing and fate != EXACT}

    def _find_lacking(self) -> dict[int, list[Part]]:
        """The needed experts of which something is missing, and what, in ascending order."""
        lacking: dict[int, list[Part]] = {}
        for part, access in self._access.items():
            if len(access.resident) < len(self._needed):
                for expert in self._needed:
                    if expert not in access.resident:
                        lacking.setdefault(expert, []).append(part)
        return lacking if len(self._access) == 1 else dict(sorted(lacking.items()))

    def _is_ready(self, expert: int) -> bool:
        """Whether all that an expert lacked has been brought ahead."""
        fetch = self._fetches.get(expert)
        return fetch is not None and all(
            part in fetch.tickets and self._transfer.is_ready(fetch.tickets[part])
            for part in self._lacking[expert]
        )

    @property
    def tokens(self) -> Sequence[Sequence[int]]:
        """For every token of the pass the ids of its experts, as the router ranks them."""
        return self._tokens

    @property
    def parts(self) -> Collection[Part]:
        """The parts that the layer's experts have, top first."""
        return self._access.keys()

    @property
    def hits(self) -> Collection[int]:
        """The needed experts whose cached part was resident when the pass began."""
        return self._access[self._layer.key_part].resident.keys()

    def found(self) -> PassFound:
        """What the pass found, and what crossed the link for it, once it has been handed out."""
        ready = [expert for expert in self._needed if expert not in self._unready]
        return PassFound(self.hits, ready, self._demanded, self._begun)

    def fetch_ahead(self) -> None:
        """Let the next layer's prefetches go, as far as this one leaves them frames."""
        if not self._missing:
            self._memory.ahead.push()

    def report(self) -> PassReport:
        """What the pass found and did, once all of it has been handed out."""
        self._end_slice()
        cached = self.hits
        activations = hits = ready = 0
        for experts in self._tokens:
            activations += len(experts)
            for expert in experts:
                hits += expert in cached
                ready += expert not in self._unready
        named = self._named
        return PassReport(
            tokens=len(self._tokens),
            activations=activations,
            hits=hits,
            ready=ready,
            predicted=0 if named is None else activations,
            recalled=0 if named is None else sum(e in named for e in self._needed),
            demand_bytes=self._demand_bytes,
            ahead_used_bytes=self._used_bytes,
            # What is still under way counts whole.
            ahead_wasted_bytes=sum(ticket.crossed_bytes for ticket in self._wasted),
            wait_s=self._wait_s,
            substituted=sum(fate == LOWERED for fate in self._fates.values()),
            skipped=sum(fate == LEFT_OUT for fate in self._fates.values()),
        )

    def _fetch_on(self) -> None:
        """Demand what is missing as far as there are frames, then fetch ahead."""
        while self._missing:
            frame = self._frames.take()
            if frame is None:
                return
            expert = self._missing.popleft()
            fetch = self._fetches[expert] = Fetch(expert, frame, {})
            self._demand(expert, fetch)
        self._memory.ahead.push()

    def _demand(self, expert: int, fetch: Fetch) -> None:
        layer = self._layer
        for part in self._lacking[expert]:
            if part not in fetch.tickets:
                variant = self._variant(expert)
                segment = SegmentId(layer.number, expert, part, variant)
                room = layer.room(fetch.frame, expert, part, variant)
                fetch.tickets[part] = self._transfer.start(segment, room)
                fetch.demanded.add(part)
                self._demanded.append(segment)

    def _variant(self, expert: int) -> str:
        """Which variant of an expert comes, as far as it is missing."""
        return LOW if expert in self._fates else BASE

    def in_order(self) -> Iterator[Arrival]:
        """Yield each needed segment once, ascending by expert and top before bottom.

        Each stays valid until the next one is asked for.
        """
        for expert in self._needed:
            if expert in self._lacking and expert not in self._fetches:
                self._make_room(expert)
            for part in self._layer.slots:
                yield self._arrival(expert, part)
            if expert in self._fetches:
                self._settle(expert)

    def as_ready(self) -> Iterator[list[Arrival]]:
        """Yield each needed segment once, in portions: what is resident, the others as they arrive.

        Each portion stays valid until the next one is asked for.
        """
        there = [
            (expert, part)
            for expert in self._needed
            for part, access in self._access.items()
            if expert in access.resident
        ]
        if self._timeline is None and there:
            yield [self._arrival(expert, part) for expert, part in there]
        else:
            for expert, part in there:  # to be told apart
                yield [self._arrival(expert, part)]
        for _ in range(len(self._lacking)):
            expert = self._next_arrival()
            for part in self._fetches[expert].tickets:
                yield [self._arrival(expert, part)]
            self._settle(expert)

    def _next_arrival(self) -> int:
        """An expert that has arrived, or else the one that was asked for first."""
        self._end_slice()
        while not self._fetches:
            # Every frame is still being written to for nobody.
            came = self._wait_for_frame()
            assert came, "no frame is free, and none will be"
            self._fetch_on()
        for expert, fetch in self._fetches.items():
            if all(map(self._transfer.is_ready, fetch.tickets.values())):
                return expert
        return next(iter(self._fetches))

    def _make_room(self, expert: int) -> None:
        """See to it that the next expert of the order is fetched: the frames hold later ones."""
        assert self._missing[0] == expert, "what is missing is fetched in the order of summation"
        self._end_slice()
        while expert not in self._fetches:
            if not self._wait_for_frame():
                last = max(self._fetches)
                fetch = self._fetches.pop(last)
                lost = self._frames.abandon(fetch)
                self._wasted += lost
                self._missing = deque(sorted((*self._missing, last)))
            self._fetch_on()

    def _arrival(self, expert: int, part: Part) -> Arrival:
        layer = self._layer
        self._end_slice()
        slot = self._access[part].resident.get(expert)
        variant = BASE if slot is not None else self._variant(expert)
        if slot is not None:
            weights = layer.slot_weights(slot, expert, part)
        else:
            fetch = self._fetches[expert]
            self._wait(fetch.tickets[part])
            weights = layer.weights(fetch.frame, expert, part, variant)
        if self._timeline is not None:
            self._computing = SegmentId(layer.number, expert, part, variant), perf_counter()
        return Arrival(expert, part, weights)

    def _end_slice(self) -> None:
        """Whatever was handed out last has been computed with."""
        if self._computing is not None:
            assert self._timeline is not None
            segment, began_s = self._computing
            self._timeline.segment(segment, began_s, perf_counter())
            self._computing = None

    def _wait(self, ticket: Ticket) -> None:
        if self._transfer.is_ready(ticket):
            self._transfer.wait(ticket)
            return
        began_s = perf_counter()
        self._transfer.wait(ticket)
        self._waited(ticket, began_s)

    def _wait_for_frame(self) -> bool:
        """Wait for what nobody wants, whose frame is free then; False where there is no such."""
        began_s = perf_counter()
        ticket = self._frames.wait()
        if ticket is None:
            return False
        self._waited(ticket, began_s)
        return True

    def _waited(self, ticket: Ticket, began_s: float) -> None:
        ended_s = perf_counter()
        self._wait_s += ended_s - began_s
        if self._timeline is not None:
            self._timeline.waited(ticket.segment, began_s, ended_s)

    def _settle(self, expert: int) -> None:
        """Keep what is admitted, give the frame back, fetch on."""
        self._end_slice()
        fetch = self._fetches.pop(expert)
        frame = fetch.frame
        for part, ticket in fetch.tickets.items():
            slot = self._access[part].admitted.get(expert)
            if slot is not None:
                frame = self._layer.admit(frame, expert, part, slot)
            demanded = part in fetch.demanded
            if demanded:
                self._demand_bytes += ticket.stored_bytes
            else:
                self._used_bytes += ticket.stored_bytes
            if self._timeline is not None:
                self._timeline.fetched(ticket, "demand" if demanded else "ahead_used")
        self._frames.give(frame)
        self._fetch_on()
