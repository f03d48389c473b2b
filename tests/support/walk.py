"""A replay written to be obvious: token by token, layer by layer, with the caches that engines run.

What is resident is asked of :class:`moepack.residency.ExpertCache`; when things happen, of the
plain simulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moepack.budget import stored_bytes
from moepack.compute import LayerCompute
from moepack.layout import LayerLayout, Layout
from moepack.mixed_residency import layer_cache
from moepack.plan import LayerPlacement, Placement
from moepack.residency import LayerCache, SharedCache
from moepack.segments import PARTS, Part
from moepack.trace import NO_PREDICTION, ROUTING_PARTS, LayerShape, RoutingPart
from tests.support.caches import cache_of
from tests.support.routed import Setting
from tests.support.simulation import Costs, Seen, Segment, Simulation

Held = Mapping[Part, set[int]]


@dataclass
class Walked:
    """Sums over the tokens that were decoded."""

    tokens: int = 0
    seconds: float = 0.0
    activations: int = 0
    hits: int = 0
    ready: int = 0
    demand_bytes: int = 0
    ahead_used_bytes: int = 0
    ahead_wasted_bytes: int = 0
    link_s: float = 0.0
    layer_wait_s: dict[int, float] = field(default_factory=dict)


class WalkedLayer:
    """One layer with experts: its segments, and what a pass over it would have to do."""

    def __init__(self, setting: Setting, cut: LayerLayout, place: LayerPlacement) -> None:
        self.place = place
        self.entry = setting.compute.layer(cut.layer)
        self._setting = setting
        self._cut = cut
        self.parts: list[Part] = [part for part in PARTS if stored_bytes(setting.spec, cut, part)]
        shares: dict[Part, float] = {"top": cut.split_ratio, "bottom": 1 - cut.split_ratio}
        self.shares = shares

    def size(self, expert: int, part: Part) -> int:
        """Bytes of one part of an expert."""
        name = self._cut.encoding_of(expert)
        return stored_bytes(self._setting.spec, self._cut, part, name)

    def link_s(self, expert: int, part: Part) -> float:
        """Seconds of the link for it."""
        return self._setting.link(self.size(expert, part))

    def segments(self, expert: int, held: Held, tokens: Sequence[int]) -> list[Segment]:
        """What one expert has to fetch, and to compute for so many tokens of each block."""
        name = self._cut.encoding_of(expert)
        curve = self.entry.expert_times(name, cut=len(self.parts) == 2)
        seconds = sum(curve.at(count) for count in tokens if count)
        found = []
        for part in self.parts:
            missing = expert not in held[part]
            found.append(
                Segment(
                    seconds * self.shares[part],
                    self.link_s(expert, part) if missing else 0.0,
                )
            )
        return found

    def experts(self, held: Held, tokens: Mapping[int, Sequence[int]]) -> dict[int, list[Segment]]:
        """Of every expert its segments."""
        return {
            expert: self.segments(expert, held, counts) for expert, counts in sorted(tokens.items())
        }

    @property
    def costs(self) -> Costs:
        """Of transfers beside one token."""
        return Costs(self.entry.transfer_s, self.entry.burst_s, *self.entry.of_ahead)

    @property
    def prompt_costs(self) -> Costs:
        """Of transfers beside a prompt."""
        return Costs(*self.entry.of_prompt, *self.entry.of_prompt)

    def asked_ahead(self, guesses: Sequence[int], held: Held, frames: int) -> list[list[Part]]:
        """The parts that are fetched for each guess, as far as there are frames for them."""
        found: list[list[Part]] = []
        for expert in guesses:
            parts: list[Part] = [part for part in self.parts if expert not in held[part]]
            if self.place.prefetch == "off":
                parts = []
            if self.place.prefetch == "bottoms":
                top_is_there = "top" not in self.parts or expert in held["top"]
                parts = [part for part in parts if part == "bottom" and top_is_there]
            if parts and frames == 0:
                parts = []
            frames -= bool(parts)
            found.append(parts)
        return found

    def run(
        self,
        clock: Simulation,
        before: float,
        guess: float,
        after: float,
        experts: Mapping[int, list[Segment]],
        guesses: Sequence[int],
        ahead: Sequence[Sequence[Part]],
    ) -> tuple[Seen, list[tuple[int, Part]]]:
        """One pass; also which expert's which part each transfer asked for ahead is."""
        seconds: list[list[float]] = []
        what: list[tuple[int, Part]] = []
        for expert, parts in zip(guesses, ahead, strict=True):
            seconds.append([self.link_s(expert, part) for part in parts])
            for part in parts:
                if expert in experts:
                    experts[expert][self.parts.index(part)].ahead = len(what)
                what.append((expert, part))
        return clock.run(before, guess, after, [experts[e] for e in sorted(experts)], seconds), what


def other_s(entry: LayerCompute, tokens: int) -> tuple[float, float]:
    """Before the routing is known, and what needs no routed expert."""
    before = sum(
        piece.at(tokens) for piece in (entry.attention, entry.router, entry.fixed) if piece
    )
    return before, entry.ffn.at(tokens) if entry.ffn else 0.0


def guessed_of(
    layers: Sequence[WalkedLayer], placement: Placement, shapes: Sequence[LayerShape]
) -> list[bool]:
    """Which layers are guessed: those that fetch ahead, and lack anything."""
    found = []
    for layer, shape in zip(layers, shapes, strict=True):
        slots = {"top": layer.place.top_slots, "bottom": layer.place.bottom_slots}
        lacks = placement.pool is not None or any(
            slots[part] < shape.num_experts for part in layer.parts
        )
        found.append(layer.place.prefetch != "off" and lacks)
    return found


def caches_of(layout: Layout, placement: Placement) -> list[dict[Part, LayerCache]]:
    """The caches of a fresh engine."""
    if placement.pool is not None:
        pool = placement.pool
        shared = SharedCache(pool.slots, [place.hot for place in placement.layers], pool.policy)
        return [{"top": shared.layer(index)} for index in range(len(layout.layers))]
    found: list[dict[Part, LayerCache]] = []
    for cut, place in zip(layout.layers, placement.layers, strict=True):
        mine: dict[Part, LayerCache] = {}
        if cut.encodings:
            whole: Part = "top" if cut.split else "bottom"
            found.append({whole: layer_cache(cut, place, whole)})
            continue
        if cut.split:
            mine["top"] = cache_of(place, place.top_slots)
        if cut.split < cut.width:
            mine["bottom"] = cache_of(place, place.bottom_slots)
        found.append(mine)
    return found


def walk(
    setting: Setting,
    layout: Layout,
    placement: Placement,
    part: RoutingPart,
    *,
    as_ready: bool,
    perfect: bool = False,
) -> Walked:
    """Decode the tokens of a part; the caches see those of every part."""
    trace, shapes = setting.tables.trace, setting.tables.layers
    layers = [
        WalkedLayer(setting, cut, place)
        for cut, place in zip(layout.layers, placement.layers, strict=True)
    ]
    guessed = guessed_of(layers, placement, shapes)
    caches = caches_of(layout, placement)
    clock = Simulation(as_ready=as_ready, frames=placement.staging_experts)
    walked = Walked(layer_wait_s=dict.fromkeys(range(len(layers)), 0.0))
    for token in range(len(trace.ids)):
        counts = ROUTING_PARTS[trace.part[token]] == part
        walked.tokens += counts
        waiting_s = 0.0
        index = 0
        for number in range(len(setting.spec.layers)):
            before, after = other_s(setting.compute.layer(number), 1)
            if setting.spec.layers[number].moe is None:
                waiting_s += before + after
                continue
            layer, place = layers[index], placement.layers[index]
            ids = sorted(trace.ids[token, index, : shapes[index].top_k].tolist())
            held = {name: set(cache.resident) for name, cache in caches[index].items()}
            for cache in caches[index].values():
                cache.step([ids])
            if counts:
                named = ids if perfect else trace.predicted[token, index].tolist()
                guesses = [e for e in named[: place.prefetch_depth] if e != NO_PREDICTION]
                ahead = layer.asked_ahead(guesses, held, placement.staging_experts)
                experts = layer.experts(held, dict.fromkeys(ids, (1,)))
                following = (index + 1) % len(layers)
                guess = layers[following].entry.guess_s(1) * guessed[following]
                clock.costs = layer.costs
                seen, what = layer.run(
                    clock, waiting_s + before, guess, after, experts, guesses, ahead
                )
                _count(walked, index, layer, ids, held, seen, what)
            waiting_s = 0.0
            index += 1
        if counts:
            clock.now += waiting_s + setting.compute.head_s
    walked.seconds = clock.now
    return walked


def _count(
    walked: Walked,
    index: int,
    layer: WalkedLayer,
    ids: Sequence[int],
    held: Held,
    seen: Seen,
    what: Sequence[tuple[int, Part]],
) -> None:
    first = layer.parts[0]
    place = 0
    for expert in ids:
        walked.activations += 1
        walked.hits += expert in held[first]
        places = range(place, place + len(layer.parts))
        walked.ready += seen.ready.issuperset(places)
        for part, number in zip(layer.parts, places, strict=True):
            if number in seen.demanded:
                walked.demand_bytes += layer.size(expert, part)
                walked.link_s += layer.link_s(expert, part)
        place += len(layer.parts)
    for number in seen.begun:
        expert, part = what[number]
        if expert in ids:
            walked.ahead_used_bytes += layer.size(expert, part)
        else:
            walked.ahead_wasted_bytes += layer.size(expert, part)
        walked.link_s += layer.link_s(expert, part)
    walked.layer_wait_s[index] += seen.end - seen.begin - seen.computed


def first_token_s(
    setting: Setting,
    layout: Layout,
    placement: Placement,
    tokens: Sequence[int],
    *,
    perfect: bool = False,
) -> float:
    """A prompt of these tokens of the trace, through one layer after the other."""
    trace, shapes = setting.tables.trace, setting.tables.layers
    caches = caches_of(layout, placement)
    clock = Simulation(as_ready=False, frames=placement.staging_experts)
    layers = [
        WalkedLayer(setting, cut, place)
        for cut, place in zip(layout.layers, placement.layers, strict=True)
    ]
    guessed = guessed_of(layers, placement, shapes)
    size = layout.prefill_block_tokens
    blocks = [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    waiting_s = 0.0
    index = 0
    for number in range(len(setting.spec.layers)):
        other = [other_s(setting.compute.layer(number), len(block)) for block in blocks]
        before, after = sum(pair[0] for pair in other), sum(pair[1] for pair in other)
        if setting.spec.layers[number].moe is None:
            waiting_s += before + after
            continue
        layer = layers[index]
        held = {name: set(cache.resident) for name, cache in caches[index].items()}
        top_k = shapes[index].top_k
        used = [trace.ids[block, index, :top_k].ravel() for block in blocks]
        needed = np.unique(np.concatenate(used)).tolist()
        named = np.unique(trace.predicted[list(tokens), index, :top_k]).tolist()
        guesses = needed if perfect else [e for e in named if e != NO_PREDICTION]
        ahead = layer.asked_ahead(guesses if index else [], held, placement.staging_experts - 1)
        experts = layer.experts(
            held, {expert: [int((ids == expert).sum()) for ids in used] for expert in needed}
        )
        following = (index + 1) % len(layers)
        lengths = [len(block) for block in blocks] if following else [1]
        guess = sum(map(layers[following].entry.guess_s, lengths)) * guessed[following]
        clock.costs = layer.prompt_costs
        layer.run(clock, waiting_s + before, guess, after, experts, guesses if index else [], ahead)
        waiting_s = 0.0
        index += 1
    return clock.now + waiting_s + setting.compute.head_s
