"""Three tiers: which segments RAM holds for a device, when it is too small for all of them.

What is not held is read from the disk each time, into a *bounce*, and copied to the device from
there. Pure arithmetic: the planner prices what the runtime does because both ask here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from moepack.budget import layer_bytes, slow_bytes, stored_bytes
from moepack.footprint import HostTier
from moepack.layout import LayerLayout, Layout
from moepack.mixed_residency import starting
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement
from moepack.segments import PARTS, Part, SegmentId

#: Copies from RAM to the device in flight before a prefetch joins them: one crosses, the next is
#: ready to.
COPIES_AHEAD = 2

# Layer and encoding -> what each part of such an expert takes, but for parts of nothing.
_Sizes = Mapping[tuple[int, str], Sequence[tuple[Part, int]]]


class RamTier(NamedTuple):
    """What pinned RAM holds.

    Attributes
    ----------
    held : mapping
        Segment -> its stored bytes, hottest first.
    bounces : int
        Segments that are not held and on their way at once: each takes a bounce. 0 where all are
        held.
    bounce_bytes : int
        Of each bounce.
    """

    held: Mapping[SegmentId, int]
    bounces: int = 0
    bounce_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that is pinned."""
        return sum(self.held.values()) + self.bounces * self.bounce_bytes


def ram_tier(
    spec: ModelSpec,
    layout: Layout,
    layers: Sequence[LayerPlacement],
    ram_bytes: int,
    *,
    readers: int = 2,
) -> RamTier:
    """What so many bytes of RAM hold: everything, or the head of the ranking beside the bounces.

    More RAM never holds less, and the whole of it is taken up to the first segment that does not
    fit. Where not even the bounces fit, nothing is held and ``total_bytes`` exceeds ``ram_bytes``.

    Parameters
    ----------
    layers
        Of the placement, in the order of the layout's.
    ram_bytes
        What may be pinned.
    readers
        Reads that the disk does at once best: as many bounces there are. At least two, so that one
        is read while another is copied.
    """
    sizes = _stored(spec, layout)
    ranking = _ranking(layout, layers, sizes)
    if slow_bytes(spec, layout) <= ram_bytes:
        return RamTier(dict(ranking))
    bounces = max(2, readers)
    bounce_bytes = max(size_bytes for parts in sizes.values() for _, size_bytes in parts)
    left_bytes = ram_bytes - bounces * bounce_bytes
    held = {}
    for segment, size_bytes in ranking:
        left_bytes -= size_bytes
        if left_bytes < 0:
            break
        held[segment] = size_bytes
    return RamTier(held, bounces, bounce_bytes)


def host_tier(
    spec: ModelSpec,
    layout: Layout,
    layers: Sequence[LayerPlacement],
    pinned_bytes: int,
    readers: int,
) -> HostTier:
    """The same in numbers, for the record of a placement."""
    everything = slow_bytes(spec, layout)
    if everything <= pinned_bytes:
        return HostTier(pinned_bytes, everything, 0, 0, (1.0,) * len(layers))
    tier = ram_tier(spec, layout, layers, pinned_bytes, readers=readers)
    held = dict.fromkeys((cut.layer for cut in layout.layers), 0)
    for segment, size_bytes in tier.held.items():
        held[segment.layer] += size_bytes
    shares = tuple(held[cut.layer] / layer_bytes(spec, cut) for cut in layout.layers)
    held_bytes = sum(held.values())
    return HostTier(pinned_bytes, held_bytes, tier.bounces, tier.bounce_bytes, shares)


def _stored(spec: ModelSpec, layout: Layout) -> _Sizes:
    return {
        (cut.layer, name): [
            (part, size_bytes)
            for part in PARTS
            if (size_bytes := stored_bytes(spec, cut, part, name))
        ]
        for cut in layout.layers
        for name in cut.classes
    }


def _ranking(
    layout: Layout, layers: Sequence[LayerPlacement], sizes: _Sizes
) -> Iterator[tuple[SegmentId, int]]:
    """Every segment and its stored bytes: by place in the hot rankings, layer by layer.

    What never leaves the device comes last: RAM would hold it for nothing.
    """
    last = []
    cuts = list(zip(layout.layers, layers, strict=True))
    staying = {cut.layer: _staying(cut, placed) for cut, placed in cuts}
    for experts in zip_longest(*(placed.hot for _, placed in cuts)):
        for (cut, _), expert in zip(cuts, experts, strict=True):
            if expert is None:
                continue  # the layer has fewer experts
            for part, size_bytes in sizes[cut.layer, cut.encoding_of(expert)]:
                found = SegmentId(cut.layer, expert, part), size_bytes
                if expert in staying[cut.layer][part]:
                    last.append(found)
                else:
                    yield found
    yield from last


def _staying(cut: LayerLayout, placed: LayerPlacement) -> dict[Part, frozenset[int]]:
    """Of each part, the experts that never leave their slots."""
    if placed.policy != "pinned":
        return {part: frozenset() for part in PARTS}
    return {part: frozenset(starting(cut, placed, part)) for part in PARTS}
