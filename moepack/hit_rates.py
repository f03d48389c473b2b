"""What caches would hit on a recorded trace: at a glance for people, and whole for scripts."""

from __future__ import annotations

from collections.abc import Sequence

from moepack.belady import belady_ranks
from moepack.cache_curves import Curves, hit_curves, prediction_accuracy, rank_curves
from moepack.plan import Policy
from moepack.records import record
from moepack.stack_ranks import stack_ranks
from moepack.trace import ROUTING_PARTS, LayerShape, Trace, hot_rankings

#: Shares of a layer's experts that hit rates are told for.
CACHED_SHARES = (0.25, 0.5, 0.75)


@record
class LayerHitRates:
    """Hit rates of one layer with a quarter, half and three quarters of its experts cached.

    Scored on *test*, by caches that start from the ranking of *fit* and see every token.

    Attributes
    ----------
    lru, lfu, lcp : tuple of float
        What an engine can reach.
    belady : tuple of float
        What no cache that fetches on demand exceeds.
    """

    layer: int
    lru: tuple[float, ...]
    lfu: tuple[float, ...]
    lcp: tuple[float, ...]
    belady: tuple[float, ...]


@record
class LayerCurves:
    """One layer's whole curves on *test*.

    Attributes
    ----------
    lru, lfu, lcp, belady : tuple of float
        Hit rates of caches of 0, 1 ... experts slots.
    accuracy : tuple of float
        How often the expert predicted first, second ... is activated.
    """

    layer: int
    lru: tuple[float, ...]
    lfu: tuple[float, ...]
    lcp: tuple[float, ...]
    belady: tuple[float, ...]
    accuracy: tuple[float, ...]


def layer_curves(trace: Trace, layers: Sequence[LayerShape]) -> tuple[LayerCurves, ...]:
    """The curves of every layer of a trace; see :mod:`moepack.cache_curves`."""
    hot = hot_rankings(trace, layers)

    def online(policy: Policy) -> Curves:
        return hit_curves(stack_ranks(trace, layers, hot, policy), trace, layers, "test")

    lru, lfu, lcp = online("lru"), online("lfu"), online("lcp")
    scored = trace.part == ROUTING_PARTS.index("test")
    belady = rank_curves(belady_ranks(trace, layers, hot)[scored], layers)
    accuracy = prediction_accuracy(trace, layers, "test")

    def figures(curves: Curves, row: int, count: int) -> tuple[float, ...]:
        return tuple(curves[row, :count].round(4).tolist())

    return tuple(
        LayerCurves(
            layer=layer.layer,
            lru=figures(lru, row, layer.num_experts + 1),
            lfu=figures(lfu, row, layer.num_experts + 1),
            lcp=figures(lcp, row, layer.num_experts + 1),
            belady=figures(belady, row, layer.num_experts + 1),
            accuracy=figures(accuracy, row, 2 * layer.top_k),
        )
        for row, layer in enumerate(layers)
    )


def layer_hit_rates(curves: Sequence[LayerCurves]) -> tuple[LayerHitRates, ...]:
    """What of the curves goes into a summary."""

    def at_shares(curve: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(curve[round(share * (len(curve) - 1))] for share in CACHED_SHARES)

    return tuple(
        LayerHitRates(
            layer=entry.layer,
            lru=at_shares(entry.lru),
            lfu=at_shares(entry.lfu),
            lcp=at_shares(entry.lcp),
            belady=at_shares(entry.belady),
        )
        for entry in curves
    )
