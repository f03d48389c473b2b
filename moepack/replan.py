"""A better division of the slots of a running engine, from what its routers decided lately.

The layout, the policies, the prefetching and the bytes stay. What a layer pays for a number of
slots is what it misses, times what a miss takes on the link; slots of one size are divided exactly.
The planner's closed form knows more: that computing and fetching ahead hide some of the waiting.
Where they hide all of it, no division is better than another, and this one does no harm.

A layer whose experts are cut moves its bottoms while it keeps any, else its tops, so that it never
keeps a bottom without all tops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moepack.allocation import exact
from moepack.budget import slots_bytes, stored_bytes
from moepack.cache_curves import hit_curves
from moepack.cost import Array, LinkSeconds
from moepack.layer_problem import Integers
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Policy
from moepack.segments import PARTS, Part
from moepack.stack_ranks import stack_ranks
from moepack.trace import ROUTING_PARTS, Ids, LayerShape, RoutingPart, Trace

#: Tokens that tell too little to move anything by.
LEAST_TOKENS = 256

#: What a division must save of the time of the misses to be worth it.
LEAST_SAVED = 0.01

# The first tokens fill the caches, the next ones decide, and the last ones judge.
_FILLING, _DECIDING = 0.25, 0.75

# 20 MB for 4,096 tokens that choose 8 of 128 experts.
_LAYERS_AT_ONCE = 8

# What a slot is worth that saves nothing, in seconds: they are all given away.
_WORTHLESS_S = 1e-15


class Replanned(NamedTuple):
    """A better division.

    Attributes
    ----------
    layers : tuple of LayerPlacement
        Of all layers, in order.
    changed : tuple of int
        The layers that have another number of slots.
    moved_bytes : int
        Of the slots that change hands.
    saved : float
        The share of the time of the misses that it saves, on tokens that it was not chosen by.
    """

    layers: tuple[LayerPlacement, ...]
    changed: tuple[int, ...]
    moved_bytes: int
    saved: float


class _Stake(NamedTuple):
    """What one layer keeps in slots: its place among the layers, and the part."""

    row: int
    part: Part


def replan(
    spec: ModelSpec,
    layout: Layout,
    layers: Sequence[LayerPlacement],
    ids: Ids,
    link: LinkSeconds,
) -> Replanned | None:
    """Divide the slots as the last tokens would have had them.

    Parameters
    ----------
    layers
        What the engine has: each with slots of its own.
    ids : uint16 [T, L, K]
        The experts of the last tokens in each layer that has experts, oldest first.
    link
        Seconds of one transfer of so many bytes; what matters is their ratio.

    Returns
    -------
    Replanned or None
        None where there are too few tokens, or nothing is gained that is worth it.
    """
    if len(ids) < LEAST_TOKENS:
        return None
    live = _Live(spec, layout, layers, ids, link)
    now = live.counts(layers)
    best = now.copy()
    for stakes in live.stakes():
        rows, parts = [stake.row for stake in stakes], [PARTS.index(each.part) for each in stakes]
        costs = [live.cost("select", stake) for stake in stakes]
        costs = [cost - _WORTHLESS_S * np.arange(len(cost)) for cost in costs]
        slots = exact(costs, int(now[rows, parts].sum()))
        best[rows, parts] = np.minimum(slots, [len(cost) - 1 for cost in costs])
    before_s, after_s = live.seconds("test", now), live.seconds("test", best)
    if after_s >= before_s * (1.0 - LEAST_SAVED):
        return None
    return live.replanned(best, 1.0 - after_s / before_s)


class _Live:
    """The last tokens, as the caches of each layer would have met them."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        layers: Sequence[LayerPlacement],
        ids: Ids,
        link: LinkSeconds,
    ) -> None:
        self._spec, self._layout, self._layers = spec, layout, layers
        self._shapes = [
            LayerShape(cut.layer, spec.moe(cut.layer).num_experts, spec.moe(cut.layer).top_k)
            for cut in layout.layers
        ]
        sizes = [[stored_bytes(spec, cut, part) for part in PARTS] for cut in layout.layers]
        self._sizes = np.array(sizes, dtype=np.int64)  # [L, parts]
        known = {int(size): link(int(size)) for size in np.unique(self._sizes) if size}
        self._link_s = [[known.get(int(size), 0.0) for size in row] for row in self._sizes]
        self._trace = _trace(ids)
        self._hot = [self._ranking(row) for row in range(len(layers))]
        self._curves = self._hits()

    def _ranking(self, row: int) -> tuple[int, ...]:
        """Every expert by its use, equals as before; those that are pinned before the others."""
        shape, place = self._shapes[row], self._layers[row]
        seen = self._trace.part != ROUTING_PARTS.index("test")
        used = self._trace.ids[seen, row, : shape.top_k]
        counts = np.bincount(used.ravel(), minlength=shape.num_experts)
        hot = sorted(place.hot, key=lambda expert: -counts[expert])
        if place.policy != "pinned":
            return tuple(hot)
        there = set(place.hot[: max(place.top_slots, place.bottom_slots)])
        return tuple(sorted(hot, key=lambda expert: expert not in there))

    def _hits(self) -> dict[RoutingPart, list[Array]]:
        """Of each layer the hit rate of 0, 1 ... slots under its policy, on each scored part."""
        scored: tuple[RoutingPart, ...] = ("select", "test")
        found = {part: [np.zeros(0)] * len(self._layers) for part in scored}
        for policy, rows in self._alike():
            shapes = [self._shapes[row] for row in rows]
            ids, predicted = self._trace.ids[:, rows], self._trace.predicted[:, rows]
            trace = replace(self._trace, ids=ids, predicted=predicted)
            # Pinned caches hold what they will hold; the others start as they were planned to.
            hot = [self._hot[row] if policy == "pinned" else self._layers[row].hot for row in rows]
            half_lives = [self._layers[row].half_life_tokens for row in rows]
            known = [half_life for half_life in half_lives if half_life is not None]
            ranks = stack_ranks(trace, shapes, hot, policy, known)
            for part in scored:
                curves = hit_curves(ranks, trace, shapes, part)
                for row, shape, curve in zip(rows, shapes, curves, strict=True):
                    found[part][row] = np.maximum.accumulate(curve[: shape.num_experts + 1])
        return found

    def _alike(self) -> Iterator[tuple[Policy, list[int]]]:
        """A few layers at a time of one policy: ranking them takes memory."""
        for policy in dict.fromkeys(place.policy for place in self._layers):
            rows = [row for row, place in enumerate(self._layers) if place.policy == policy]
            for begin in range(0, len(rows), _LAYERS_AT_ONCE):
                yield policy, rows[begin : begin + _LAYERS_AT_ONCE]

    def counts(self, layers: Sequence[LayerPlacement]) -> Integers:
        """Slots of each layer and part, int64 [L, parts]."""
        return np.array([[place.top_slots, place.bottom_slots] for place in layers])

    def stakes(self) -> list[list[_Stake]]:
        """What may change hands, by the size of the slots."""
        by_size: dict[int, list[_Stake]] = {}
        for row, place in enumerate(self._layers):
            top_bytes, bottom_bytes = self._sizes[row]
            part: Part = "bottom" if not top_bytes or place.bottom_slots else "top"
            size_bytes = bottom_bytes if part == "bottom" else top_bytes
            by_size.setdefault(int(size_bytes), []).append(_Stake(row, part))
        return list(by_size.values())

    def cost(self, scored: RoutingPart, stake: _Stake) -> Array:
        """Seconds a token of what a layer misses with 0, 1 ... slots, [N + 1]."""
        link_s = self._link_s[stake.row][PARTS.index(stake.part)]
        missed = 1.0 - self._curves[scored][stake.row]
        return np.asarray(self._shapes[stake.row].top_k * link_s * missed)

    def seconds(self, scored: RoutingPart, counts: Integers) -> float:
        """Seconds a token of all that is missed."""
        return sum(
            float(self.cost(scored, _Stake(row, part))[counts[row, place]])
            for row in range(len(self._layers))
            for place, part in enumerate(PARTS)
            if self._sizes[row, place]
        )

    def replanned(self, counts: Integers, saved: float) -> Replanned:
        """The layers with other numbers of slots."""
        now = self.counts(self._layers)
        made = []
        for row, place in enumerate(self._layers):
            tops, bottoms = (int(count) for count in counts[row])
            slots = replace(place, top_slots=tops, bottom_slots=bottoms, hot=self._hot[row])
            taken = slots_bytes(self._spec, self._layout.layers[row], slots)
            made.append(replace(slots, budget_bytes=taken))
        changed = (counts != now).any(axis=1).tolist()
        more = np.maximum(counts - now, 0)
        return Replanned(
            layers=tuple(made),
            changed=tuple(place.layer for place, moved in zip(made, changed, strict=True) if moved),
            moved_bytes=int((more * self._sizes).sum()),
            saved=saved,
        )


def _trace(ids: Ids) -> Trace:
    """Live routing as a trace that nothing was predicted in."""
    tokens, layers, _ = ids.shape
    share = np.arange(tokens) / tokens
    part = np.digitize(share, (_FILLING, _DECIDING)).astype(np.uint8)
    return Trace(
        ids=ids,
        weights=np.zeros((tokens, layers, 0), dtype=np.float16),
        predicted=np.zeros((tokens, layers, 0), dtype=np.uint16),
        sequence=np.zeros(tokens, dtype=np.uint32),
        part=part,
    )
