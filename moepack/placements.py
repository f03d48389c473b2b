"""Placements of a request: slots within a budget, and the record around them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from moepack.budget import fixed_bytes, memory_breakdown, slow_bytes, staging_bytes, stored_bytes
from moepack.footprint import HostTier
from moepack.layout import LayerLayout, Layout
from moepack.plan import LayerPlacement, Placement, Policy, PrefetchMode, SharedPool
from moepack.plan_request import PlanRequest, pinnable_bytes, ram_is_assumed
from moepack.ram_tier import host_tier
from moepack.segments import PARTS


def free_bytes(request: PlanRequest, layout: Layout, staging_experts: int) -> int:
    """What is left for slots, once everything fixed and the staging are paid for; may be < 0."""
    fixed = fixed_bytes(
        request.spec,
        request.context_tokens,
        layout.prefill_block_tokens,
        threads=request.compute.threads,
        encodings=layout.encodings,
        trunk=layout.trunk,
    )
    return request.fast_budget_bytes - fixed - staging_bytes(request.spec, layout, staging_experts)


def place_layer(
    request: PlanRequest,
    cut: LayerLayout,
    hot: tuple[int, ...],
    budget_bytes: int,
    *,
    policy: Policy,
    prefetch: PrefetchMode = "off",
    depth: int = 0,
    classes: tuple[int, ...] = (),
) -> LayerPlacement:
    """Spend one layer's budget: tops first, bottoms once every top is kept.

    ``classes``: of a mixed layer the slots of each of its encodings, within the budget; none where
    nothing is said.
    """
    experts = len(hot)
    if cut.encodings:
        slots = sum(classes)
        return LayerPlacement(
            layer=cut.layer,
            budget_bytes=budget_bytes,
            top_slots=slots if cut.split else 0,
            bottom_slots=0 if cut.split else slots,
            policy=policy,
            hot=hot,
            prefetch=prefetch if depth else "off",
            prefetch_depth=depth,
            class_slots=classes or (0,) * len(cut.classes),
        )
    top_bytes, bottom_bytes = (stored_bytes(request.spec, cut, part) for part in PARTS)
    tops = min(experts, budget_bytes // top_bytes) if top_bytes else 0
    bottoms = 0
    if bottom_bytes and (tops == experts or not top_bytes):
        bottoms = min(experts, (budget_bytes - tops * top_bytes) // bottom_bytes)
    return LayerPlacement(
        layer=cut.layer,
        budget_bytes=budget_bytes,
        top_slots=tops,
        bottom_slots=bottoms,
        policy=policy,
        hot=hot,
        prefetch=prefetch if depth else "off",
        prefetch_depth=depth,
    )


def placement(
    request: PlanRequest,
    layout: Layout,
    layers: Sequence[LayerPlacement],
    *,
    staging_experts: int,
    pool: SharedPool | None = None,
) -> Placement:
    """The whole record, every byte accounted for."""
    readers = request.hardware.disk.readers_for(_mean_segment_bytes(request, layout))
    return Placement(
        device=request.device,
        fast_budget_bytes=request.fast_budget_bytes,
        staging_experts=staging_experts,
        context_tokens=request.context_tokens,
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        memory=memory_breakdown(
            request.spec,
            layout,
            layers,
            staging_experts=staging_experts,
            context_tokens=request.context_tokens,
            threads=request.compute.threads,
            pool=pool,
        ),
        layers=tuple(layers),
        ram_budget_bytes=request.ram_budget_bytes,
        threads=request.compute.threads,
        readers=readers,
        pool=pool,
        host=_host(request, layout, layers, readers),
    )


def _host(
    request: PlanRequest, layout: Layout, layers: Sequence[LayerPlacement], readers: int
) -> HostTier | None:
    """What RAM holds behind a device."""
    if request.device == "cpu":
        return None
    spec, pinned_bytes = request.spec, pinnable_bytes(request)
    host = host_tier(spec, layout, layers, pinned_bytes, readers)
    if host.total_bytes > pinned_bytes and ram_is_assumed(request):
        # It could not even pass a segment on: so it has to have more, and the plan says so.
        return host_tier(spec, layout, layers, slow_bytes(spec, layout), readers)
    return host


def _mean_segment_bytes(request: PlanRequest, layout: Layout) -> float:
    sizes = [
        stored_bytes(request.spec, cut, part, name)
        for cut in layout.layers
        for part in PARTS
        for name in cut.classes
    ]
    return statistics.fmean(size for size in sizes if size)
