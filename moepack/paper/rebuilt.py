"""One published setting with its routing: contenders at a budget, and what they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moepack.layouts import uniform_layout
from moepack.optimised import Optimised
from moepack.paper.settings import NEW_TOKENS, PROMPT_TOKENS, PaperSetting
from moepack.placements import free_bytes, place_layer, placement
from moepack.plan_request import PlanRequest
from moepack.replay import Replayer
from moepack.replayed import Replayed
from moepack.routing import RoutingProfile
from moepack.routing_tables import RoutingTables
from moepack.strategies import Contender, Strategies
from moepack.trace import RoutingPart

#: What the plan of moepack itself is called: the best of everything on *select*.
PLAN = "moepack's plan"


class Rebuilt:
    """One setting with its routing: contenders at a budget, and what they take."""

    def __init__(self, setting: PaperSetting, routing: RoutingProfile | None = None) -> None:
        self.setting = setting
        self.request = setting.request
        if routing is not None:
            self.request = replace(self.request, routing=routing)
        self.tables = RoutingTables(self.request.routing)
        self._optimiser = Optimised(self.request, self.tables, setting.link)
        self._replayers = {part: self._replayer(part) for part in ("select", "test")}
        self._cached: dict[int, dict[str, Contender]] = {}

    def _replayer(self, part: RoutingPart) -> Replayer:
        return Replayer(
            self.request.spec,
            self.request.compute,
            self.tables,
            self.setting.link,
            prompt_tokens=PROMPT_TOKENS,
            part=part,
        )

    def replay(self, contender: Contender, part: RoutingPart = "test") -> Replayed:
        """What one contender takes."""
        return self._replayers[part].replay(
            contender.layout,
            contender.placement,
            as_ready=contender.as_ready,
            oracle=contender.oracle,
        )

    def caching(self, experts: int) -> dict[str, Contender]:
        """The best of each strategy, with a cache of so many whole experts beside its staging."""
        if experts in self._cached:
            return self._cached[experts]
        found: list[Contender] = []
        amounts = Strategies(replace(self.request, fast_budget_bytes=1 << 50), self.tables)
        for staging in amounts.staging_amounts():
            request = self._with_cache(experts, staging)
            made = [*Strategies(request, self.tables).all(), *self._optimised(request)]
            found += [
                each
                for each in made
                if each.placement.staging_experts == staging or each.name == "resident"
            ]
        self._cached[experts] = self._best_of_each(found)
        return self._cached[experts]

    def within(self, budget_bytes: int) -> dict[str, Contender]:
        """The best of each strategy, with everything within so many bytes."""
        request = replace(self.request, fast_budget_bytes=budget_bytes)
        made = [*Strategies(request, self.tables).all(), *self._optimised(request)]
        return self._best_of_each(made)

    def _with_cache(self, experts: int, staging: int) -> PlanRequest:
        """A request whose budget leaves so many whole experts beside the staging."""
        layout = uniform_layout(self.request.spec, 1.0)
        fixed_bytes = -free_bytes(self.request, layout, staging)
        cache_bytes = experts * self.setting.expert_bytes
        return replace(self.request, fast_budget_bytes=fixed_bytes + cache_bytes)

    def _optimised(self, request: PlanRequest) -> Iterator[Contender]:
        published = self._optimiser.moepic(request)
        if published is not None:
            yield published
        yield from self._optimiser.contenders(request)[0]

    def _best_of_each(self, contenders: Sequence[Contender]) -> dict[str, Contender]:
        """Of each name the best on *select*; and the best of all that could be run, as the plan."""
        totals: dict[str, tuple[float, Contender]] = {}
        for each in contenders:
            price = self.replay(each, "select")
            total_s = price.ttft_s + (NEW_TOKENS - 1) * price.tpot_s
            names = [each.name] if each.why_not else [each.name, PLAN]
            for name in names:
                if name not in totals or total_s < totals[name][0]:
                    totals[name] = total_s, each
        return {name: contender for name, (_, contender) in totals.items()}

    def even(self, ratio: float, experts_each: int, *, depth: int, slots: bool = True) -> Contender:
        """Every layer cut alike, with the bytes of so many whole experts, under LCP."""
        layout = uniform_layout(self.request.spec, ratio)
        budget_bytes = experts_each * self.setting.expert_bytes if slots else 0
        layers = [
            place_layer(
                self.request,
                cut,
                hot,
                budget_bytes,
                policy="lcp",
                prefetch="all" if depth else "off",
                depth=depth,
            )
            for cut, hot in zip(layout.layers, self.tables.hot, strict=True)
        ]
        staging = 2 * self.tables.layers[0].top_k
        made = placement(self.request, layout, layers, staging_experts=staging)
        return Contender("even", layout, made, as_ready=True)


def without_overlap(contender: Contender) -> Contender:
    """The same caches on an engine that loads what is missing and then computes it."""
    layers = tuple(
        replace(place, prefetch="off", prefetch_depth=0) for place in contender.placement.layers
    )
    made = replace(contender.placement, layers=layers, staging_experts=1)
    return contender._replace(placement=made, as_ready=False)
