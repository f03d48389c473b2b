"""Strategies and plans replayed side by side, each with everything that a replay tells."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from moepack.cost import LinkSeconds, throttled
from moepack.optimised import Optimised
from moepack.plan_request import PlanRequest, require_budget, require_matching, within_device
from moepack.progress import NO_PROGRESS, Progress
from moepack.records import record
from moepack.replay import Replayer
from moepack.replayed import Replayed
from moepack.routing_tables import RoutingTables
from moepack.strategies import Contender, Strategies
from moepack.trace import RoutingPart

#: Every strategy and bound; what they are is told in :mod:`moepack.strategies`.
STRATEGIES = (
    "on_demand",
    "lru",
    "lfu",
    "lcp",
    "prefetch_only",
    "lru_prefetch",
    "lcp_prefetch",
    "uniform_half",
    "mixtral_offloading",
    "pregated",
    "adapmoe",
    "moe_infinity",
    "pooled",
    "moepic",
    "belady",
    "resident",
)


@record
class ReplayedStrategy:
    """One strategy over one part of a trace.

    Attributes
    ----------
    ttft_s, tpot_s : float
    hit_rate, ready_rate : float
        As :class:`moepack.replayed.Replayed` has them.
    demand_bytes, ahead_used_bytes, ahead_wasted_bytes : float
        Over the link for one decoded token.
    wait_s : float
        What the compute waited for the link, for one decoded token.
    fast_bytes : int
        Of the fast tier.
    events : int
        (layer, token) passes that were replayed, all variants and parts together.
    seconds : float
        That this took, with whatever tables of the routing it was the first to need.
    eligible : bool
        The engine could run it within the budget; else ``why_not`` says what is in the way.
    """

    name: str
    ttft_s: float
    tpot_s: float
    hit_rate: float
    ready_rate: float
    demand_bytes: float
    ahead_used_bytes: float
    ahead_wasted_bytes: float
    wait_s: float
    fast_bytes: int
    events: int
    seconds: float
    eligible: bool
    why_not: str = ""

    @property
    def events_per_s(self) -> float:
        """Passes replayed in a second."""
        return self.events / self.seconds


def replay_strategies(
    request: PlanRequest,
    names: Sequence[str],
    part: RoutingPart,
    *,
    also: Sequence[Contender] = (),
    progress: Progress = NO_PROGRESS,
) -> list[ReplayedStrategy]:
    """Replay strategies within a request's budget, and contenders as they are.

    Of a strategy that comes in several amounts of staging the best on *select* is told.

    Parameters
    ----------
    names
        Some of :data:`STRATEGIES`; those that do not fit the budget are left out.
    also
        Further contenders, told first.

    Raises
    ------
    BudgetTooSmallError
        When not even one expert in flight fits.
    PlanMismatchError
        When a profile or a contender is another model's.
    """
    require_matching(request)
    bench = _Bench(within_device(request), part)
    variants: dict[str, list[Contender]] = {each.name: [each] for each in also}
    if names:
        require_budget(bench.request)
        for each in bench.contenders(names):
            variants.setdefault(each.name, []).append(each)
    progress.start("replay", len(variants), "items")
    found = []
    try:
        for of_name in variants.values():
            found.append(bench.replayed(of_name))
            progress.advance(1)
    finally:
        progress.done()
    return found


class _Bench:
    """Replays contenders of one request on one part, chosen among on another."""

    def __init__(self, request: PlanRequest, part: RoutingPart) -> None:
        self.request = request
        self._tables = RoutingTables(request.routing)
        link: LinkSeconds = request.hardware.link_seconds
        self._link = link if request.link is None else throttled(link, *request.link)
        self._choose, self._tell = self._replayer("select"), self._replayer(part)

    def _replayer(self, part: RoutingPart) -> Replayer:
        request = self.request
        return Replayer(
            request.spec,
            request.compute,
            self._tables,
            self._link,
            prompt_tokens=request.prompt_tokens,
            part=part,
            disk=request.hardware.disk.seconds,
        )

    def contenders(self, names: Sequence[str]) -> Iterator[Contender]:
        """Every variant of the strategies named, in the order of the names."""
        made: dict[str, list[Contender]] = {name: [] for name in names}
        for each in Strategies(self.request, self._tables).all():
            if each.name in made:
                made[each.name].append(each)
        if "moepic" in made:
            published = Optimised(self.request, self._tables, self._link).moepic(self.request)
            made["moepic"] += [] if published is None else [published]
        for of_name in made.values():
            yield from of_name

    def replayed(self, variants: Sequence[Contender]) -> ReplayedStrategy:
        """The best of some variants of one strategy."""
        began_s, events = time.perf_counter(), 0
        best = variants[0]
        if len(variants) > 1:
            prices = [_replay(self._choose, each) for each in variants]
            events = sum(price.events for price in prices)
            totals = [self._total_s(price) for price in prices]
            best = variants[totals.index(min(totals))]
        price = _replay(self._tell, best)
        return ReplayedStrategy(
            name=best.name,
            ttft_s=price.ttft_s,
            tpot_s=price.tpot_s,
            hit_rate=price.hit_rate,
            ready_rate=price.ready_rate,
            demand_bytes=price.demand_bytes,
            ahead_used_bytes=price.ahead_used_bytes,
            ahead_wasted_bytes=price.ahead_wasted_bytes,
            wait_s=max(0.0, float(price.layer_wait_s.sum())),  # rounding
            fast_bytes=best.placement.memory.total_bytes,
            events=events + price.events,
            seconds=time.perf_counter() - began_s,
            eligible=not best.why_not,
            why_not=best.why_not,
        )

    def _total_s(self, price: Replayed) -> float:
        return price.ttft_s + (self.request.new_tokens - 1) * price.tpot_s


def _replay(replayer: Replayer, contender: Contender) -> Replayed:
    return replayer.replay(
        contender.layout,
        contender.placement,
        as_ready=contender.as_ready,
        oracle=contender.oracle,
    )
