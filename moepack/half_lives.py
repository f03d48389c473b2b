"""The half-life of a count that decays (``lfu_decay``), chosen for each layer on *fit*.

A short half-life forgets the text before, and what one text soon stops to use; a long one tells
better which experts a layer likes at all. Which is best differs from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepack.cache_curves import rank_curves
from moepack.stack_ranks import stack_ranks
from moepack.trace import ROUTING_PARTS, LayerShape, Trace, hot_rankings

#: Half-lives that are tried, in tokens; but for the first none longer than what it is tried on.
#: What lies between them differs by a few tenths of a point.
HALF_LIVES = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)

#: Tokens of *fit* that they are tried on, from its beginning.
FITTED_TOKENS = 1024


def fitted_half_lives(trace: Trace, layers: Sequence[LayerShape]) -> tuple[float, ...]:
    """The half-life with which caches of each layer hit most.

    On average over the sizes from an eighth to a half of a layer's experts. Scored are the second
    halves of each text's *fit* tokens, as in :func:`moepack.cache_curves.cross_fitted_hit_curves`:
    caches that are still full of the text before would have all half-lives short.
    """
    fit = np.flatnonzero(trace.part == ROUTING_PARTS.index("fit"))[:FITTED_TOKENS]
    halves = trace.take(slice(int(fit[-1]) + 1)).halved_fit().unpredicted()
    hot = hot_rankings(halves, layers)
    scored = halves.part == ROUTING_PARTS.index("select")
    tried = [each for each in HALF_LIVES if each <= max(HALF_LIVES[0], len(scored))]
    hits = np.empty((len(tried), len(layers)))
    for place, half_life in enumerate(tried):
        ranks = stack_ranks(halves, layers, hot, "lfu_decay", [half_life] * len(layers))
        curves = rank_curves(ranks.ids[scored], layers)
        for row, layer in enumerate(layers):
            most = max(layer.top_k, layer.num_experts // 2)
            least = max(layer.top_k, layer.num_experts // 8)
            hits[place, row] = curves[row, least : most + 1].mean()
    return tuple(tried[place] for place in hits.argmax(axis=0))
