"""Layouts and placements for tests, said in a few words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from moepack.budget import memory_breakdown
from moepack.layout import Layout
from moepack.layouts import layer_layout
from moepack.model_spec import ModelSpec
from moepack.plan import DeviceKind, LayerPlacement, Placement, Policy, PrefetchMode, SharedPool
from tests.support.caches import half_life_of


def mixed_layout(
    spec: ModelSpec,
    ratios: Sequence[float],
    *,
    block_tokens: int = 8,
    encodings: Sequence[str | None] = (None,),
) -> Layout:
    """Cut the layers near the given ratios in turn, in the given encodings (None: as they are)."""
    layers = tuple(
        layer_layout(spec, number, ratio, encoding)
        for number, ratio, encoding in zip(
            spec.moe_layers, itertools.cycle(ratios), itertools.cycle(encodings), strict=False
        )
    )
    return Layout(spec.digest, layers, block_tokens)


def placement(
    spec: ModelSpec,
    layout: Layout,
    *,
    tops: int,
    bottoms: int,
    staging: int,
    context: int = 64,
    coldest_first: bool = False,
    threads: int = 1,
    device: DeviceKind = "cpu",
    policy: Policy = "lru",
    pool: SharedPool | None = None,
    prefetch: PrefetchMode = "off",
    depth: int = 0,
) -> Placement:
    """Equal slots in every layer, as many as there are experts at most."""
    layers = []
    for cut in layout.layers:
        experts = spec.moe(cut.layer).num_experts
        ids = range(experts)
        hot = tuple(reversed(ids)) if coldest_first else tuple(ids)
        layers.append(
            LayerPlacement(
                layer=cut.layer,
                budget_bytes=0,
                top_slots=min(tops, experts) if cut.split else 0,
                bottom_slots=min(bottoms, experts) if cut.split < cut.width else 0,
                policy=policy,
                hot=hot,
                prefetch=prefetch,
                prefetch_depth=depth,
                half_life_tokens=half_life_of(policy),
            )
        )
    memory = memory_breakdown(
        spec,
        layout,
        layers,
        staging_experts=staging,
        context_tokens=context,
        threads=threads,
        pool=pool,
    )
    return Placement(
        device=device,
        fast_budget_bytes=memory.total_bytes,
        staging_experts=staging,
        context_tokens=context,
        prompt_tokens=context // 2,
        new_tokens=context // 2,
        memory=memory,
        layers=tuple(layers),
        threads=threads,
        pool=pool,
    )
