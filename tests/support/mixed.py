"""Layouts whose layers hold experts in several encodings, and placements of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from moepack.budget import placement_memory
from moepack.layout import LayerLayout, Layout
from moepack.layouts import mixed_layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Placement


def encodings_drawn(experts: int, names: Sequence[str], random: Random) -> list[str]:
    """An encoding for every expert; each name is there."""
    drawn = [*names, *random.choices(names, k=experts - len(names))]
    random.shuffle(drawn)
    return drawn


def layout_by_expert(
    spec: ModelSpec,
    names: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    block_tokens: int = 8,
    bottoms: Sequence[int] = (),
) -> Layout:
    """Layers in turn of experts in some encodings; of one alone, layers whose experts are alike.

    ``bottoms``: the layers, by place, whose whole experts are bottoms.
    """
    random = Random(seed)
    layers = []
    for place, number in enumerate(spec.moe_layers):
        drawn = encodings_drawn(spec.moe(number).num_experts, names[place % len(names)], random)
        split = 0 if place in bottoms else None
        layers.append(mixed_layout(spec, number, drawn, split=split))
    return Layout(spec.digest, tuple(layers), block_tokens)


def slots_drawn(cut: LayerLayout, random: Random) -> list[int]:
    """Slots for the experts of each encoding of a mixed layer."""
    sizes = cut.class_sizes(len(cut.encodings)).values()
    return [random.randint(0, size) for size in sizes]


def with_slots(cut: LayerLayout, place: LayerPlacement, slots: Sequence[int]) -> LayerPlacement:
    """A placement with so many slots for the experts of each of a layer's encodings."""
    total = sum(slots)
    return replace(
        place,
        top_slots=total if cut.split else 0,
        bottom_slots=0 if cut.split else total,
        class_slots=tuple(slots) if cut.encodings else (),
    )


def with_layers(
    spec: ModelSpec, layout: Layout, place: Placement, layers: Sequence[LayerPlacement]
) -> Placement:
    """A placement with other layers, and the memory that these take."""
    changed = replace(place, layers=tuple(layers))
    memory = placement_memory(spec, layout, changed)
    return replace(changed, memory=memory, fast_budget_bytes=memory.total_bytes)
