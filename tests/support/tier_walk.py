"""The obvious replay over three tiers: token by token, layer by layer, by the plain simulation.

What a placement's RAM holds is asked of :func:`moepack.ram_tier.ram_tier`, as engines do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moepack.cost import LinkSeconds
from moepack.layout import Layout
from moepack.plan import Placement
from moepack.ram_tier import ram_tier
from moepack.segments import Part, SegmentId
from moepack.trace import NO_PREDICTION, ROUTING_PARTS, RoutingPart
from tests.support.routed import Setting
from tests.support.two_stage import Segment, TwoStage
from tests.support.walk import WalkedLayer, caches_of, guessed_of, other_s


@dataclass
class TierWalked:
    """Sums over the tokens that were decoded."""

    tokens: int = 0
    seconds: float = 0.0
    demand_bytes: int = 0
    ahead_used_bytes: int = 0
    ahead_wasted_bytes: int = 0
    disk_bytes: int = 0
    disk_s: float = 0.0


class _Pass(NamedTuple):
    """One layer over one token, or over a prompt; ``what`` is asked for ahead of it."""

    before: float
    guess: float
    after: float
    layer: WalkedLayer
    experts: Mapping[int, list[Segment]]
    what: list[list[tuple[int, Part]]]
    rest: float = 0.0


class TierWalk:
    """Walks one placement over one setting.

    Parameters
    ----------
    disk
        Seconds of one read.
    """

    def __init__(
        self, setting: Setting, layout: Layout, placement: Placement, disk: LinkSeconds
    ) -> None:
        self._setting, self._layout, self._placement = setting, layout, placement
        self._layers = [
            WalkedLayer(setting, cut, place)
            for cut, place in zip(layout.layers, placement.layers, strict=True)
        ]
        self._guessed = guessed_of(self._layers, placement, setting.tables.layers)
        self._caches = caches_of(layout, placement)
        assert placement.host is not None
        tier = ram_tier(
            setting.spec,
            layout,
            placement.layers,
            placement.host.pinned_bytes,
            readers=placement.readers,
        )
        self._in_ram = tier.held
        self._disk = disk

    def _read_s(self, layer: WalkedLayer, expert: int, part: Part) -> float:
        held = SegmentId(layer.place.layer, expert, part) in self._in_ram
        return 0.0 if held else self._disk(layer.size(expert, part))

    def _pass(
        self,
        index: int,
        times: tuple[float, float, float],
        counts: Mapping[int, Sequence[int]],
        guesses: Sequence[int],
        frames: int,
    ) -> _Pass:
        layer = self._layers[index]
        held = {name: set(cache.resident) for name, cache in self._caches[index].items()}
        plain = layer.experts(held, counts)
        experts = {
            expert: [
                Segment(
                    each.compute,
                    each.fetch,
                    self._read_s(layer, expert, part) if each.fetch else 0.0,
                )
                for part, each in zip(layer.parts, plain[expert], strict=True)
            ]
            for expert in plain
        }
        ahead = layer.asked_ahead(guesses, held, frames)
        what: list[list[tuple[int, Part]]] = [
            [(expert, part) for part in parts] for expert, parts in zip(guesses, ahead, strict=True)
        ]
        for number, (expert, part) in enumerate(itertools.chain(*what)):
            if expert in experts:
                experts[expert][layer.parts.index(part)].ahead = number
        return _Pass(*times, layer, experts, what)

    def _run(
        self, passes: Sequence[_Pass], *, as_ready: bool, of_prompt: bool = False
    ) -> TierWalked:
        assert self._placement.host is not None
        clock = TwoStage(
            as_ready=as_ready,
            frames=self._placement.staging_experts,
            bounces=self._placement.host.bounces,
        )
        walked = TierWalked()
        clock.run(0.0, 0.0, 0.0, [], self._asked(passes[0]))
        for one, following in zip(passes, [*passes[1:], None], strict=True):
            nexts = self._asked(following)
            clock.costs = one.layer.prompt_costs if of_prompt else one.layer.costs
            experts = [one.experts[expert] for expert in sorted(one.experts)]
            seen = clock.run(one.before, one.guess, one.after, experts, nexts)
            parts = [(e, part) for e in sorted(one.experts) for part in one.layer.parts]
            asked = list(itertools.chain(*one.what))
            for number in seen.demanded:
                walked.demand_bytes += one.layer.size(*parts[number])
                self._count_read(walked, one.layer, *parts[number])
            for number in seen.begun:
                expert, part = asked[number]
                if expert in one.experts:
                    walked.ahead_used_bytes += one.layer.size(expert, part)
                else:
                    walked.ahead_wasted_bytes += one.layer.size(expert, part)
                self._count_read(walked, one.layer, expert, part)
            clock.now += one.rest
        walked.seconds = clock.now
        return walked

    def _count_read(self, walked: TierWalked, layer: WalkedLayer, expert: int, part: Part) -> None:
        seconds = self._read_s(layer, expert, part)
        walked.disk_s += seconds
        walked.disk_bytes += layer.size(expert, part) * (seconds > 0)

    def decode(self, part: RoutingPart, *, as_ready: bool) -> TierWalked:
        """Decode the tokens of a part; the caches see those of every part."""
        setting = self._setting
        trace, shapes = setting.tables.trace, setting.tables.layers
        passes: list[_Pass] = []
        tokens = 0
        for token in range(len(trace.ids)):
            counts = ROUTING_PARTS[trace.part[token]] == part
            tokens += counts
            waiting_s, index = 0.0, 0
            for number in range(len(setting.spec.layers)):
                before, after = other_s(setting.compute.layer(number), 1)
                if setting.spec.layers[number].moe is None:
                    waiting_s += before + after
                    continue
                place = self._placement.layers[index]
                ids = trace.ids[token, index, : shapes[index].top_k].tolist()
                if counts:
                    following = (index + 1) % len(self._layers)
                    guess = self._layers[following].entry.guess_s(1) * self._guessed[following]
                    named = trace.predicted[token, index].tolist()
                    guesses = [e for e in named[: place.prefetch_depth] if e != NO_PREDICTION]
                    times = waiting_s + before, guess, after
                    frames = self._placement.staging_experts
                    alone = dict.fromkeys(ids, (1,))
                    passes.append(self._pass(index, times, alone, guesses, frames))
                for cache in self._caches[index].values():
                    cache.step([ids])
                waiting_s = 0.0
                index += 1
            if counts:
                passes[-1] = passes[-1]._replace(rest=waiting_s + setting.compute.head_s)
        walked = self._run(passes, as_ready=as_ready)
        walked.tokens = tokens
        return walked

    def _asked(self, one: _Pass | None) -> list[list[tuple[float, float]]]:
        """Copy and read of what is asked for ahead of a pass."""
        if one is None:
            return []
        return [
            [(one.layer.link_s(e, part), self._read_s(one.layer, e, part)) for e, part in parts]
            for parts in one.what
        ]

    def first_token_s(self, tokens: Sequence[int]) -> float:
        """A prompt of these tokens of the trace, through one layer after the other."""
        setting = self._setting
        trace, shapes = setting.tables.trace, setting.tables.layers
        size = self._layout.prefill_block_tokens
        blocks = [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]
        lengths = [len(block) for block in blocks]
        passes: list[_Pass] = []
        waiting_s, index = 0.0, 0
        for number in range(len(setting.spec.layers)):
            other = [other_s(setting.compute.layer(number), length) for length in lengths]
            before, after = sum(pair[0] for pair in other), sum(pair[1] for pair in other)
            if setting.spec.layers[number].moe is None:
                waiting_s += before + after
                continue
            top_k = shapes[index].top_k
            used = [trace.ids[block, index, :top_k].ravel() for block in blocks]
            counts = {
                expert: [int((ids == expert).sum()) for ids in used]
                for expert in np.unique(np.concatenate(used)).tolist()
            }
            named = np.unique(trace.predicted[list(tokens), index, :top_k]).tolist()
            guesses = [e for e in named if e != NO_PREDICTION] if index else []
            following = (index + 1) % len(self._layers)
            entry = self._layers[following].entry
            guess = sum(map(entry.guess_s, lengths if following else [1]))
            times = waiting_s + before, guess * self._guessed[following], after
            frames = self._placement.staging_experts - 1
            passes.append(self._pass(index, times, counts, guesses, frames))
            waiting_s = 0.0
            index += 1
        run_s = self._run(passes, as_ready=False, of_prompt=True).seconds
        return run_s + waiting_s + setting.compute.head_s
