"""The clairvoyant cache: the bound on what any policy can hit (Belady, 1966)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moepack import percolation
from moepack.expert_order import next_use_order
from moepack.stack_ranks import NO_RANK, Hot, Ranks, layers_by_shape
from moepack.trace import LayerShape, Trace


def belady_ranks(trace: Trace, layers: Sequence[LayerShape], hot: Hot) -> Ranks:
    """Ranks of the activated experts in the clairvoyant stack, uint16 [tokens, L, K].

    A cache of n slots starts from the first n of ``hot``, fetches what a token misses, and of all
    that it then has keeps the n experts that are used again soonest; it need not keep what it
    fetched. No cache that fetches on demand misses less. The first n of one stack, whatever n is:
    an expert of rank r is a hit for caches of more than r slots, down to one slot.
    :data:`~moepack.stack_ranks.NO_RANK` past a layer's own top-k.
    """
    found = np.full(trace.ids.shape, NO_RANK, dtype=np.uint16)
    for shape, rows in layers_by_shape(layers):
        ranking = np.array([hot[row] for row in rows], dtype=np.intp)
        used = trace.ids[:, rows, : shape.top_k]
        order = next_use_order(used, shape.num_experts)
        found[:, rows, : shape.top_k], _ = percolation.ranks(order, ranking, bypass=True)
    return found


def belady_hits(
    trace: Trace, layers: Sequence[LayerShape], hot: Hot, capacities: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """What clairvoyant caches of so many slots per layer hit, bool [tokens, L, K]."""
    return belady_ranks(trace, layers, hot) < np.array(capacities)[:, None]
