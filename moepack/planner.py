"""From a model, a machine and a budget to a plan.

Today every layer gets the same budget and the same split. Which split, how much staging, and
whether to keep anything at all is decided by price: ``TTFT + (new tokens - 1) * TPOT`` of
:mod:`moepack.cost` over all candidates, which contain every baseline. The best is returned, so a
plan cannot lose to a baseline on the part of the trace that decides (*select*). What is reported,
of the plan and of the baselines, is priced on the part that nothing was chosen by (*test*), where
near ties may turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moepack.budget import (
    fixed_bytes,
    memory_breakdown,
    slow_bytes,
    staging_bytes,
    stored_bytes,
)
from moepack.cost import LinkSeconds, throttled
from moepack.layouts import uniform_layout
from moepack.model_spec import ModelSpec
from moepack.plan import (
    PLAN_VERSION,
    Baseline,
    LayerLayout,
    LayerPlacement,
    Layout,
    Placement,
    Plan,
    PlannerReport,
    Prediction,
    Provenance,
)
from moepack.plan_request import (
    PlanRequest,
    max_context_tokens,
    require_budget,
    require_host_memory,
    require_matching,
    within_device,
)
from moepack.pricing import Price, Pricer, layer_routing
from moepack.segments import PARTS
from moepack.trace import RoutingPart
from moepack.units import format_size

#: Split ratios tried for all layers alike, each moved to the nearest cut of its layer; of equally
#: good ones the first is taken.
SPLIT_RATIOS = tuple(step / 8 for step in range(8, -1, -1))

#: Factor within which measured times are expected on a quiet machine, by where the compute times
#: come from; it widens by the spread that was seen while they were measured.
MEASURED_BAND = 1.35
DERIVED_BAND = 2.0


@dataclass(frozen=True)
class _Candidate:
    layout: Layout
    placement: Placement
    price: Price


def make_plan(request: PlanRequest) -> Plan:
    """Make the best plan for a request.

    Raises
    ------
    BudgetTooSmallError
        When not even one expert in flight fits, naming the missing bytes; or when the plan does
        not fit the host's memory.
    PlanMismatchError
        When a profile or a layout is another model's.
    """
    began_s = time.perf_counter()
    asked_bytes = request.fast_budget_bytes
    request = within_device(request)
    require_matching(request)
    require_budget(request)
    planner = _Planner(request)
    candidates = [
        candidate for layout in planner.layouts() for candidate in planner.candidates(layout)
    ]
    best = min(candidates, key=lambda item: _total_s(request, item.price))
    require_host_memory(request, best.layout, best.placement)
    final = planner.price(
        best.layout, best.placement.layers, best.placement.staging_experts, "test"
    )
    return Plan(
        version=PLAN_VERSION,
        model_name=request.spec.name,
        model_digest=request.spec.digest,
        max_context_tokens=max_context_tokens(request),
        layout=best.layout,
        placement=best.placement,
        prediction=_prediction(request, best, final),
        baselines=planner.baselines(),
        provenance=_provenance(request, asked_bytes),
        planner=PlannerReport(time.perf_counter() - began_s, "optimised", None, 0),
        link=request.link,
    )


class _Planner:
    """Candidates for one request, and their price."""

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        self._spec = request.spec
        link: LinkSeconds = request.hardware.link_seconds
        self._routing = layer_routing(request.spec, request.routing)
        self._pricer = Pricer(
            request.spec,
            request.compute,
            self._routing,
            link if request.link is None else throttled(link, *request.link),
            prompt_tokens=request.prompt_tokens,
        )

    def price(
        self, layout: Layout, layers: Sequence[LayerPlacement], staging: int, part: RoutingPart
    ) -> Price:
        return self._pricer.price(layout, layers, staging_experts=staging, part=part)

    def layouts(self) -> list[Layout]:
        """The kept layout, or one for every split ratio."""
        keep = self._request.keep_layout
        return [keep] if keep is not None else [uniform_layout(self._spec, r) for r in SPLIT_RATIOS]

    def candidates(self, layout: Layout) -> Iterator[_Candidate]:
        """One layout with every amount of staging that fits, and all the rest in slots, or nothing.

        Every baseline that this engine can run is among them.
        """
        for staging in _staging_choices(self._spec):
            free_bytes = self._free_bytes(layout, staging)
            if free_bytes >= 0:
                yield self._candidate(layout, staging, free_bytes)
                yield self._candidate(layout, staging, 0)

    def baselines(self) -> dict[str, Baseline]:
        """The same engine under simpler strategies, at the same budget."""
        whole, half = uniform_layout(self._spec, 1.0), uniform_layout(self._spec, 0.5)
        found: dict[str, Baseline] = {}
        for name, layout, slots in (
            ("on_demand", whole, 0),
            ("lru", whole, None),
            ("uniform_half", half, None),
        ):
            fitting = [
                self._candidate(layout, staging, free_bytes if slots is None else slots)
                for staging in _staging_choices(self._spec)
                if (free_bytes := self._free_bytes(layout, staging)) >= 0
            ]
            if fitting:
                best = min(fitting, key=lambda item: _total_s(self._request, item.price))
                found[name] = self._baseline(best, eligible=True)
        whole_bytes = sum(
            self._spec.moe(cut.layer).num_experts * stored_bytes(self._spec, cut, "top")
            for cut in whole.layers
        )
        resident = self._candidate(whole, 1, whole_bytes)
        fits = resident.placement.memory.total_bytes <= self._request.fast_budget_bytes
        found["resident"] = self._baseline(resident, eligible=fits)
        return found

    def _baseline(self, candidate: _Candidate, *, eligible: bool) -> Baseline:
        placement = candidate.placement
        price = self.price(candidate.layout, placement.layers, placement.staging_experts, "test")
        return Baseline(
            price.ttft_s, price.tpot_s, price.hit_rate, price.link_bytes_per_token, eligible
        )

    def _free_bytes(self, layout: Layout, staging: int) -> int:
        request = self._request
        return (
            request.fast_budget_bytes
            - fixed_bytes(
                self._spec,
                request.context_tokens,
                layout.prefill_block_tokens,
                threads=request.compute.threads,
            )
            - staging_bytes(self._spec, layout, staging)
        )

    def _candidate(self, layout: Layout, staging: int, free_bytes: int) -> _Candidate:
        request = self._request
        share_bytes = free_bytes // len(layout.layers)
        layers = tuple(self._place(cut, share_bytes) for cut in layout.layers)
        placement = Placement(
            device=request.device,
            fast_budget_bytes=request.fast_budget_bytes,
            staging_experts=staging,
            context_tokens=request.context_tokens,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            memory=memory_breakdown(
                self._spec,
                layout,
                layers,
                staging_experts=staging,
                context_tokens=request.context_tokens,
                threads=request.compute.threads,
            ),
            layers=layers,
            ram_budget_bytes=request.ram_budget_bytes,
            threads=request.compute.threads,
            readers=request.hardware.disk.readers,
        )
        return _Candidate(layout, placement, self.price(layout, layers, staging, "select"))

    def _place(self, cut: LayerLayout, budget_bytes: int) -> LayerPlacement:
        """Tops first; bottoms once every top is kept."""
        experts = self._spec.moe(cut.layer).num_experts
        top_bytes, bottom_bytes = (stored_bytes(self._spec, cut, part) for part in PARTS)
        tops = min(experts, budget_bytes // top_bytes) if top_bytes else 0
        bottoms = 0
        if bottom_bytes and (tops == experts or not top_bytes):
            bottoms = min(experts, (budget_bytes - tops * top_bytes) // bottom_bytes)
        return LayerPlacement(
            layer=cut.layer,
            budget_bytes=budget_bytes,
            top_slots=tops,
            bottom_slots=bottoms,
            policy="lru",
            hot=self._routing[cut.layer].hot,
        )


def _staging_choices(spec: ModelSpec) -> list[int]:
    top_k = max(spec.moe(number).top_k for number in spec.moe_layers)
    return sorted({1, 2, top_k})


def _total_s(request: PlanRequest, price: Price) -> float:
    return price.ttft_s + (request.new_tokens - 1) * price.tpot_s


def _prediction(request: PlanRequest, best: _Candidate, price: Price) -> Prediction:
    measured = request.compute.source == "measured" and request.routing is not None
    return Prediction(
        ttft_s=price.ttft_s,
        tpot_s=price.tpot_s,
        tokens_per_s=1.0 / price.tpot_s,
        hit_rate=price.hit_rate,
        ready_rate=price.ready_rate,
        link_bytes_per_token=price.link_bytes_per_token,
        fast_bytes=best.placement.memory.total_bytes,
        slow_bytes=slow_bytes(request.spec, best.layout),
        band=(MEASURED_BAND if measured else DERIVED_BAND) * (1.0 + request.compute.spread),
    )


def _provenance(request: PlanRequest, asked_bytes: int) -> Provenance:
    compute, routing = request.compute, request.routing
    assumptions = []
    if asked_bytes > request.fast_budget_bytes:
        assumptions.append(
            f"of the {format_size(asked_bytes)} asked for, {request.hardware.name} has "
            f"{format_size(request.fast_budget_bytes)} left for a model"
        )
    if compute.source == "derived":
        assumptions.append("compute times are derived from the hardware profile by a roofline")
    if request.prompt_tokens > compute.context_tokens:
        assumptions.append(
            f"attention is priced behind {compute.context_tokens} tokens of context, the prompt "
            f"has {request.prompt_tokens}"
        )
    if routing is None:
        assumptions.append("every expert is equally likely, whatever came before")
    return Provenance(
        hardware=request.hardware.name,
        hardware_is_this_machine=request.hardware_is_this_machine,
        compute=f"{compute.source}, {compute.how}",
        routing="assumed uniform" if routing is None else routing.summary.how,
        assumptions=tuple(assumptions),
    )
