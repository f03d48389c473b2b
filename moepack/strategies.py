"""The strategies that a plan must beat, as ordinary layouts and placements.

What peers do is described by what it keeps and what it fetches ahead, all on the same engine:

- ``on_demand``: nothing is kept; ``lru``, ``lfu``, ``lcp``: whole experts, even budgets;
- ``prefetch_only``: nothing is kept, the next layer's predicted experts are fetched (split 0);
- ``lru_prefetch``, ``lcp_prefetch``: whole experts, and the predicted ones that are missing;
- ``uniform_half``: every expert cut in half, even budgets (the ablation of arXiv 2509.08342);
- ``mixtral_offloading``: LRU and a guess of two experts (arXiv 2312.17238);
- ``pregated``: the next layer's experts are known one layer early and nothing is kept (arXiv
  2308.12066): needs a model that was trained for it;
- ``adapmoe``: whole experts under LRU, slots divided by how much each layer's hit rate gains
  (arXiv 2408.10284), and the predicted ones that are missing;
- ``moe_infinity``: whole experts by frequency, and the predicted ones (arXiv 2401.14361);
- ``pooled``: whole experts in slots that all layers share;
- ``moepic``: arXiv 2509.08342 as published (:mod:`moepack.optimised` makes it);
- the bounds ``belady`` (clairvoyant caches and perfect prediction) and ``resident``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moepack.allocation import exact
from moepack.budget import layer_bytes, stored_bytes
from moepack.byte_division import divide
from moepack.class_division import Divisions, layer_divisions
from moepack.encodings import ENCODINGS
from moepack.layout import Layout
from moepack.passes import Oracle
from moepack.placements import free_bytes, place_layer, placement
from moepack.plan import POLICIES, EngineCapabilities, Placement, Policy, SharedPool
from moepack.plan_request import PlanRequest
from moepack.routing_tables import RoutingTables
from moepack.trunk import TRUNK_ENCODINGS

#: What ``--assume-engine full`` plans for.
FULL_ENGINE = EngineCapabilities(
    policies=POLICIES,
    devices=("cpu", "cuda"),
    prefetch=("off", "bottoms", "all"),
    max_prefetch_depth=4096,
    shared_pool=True,
    as_ready=True,
    encodings=tuple(ENCODINGS),
    mixed_layers=True,
    trunks=TRUNK_ENCODINGS,
)

#: Experts that Mixtral-Offloading guesses of the next layer.
_GUESSES = 2


class Contender(NamedTuple):
    """One way to run the model, ready to be replayed.

    Attributes
    ----------
    name : str
        A strategy's, or of what found it.
    as_ready : bool
        Of the engine that it is for.
    oracle : str
        What it knows and no engine does.
    why_not : str
        What keeps it from being a plan for this engine; empty where nothing does.
    """

    name: str
    layout: Layout
    placement: Placement
    as_ready: bool
    oracle: Oracle = "none"
    why_not: str = ""


class Strategies:
    """Builds the strategies of one request, each in every amount of staging that is of use."""

    def __init__(self, request: PlanRequest, tables: RoutingTables) -> None:
        self._request = request
        self._tables = tables
        self._engine = request.engine
        spec = request.spec
        self._top_k = max(spec.moe(number).top_k for number in spec.moe_layers)
        self._whole = request.whole_layout
        self._divisions: dict[tuple[int, Policy], Divisions] = {}

    def all(self) -> Iterator[Contender]:
        """Every strategy that fits the budget; of one name there may be several."""
        yield from self.layered()
        yield from self._pooled()
        yield from self._bounds()

    def layered(self) -> Iterator[Contender]:
        """Those whose layers have slots of their own."""
        whole, half, top_k = self._whole, self._request.even_layout(0.5), self._top_k
        yield from self._even("on_demand", whole, "lru", slots=False)
        policies: tuple[Policy, ...] = ("lru", "lfu", "lcp")
        for policy in policies:
            yield from self._even(policy, whole, policy)
        yield from self._even("prefetch_only", whole, "lru", depth=top_k, slots=False)
        yield from self._even("lru_prefetch", whole, "lru", depth=top_k)
        yield from self._even("lcp_prefetch", whole, "lcp", depth=top_k)
        half_depth = top_k if "all" in self._engine.prefetch else 0
        if not self._request.is_mixed:  # such layers are not cut
            yield from self._even("uniform_half", half, "lcp", depth=half_depth)
        yield from self._even("mixtral_offloading", whole, "lru", depth=min(_GUESSES, top_k))
        yield from self._even("moe_infinity", whole, "lfu", depth=top_k)
        yield from self._even(
            "pregated",
            whole,
            "lru",
            depth=top_k,
            slots=False,
            oracle="prediction",
            why_not="the model would have to be trained for it",
        )
        yield from self._divided("adapmoe", "lru", depth=top_k)

    @property
    def top_k(self) -> int:
        """The most experts that a token uses in any layer."""
        return self._top_k

    def staging_amounts(self) -> tuple[int, ...]:
        """Every amount of staging that is worth trying, whatever is fetched ahead."""
        depths = {0}
        if self._engine.max_prefetch_depth:
            depths |= {-(-self._top_k // 2), self._top_k}
        return tuple(sorted({staging for depth in depths for staging in self.staging(depth)}))

    def staging(self, depth: int) -> tuple[int, ...]:
        """Amounts of staging worth trying for a depth of prefetching.

        Two experts in flight overlap a transfer with the computing; one is for budgets that hold no
        second.
        """
        if depth:
            return (self._top_k + depth,)
        if free_bytes(self._request, self._whole, 2) < 0:
            return (1,)
        return tuple(sorted({min(2, self._top_k), self._top_k}))

    def _even(
        self,
        name: str,
        layout: Layout,
        policy: Policy,
        *,
        depth: int = 0,
        slots: bool = True,
        oracle: Oracle = "none",
        why_not: str = "",
    ) -> Iterator[Contender]:
        """Every layer gets the same budget."""
        for staging in self.staging(depth):
            spare_bytes = free_bytes(self._request, layout, staging)
            if spare_bytes < 0:
                continue
            share_bytes = spare_bytes // len(layout.layers) if slots else 0
            budgets = [share_bytes] * len(layout.layers)
            yield self._contender(
                name, layout, budgets, policy, depth, staging, oracle=oracle, why_not=why_not
            )

    def _divided(self, name: str, policy: Policy, *, depth: int) -> Iterator[Contender]:
        """Whole experts, slots divided so that the fewest experts are missed on *fit*."""
        layout = self._whole
        if self._request.is_mixed:
            yield from self._divided_by_class(name, policy, depth=depth)
            return
        curves = self._tables.fit_curves(policy)
        # What each layer misses with 0, 1 ... slots, in activations.
        misses = [
            shape.top_k * (1.0 - curve[: shape.num_experts + 1])
            for shape, curve in zip(self._tables.layers, curves, strict=True)
        ]
        slot_bytes = max(stored_bytes(self._request.spec, cut, "top") for cut in layout.layers)
        for staging in self.staging(depth):
            spare_bytes = free_bytes(self._request, layout, staging)
            if spare_bytes < 0:
                continue
            slots = exact(misses, spare_bytes // slot_bytes)
            budgets = (slots * slot_bytes).tolist()
            yield self._contender(name, layout, budgets, policy, depth, staging)

    def _divided_by_class(self, name: str, policy: Policy, *, depth: int) -> Iterator[Contender]:
        """The same where slots differ in size: so that the fewest bytes are missed."""
        layout, rows = self._whole, range(len(self._whole.layers))
        known = [self._divisions_of(row, policy) for row in rows]
        frontiers = [each.frontier for each in known]
        for staging in self.staging(depth):
            spare_bytes = free_bytes(self._request, layout, staging)
            if spare_bytes < 0:
                continue
            places = divide(frontiers, spare_bytes).places
            budgets = [int(known[row].bytes[places[row]]) for row in rows]
            yield self._contender(name, layout, budgets, policy, depth, staging)

    def _contender(
        self,
        name: str,
        layout: Layout,
        budgets: Sequence[int],
        policy: Policy,
        depth: int,
        staging: int,
        *,
        oracle: Oracle = "none",
        why_not: str = "",
    ) -> Contender:
        layers = [
            place_layer(
                self._request,
                cut,
                self._tables.hot[row],
                budget_bytes,
                policy=policy,
                prefetch="all" if depth else "off",
                depth=depth,
                classes=self._classes(layout, row, policy, budget_bytes),
            )
            for row, (cut, budget_bytes) in enumerate(zip(layout.layers, budgets, strict=True))
        ]
        made = placement(self._request, layout, layers, staging_experts=staging)
        missing = why_not or self.why_not(layout, made)
        return Contender(name, layout, made, self._engine.as_ready, oracle, missing)

    def _classes(
        self, layout: Layout, row: int, policy: Policy, budget_bytes: int
    ) -> tuple[int, ...]:
        """Slots of a mixed layer's encodings, so that the fewest bytes are missed on *fit*."""
        if not layout.layers[row].encodings:
            return ()
        return self._divisions_of(row, policy).within(budget_bytes)

    def _divisions_of(self, row: int, policy: Policy) -> Divisions:
        """Of a layer of the whole layout: found once, for many contenders are of one policy."""
        if (row, policy) not in self._divisions:
            self._divisions[row, policy] = layer_divisions(
                self._request.spec, self._tables, self._whole.layers, row, policy
            )
        return self._divisions[row, policy]

    def why_not(self, layout: Layout, made: Placement) -> str:
        """What keeps this engine from running a placement; empty where nothing does."""
        engine, kept = self._engine, self._request.keep_layout
        if made.pool is not None and not engine.shared_pool:
            return "this engine has no slots that layers share"
        for place in made.layers:
            if place.policy not in engine.policies:
                return f"this engine has no policy {place.policy}"
            if place.prefetch not in engine.prefetch:
                return "this engine fetches nothing ahead"
            if place.prefetch_depth > engine.max_prefetch_depth:
                return f"this engine fetches {engine.max_prefetch_depth} experts ahead"
        if kept is not None and kept.digest != layout.digest:
            return "it needs another pack than the one that is kept"
        return ""

    def _pooled(self) -> Iterator[Contender]:
        """One pool for all layers, where their experts are of one size.

        Its contents cost a pass over the trace for every size, so the policy is the one that even
        budgets would choose on *fit*, and the staging is the least that overlaps.
        """
        request, layout = self._request, self._whole
        if self._request.is_mixed:
            return
        sizes = {stored_bytes(request.spec, cut, "top") for cut in layout.layers}
        experts = {shape.num_experts for shape in self._tables.layers}
        if len(sizes) > 1 or len(experts) > 1:
            return
        experts_each, layers = next(iter(experts)), len(layout.layers)
        depth = self._top_k if "all" in self._engine.prefetch else 0
        staging = max(self.staging(depth)) if self._engine.as_ready else min(2, self._top_k)
        slots = min(
            free_bytes(request, layout, staging) // next(iter(sizes)), experts_each * layers
        )
        if slots < 1:
            return
        pool = SharedPool(slots, self._best_policy(slots // layers))
        places = [
            place_layer(
                request,
                cut,
                hot,
                0,
                policy=pool.policy,
                prefetch="all" if depth else "off",
                depth=depth,
            )
            for cut, hot in zip(layout.layers, self._tables.hot, strict=True)
        ]
        made = placement(request, layout, places, staging_experts=staging, pool=pool)
        yield Contender(
            "pooled",
            layout,
            made,
            self._engine.as_ready,
            why_not=self.why_not(layout, made),
        )

    def _best_policy(self, slots: int) -> Policy:
        """The policy that hits most on *fit*, all layers having so many slots."""
        policies: tuple[Policy, ...] = ("lru", "lfu", "lcp")
        return max(
            policies, key=lambda policy: float(self._tables.fit_curves(policy)[:, slots].mean())
        )

    def _bounds(self) -> Iterator[Contender]:
        """What no cache and no prediction can beat, and what no memory can."""
        layout, top_k = self._whole, self._top_k
        if not self._request.is_mixed:  # what it would hold of several sizes is not known
            yield from self._even(
                "belady",
                layout,
                "lru",
                depth=top_k,
                oracle="future",
                why_not="it knows the future",
            )
        budgets = [layer_bytes(self._request.spec, cut) for cut in layout.layers]
        found = self._contender("resident", layout, budgets, "lru", 0, 1)
        needed = found.placement.memory.total_bytes
        if not found.why_not and needed > self._request.fast_budget_bytes:
            found = found._replace(why_not="the model is larger than the budget")
        yield found
