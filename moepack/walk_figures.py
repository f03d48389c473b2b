"""What walks through layers say of a kind of layer: their laps as pieces of a compute profile.

A walk has its experts in some *way* (:mod:`moepack.compute_probe` walks in all of them); what an
expert adds, and what a transfer costs, is the difference between two ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from moepack.compute import Curve, LayerCompute, QuantisedExpert, RoundedLayer
from moepack.encodings import fitting
from moepack.layer_walk import Laps, median_laps
from moepack.transfer_prices import (
    Around,
    expert_link_s,
    priced_ahead_s,
    priced_in_order_s,
    priced_missing_s,
)

if TYPE_CHECKING:
    from moepack.expert_probe import Probe
    from moepack.model_spec import MoeSpec

#: How a walk has its experts: as many as a token has, whole or in two segments; and one.
MANY, SPLIT, ONE = "many", "split", "one"

#: With all that a token has, or one of them, to be fetched: on demand, or asked for ahead.
ALL_MISSING, ONE_MISSING = "all missing", "one missing"
ALL_AHEAD, ONE_AHEAD = "all ahead", "one ahead"


def way_of(way: str, stored: str | None) -> str:
    """The name of a way with experts in a quantised encoding; None: in the model's dtype."""
    return way if stored is None else f"{way} {stored}"


class Turns(NamedTuple):
    """Medians of each way, for the pace's first speed, and how slow the processor was meanwhile."""

    laps: dict[str, Laps]
    slowness: float


class KindFigures(NamedTuple):
    """The layers of one kind, and the head behind them, once more with a trunk in 8 bits."""

    layer: LayerCompute
    head_s: float
    rounded_head_s: float


def dense_figures(
    numbers: tuple[int, ...], laps: Mapping[int, Laps], rounded: Mapping[int, Laps]
) -> KindFigures:
    """Of layers without experts.

    Parameters
    ----------
    numbers
        The decoder's numbers of these layers.
    laps, rounded
        By the number of tokens; the latter with a trunk in 8 bits.
    """
    tokens = tuple(laps)
    attention = Curve(tokens, tuple(lap.attention_s for lap in laps.values()))
    ffn = Curve(tokens, tuple(lap.ffn_s for lap in laps.values()))
    layer = LayerCompute(
        numbers, attention, None, None, None, ffn, rounded=_rounded_layer(rounded, has_ffn=True)
    )
    return KindFigures(layer, laps[1].head_s, rounded[1].head_s)


def moe_figures(
    probe: Probe,
    numbers: tuple[int, ...],
    walked_over: Sequence[int],
    many: int,
    laps: Mapping[int, Mapping[str, Laps]],
    rounded: Mapping[int, Laps],
    read_s: float | None,
    slowness: float,
) -> KindFigures:
    """What one expert adds is the difference between many and one; what is left is the pass.

    Parameters
    ----------
    numbers, walked_over
        The decoder's numbers of these layers, and of those that were walked over.
    many
        Experts of a token in every way but :data:`ONE`.
    laps, rounded
        By the number of tokens, and of each way; the latter with a trunk in 8 bits.
    read_s
        Seconds of the link for one expert, measured beside the walks; None: as the profile has it.
    slowness
        Of the processor, in the walks with one token.
    """
    tokens = tuple(laps)
    resident = [median_laps([found[way] for way in (MANY, ONE, SPLIT)]) for found in laps.values()]
    fixed_s = tuple(
        _fixed_s(found[ONE].experts_s, found[MANY].experts_s, many) for found in laps.values()
    )

    def each(way: str) -> Curve:
        pairs = zip(laps.values(), fixed_s, strict=True)
        return Curve(
            tokens, tuple(max(0.0, found[way].experts_s - rest_s) / many for found, rest_s in pairs)
        )

    spec, moe = probe.engine.spec, probe.engine.spec.moe(numbers[0])
    expert, alone = each(MANY), resident[0]
    quantised = (
        QuantisedExpert(name, each(way_of(MANY, name)), each(way_of(SPLIT, name)))
        for name in fitting(spec.hidden_size, moe.intermediate_size)
    )

    def beyond_s(way: str, priced_s: float) -> float:
        """What a layer takes longer than it is priced when it has to fetch experts.

        The whole walk is compared: readers that wake, and what they drive out of the caches, slow
        down what follows as well. A link does not slow down with the processor, so all is compared
        as it was, and only what is left is the processor's.
        """
        found = laps[1][way]
        layer_s = found.around_s + found.experts_s
        layer_s += (found.head_s - alone.head_s) / len(walked_over)
        return layer_s - priced_s / slowness

    def demanded_s(way: str, missing: int) -> float:
        priced_s = priced_missing_s(
            probe,
            numbers[0],
            fixed_s[0] * slowness,
            expert.at(1) * slowness,
            missing=missing,
            read_s=read_s,
        )
        return beyond_s(way, priced_s + alone.around_s * slowness)

    def ahead_s(way: str, missing: int) -> float:
        before_s = alone.attention_s + alone.router_s + fixed_s[0]
        around = (before_s, alone.ffn_s, alone.head_s)
        priced_s = priced_ahead_s(
            probe,
            numbers[0],
            Around(*(piece_s * slowness for piece_s in around)),
            expert.at(1) * slowness,
            layers=len(walked_over),
            missing=missing,
            read_s=read_s,
        )
        return beyond_s(way, priced_s)

    transfer_s, burst_s = _transfer_and_burst_s(
        demanded_s(ONE_MISSING, 1), demanded_s(ALL_MISSING, moe.top_k), moe.top_k
    )
    ahead_transfer_s, ahead_burst_s = _transfer_and_burst_s(
        ahead_s(ONE_AHEAD, 1), ahead_s(ALL_AHEAD, moe.top_k), moe.top_k
    )
    compute = LayerCompute(
        layers=numbers,
        attention=Curve(tokens, tuple(lap.attention_s for lap in resident)),
        router=Curve(tokens, tuple(lap.router_s for lap in resident)),
        expert=expert,
        expert_split=each(SPLIT),
        ffn=Curve(tokens, tuple(lap.ffn_s for lap in resident))
        if moe.shared_intermediate_size
        else None,
        fixed=Curve(tokens, fixed_s),
        transfer_s=transfer_s,
        burst_s=burst_s,
        quantised=tuple(quantised),
        rounded=_rounded_layer(rounded, has_ffn=bool(moe.shared_intermediate_size)),
        ahead_transfer_s=ahead_transfer_s,
        ahead_burst_s=ahead_burst_s,
    )
    return KindFigures(compute, alone.head_s, rounded[1].head_s)


def with_prompt(
    probe: Probe, compute: LayerCompute, moe: MoeSpec, turns: Turns, tokens: int, layers: int
) -> LayerCompute:
    """What transfers cost the thread that computes a prompt, by what its walks take longer."""
    assert compute.expert is not None, "layers with experts"
    # A link does not slow down with the processor, whose speed all laps are told for.
    fetch_s = expert_link_s(probe, compute.layers[0]) / turns.slowness
    expert_s = compute.expert.at(tokens)
    alone = turns.laps[MANY]

    def beyond_s(way: str, missing: int) -> float:
        found = turns.laps[way]
        longer_s = found.around_s + found.experts_s - alone.around_s - alone.experts_s
        longer_s += (found.head_s - alone.head_s) / layers
        there = moe.top_k - missing
        priced_s = priced_in_order_s(fetch_s, expert_s, there=there, missing=missing)
        return longer_s - (priced_s - moe.top_k * expert_s)

    transfer_s, burst_s = _transfer_and_burst_s(
        beyond_s(ONE_MISSING, 1), beyond_s(ALL_MISSING, moe.top_k), moe.top_k
    )
    return replace(compute, prompt_transfer_s=transfer_s, prompt_burst_s=burst_s)


def _rounded_layer(laps: Mapping[int, Laps], has_ffn: bool) -> RoundedLayer:
    tokens = tuple(laps)
    attention = Curve(tokens, tuple(lap.attention_s for lap in laps.values()))
    ffn = Curve(tokens, tuple(lap.ffn_s for lap in laps.values()))
    return RoundedLayer(attention, ffn if has_ffn else None)


def _transfer_and_burst_s(one_s: float, all_s: float, many: int) -> tuple[float, float]:
    """The line through (1, one_s) and (many, all_s): its slope, and where it begins.

    Neither is negative, and for all of them they come to ``all_s``.
    """
    if many == 1:
        return max(0.0, one_s), 0.0
    slope_s = min(max(0.0, all_s - one_s) / (many - 1), max(0.0, all_s) / many)
    return slope_s, max(0.0, all_s) - many * slope_s


def _fixed_s(one_s: float, all_s: float, many: int) -> float:
    """Where the line through (1, one_s) and (many, all_s) begins; 0 where noise makes it fall."""
    return max(0.0, (many * one_s - all_s) / (many - 1)) if one_s < all_s else 0.0
