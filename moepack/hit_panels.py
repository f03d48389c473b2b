"""Hit rates over the size of a cache, per band of layers, and what a plan chose of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moepack.cache_curves import Curves, hit_curves, rank_curves
from moepack.layout import LayerLayout
from moepack.plan import POLICIES, LayerPlacement, Plan
from moepack.routing_tables import RoutingTables
from moepack.trace import ROUTING_PARTS

#: The clairvoyant cache: what none that fetches on demand exceeds.
BELADY = "belady"

# Sizes at which a curve is told at most.
_POINTS = 64


class Chosen(NamedTuple):
    """One layer's cache: the share of its experts that it holds, and how often it is hit."""

    layer: int
    share: float
    hit_rate: float
    policy: str
    half_life_tokens: float | None = None


class HitPanel(NamedTuple):
    """A band of layers: the mean of their curves, and the caches that a plan chose for them.

    Attributes
    ----------
    shares : tuple of float
        Share of a layer's experts that is cached, ascending from 0 to 1.
    curves : mapping
        Per policy, and for :data:`BELADY`, the hit rate at each share.
    """

    name: str
    shares: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]
    chosen: tuple[Chosen, ...]


def hit_panels(plan: Plan, tables: RoutingTables, bands: Sequence[range]) -> tuple[HitPanel, ...]:
    """One panel for each band of layers (indices among those with experts), on *test*.

    The layers of a band have equally many experts. A layer that is cut is told by the part that it
    caches first. Where all layers share one pool, nothing was chosen for any of them.
    """
    curves: dict[str, Curves] = {
        policy: hit_curves(tables.ranks(policy), tables.trace, tables.layers, "test")
        for policy in POLICIES
    }
    test = tables.trace.part == ROUTING_PARTS.index("test")
    curves[BELADY] = rank_curves(tables.future[test], tables.layers)
    pairs = list(zip(plan.layout.layers, plan.placement.layers, strict=True))
    mixed = _mixed(plan, tables)
    panels = []
    for band in bands:
        experts = tables.layers[band[0]].num_experts
        sizes = np.unique(np.linspace(0, experts, min(experts, _POINTS) + 1).round().astype(int))
        first, last = tables.layers[band[0]].layer, tables.layers[band[-1]].layer
        panels.append(
            HitPanel(
                name=f"layer {first}" if first == last else f"layers {first} to {last}",
                shares=tuple((sizes / experts).tolist()),
                curves={
                    name: tuple(curve[list(band)][:, sizes].mean(axis=0).tolist())
                    for name, curve in curves.items()
                },
                chosen=()
                if plan.placement.pool is not None
                else tuple(_chosen(*pairs[row], curves, row, mixed.get(row)) for row in band),
            )
        )
    return tuple(panels)


def _mixed(plan: Plan, tables: RoutingTables) -> dict[int, float]:
    """Of layers whose experts are stored in several encodings the hit rate, by place."""
    cuts = plan.layout.layers
    if not any(cut.encodings for cut in cuts):
        return {}
    test = tables.trace.part == ROUTING_PARTS.index("test")
    held = tables.classes(cuts).held(plan.placement.layers)
    return {
        row: float(activated[test, : tables.layers[row].top_k].mean())
        for row, (activated, _) in held.items()
    }


def _chosen(
    cut: LayerLayout,
    place: LayerPlacement,
    curves: dict[str, Curves],
    row: int,
    hit_rate: float | None,
) -> Chosen:
    slots = place.top_slots if cut.split else place.bottom_slots
    found = float(curves[place.policy][row, slots]) if hit_rate is None else hit_rate
    share = slots / len(place.hot)
    return Chosen(place.layer, share, found, place.policy, place.half_life_tokens)
