"""What a cache makes of a trace: the hit rate of every cache size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moepack.residency import ExpertCache
from moepack.trace import ROUTING_PARTS, Ids, Trace, activation_counts, hot_ranking


def lru_hit_curves(
    trace: Trace, layers: tuple[tuple[int, int, int], ...]
) -> npt.NDArray[np.float32]:
    """Hit rate of every LRU cache size, for every part and layer.

    A cache starts from the hot ranking of *fit* and sees every token in order. From K slots on,
    LRU with whole-token admission is a stack algorithm (Mattson et al. 1970): a cache of n holds
    the n best keys, so one pass over the ranks serves all sizes. Below K slots the runtime's own
    cache is replayed over each part.

    Parameters
    ----------
    layers
        (decoder layer, experts, top-k) for every layer of the trace.

    Returns
    -------
    float32 [parts, L, experts + 1]
        Past a layer's own number of experts, 1.
    """
    widest = max((experts for _, experts, _ in layers), default=0)
    curves = np.ones((len(ROUTING_PARTS), len(layers), widest + 1), dtype=np.float32)
    for index, (_, experts, top_k) in enumerate(layers):
        hot = hot_ranking(activation_counts(trace, index, experts, top_k, "fit"))
        ids = trace.ids[:, index, :top_k]
        at_rank = _hits_by_rank(ids, trace.part, hot)
        for part in range(len(ROUTING_PARTS)):
            total = int((trace.part == part).sum()) * top_k
            if total:
                curves[part, index, 1 : experts + 1] = np.cumsum(at_rank[part]) / total
            curves[part, index, 0] = 0.0
            for capacity in range(1, min(top_k, experts)):
                tokens = ids[trace.part == part].tolist()
                curves[part, index, capacity] = _replayed_hit_rate(tokens, hot, capacity)
    return curves


def _hits_by_rank(
    ids: Ids, part: npt.NDArray[np.uint8], hot: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """How often an activated expert stood at each rank of the LRU order, int64 [parts, N].

    The order is the cache's own: last use, then the lower id.
    """
    order = list(hot)  # most recently used first
    counts = [[0] * len(hot) for _ in ROUTING_PARTS]
    for row, of_part in zip(ids.tolist(), part.tolist(), strict=True):
        tally = counts[of_part]
        ranks = sorted(map(order.index, row))
        for rank in ranks:
            tally[rank] += 1
        for rank in reversed(ranks):
            del order[rank]
        order[:0] = sorted(row)
    return np.array(counts)


def _replayed_hit_rate(tokens: list[list[int]], hot: tuple[int, ...], capacity: int) -> float:
    if not tokens:
        return 0.0
    cache = ExpertCache(capacity, hot)
    hits = sum(len(cache.step([row]).resident) for row in tokens)
    return hits / (len(tokens) * len(tokens[0]))
