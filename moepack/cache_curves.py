"""Curves over the size of a cache, scored on one part of a trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moepack.plan import Policy
from moepack.small_caches import small_cache_hits
from moepack.stack_ranks import StackRanks, layers_by_shape, stack_ranks
from moepack.trace import (
    NO_PREDICTION,
    ROUTING_PARTS,
    LayerShape,
    RoutingPart,
    Trace,
    hot_rankings,
)

Curves = npt.NDArray[np.float64]

#: Tokens of a part that caches of fewer than top-k slots are stepped over, in so many runs.
STEPPED_TOKENS = 256
_STEPPED_RUNS = 4


def hit_curves(
    ranks: StackRanks, trace: Trace, layers: Sequence[LayerShape], part: RoutingPart
) -> Curves:
    """Hit rate of caches of 0, 1 ... slots.

    From top-k slots on by rank, over all tokens of the part. For 1 to top-k - 1 slots no ranks
    hold (but of ``pinned``): such caches are stepped, from the ranking on, over at most
    :data:`STEPPED_TOKENS` tokens, in runs spread over the part.

    Returns
    -------
    float64 [L, N_max + 1]
        From a layer's own number of experts on, 1. Of a part without tokens 0 before that.
    """
    scored = ranks.ids[trace.part == ROUTING_PARTS.index(part)]
    curves = rank_curves(scored, layers)
    if ranks.policy != "pinned" and len(scored):
        for shape, rows in layers_by_shape(layers):
            hits, _ = _small_cache_rates(ranks, trace, shape, rows, part)
            curves[rows, 1 : shape.top_k] = hits.T
    return curves


def rank_curves(ranks: npt.NDArray[np.uint16], layers: Sequence[LayerShape]) -> Curves:
    """Hit rates as far as ranks [tokens, L, K] alone tell them: float64 [L, N_max + 1].

    See :func:`hit_curves`; of a clairvoyant cache's ranks that is everywhere.
    """
    widest = max((layer.num_experts for layer in layers), default=0)
    curves = np.ones((len(layers), widest + 1))
    for row, layer in enumerate(layers):
        found = np.bincount(ranks[:, row, : layer.top_k].ravel(), minlength=layer.num_experts)
        below = np.concatenate([[0], np.cumsum(found)[:-1]])
        curves[row, : layer.num_experts] = below / max(1, found.sum())
    return curves


def prediction_accuracy(trace: Trace, layers: Sequence[LayerShape], part: RoutingPart) -> Curves:
    """How often the r-th predicted expert is activated, A(r): float64 [L, 2K].

    Over the tokens that have such a prediction; 0 where there is none at all.
    """
    scored = trace.part == ROUTING_PARTS.index(part)
    ids, predicted = trace.ids[scored], trace.predicted[scored]
    known = predicted != NO_PREDICTION
    right = np.zeros(predicted.shape, dtype=np.bool_)
    for shape, rows in layers_by_shape(layers):
        used = ids[:, rows, None, : shape.top_k]
        right[:, rows] = (predicted[:, rows, :, None] == used).any(axis=3)
    counts = np.maximum(1, known.sum(axis=0))
    return np.asarray((right & known).sum(axis=0) / counts)


def predicted_cached(
    ranks: StackRanks, trace: Trace, layers: Sequence[LayerShape], part: RoutingPart
) -> Curves:
    """How often the r-th predicted expert is held by a cache of n slots, Q(r, n).

    Judged when the token reaches the layer. Over the tokens that have such a prediction; where
    there is none at all, 0. Below top-k slots as in :func:`hit_curves`.

    Returns
    -------
    float64 [L, 2K, N_max + 1]
    """
    scored = trace.part == ROUTING_PARTS.index(part)
    known = (trace.predicted[scored] != NO_PREDICTION).sum(axis=0)  # [L, 2K]
    widest = max((layer.num_experts for layer in layers), default=0)
    depth = trace.predicted.shape[2]
    curves = np.zeros((len(layers), depth, widest + 1))
    place = np.arange(depth) * (widest + 1)
    for row in range(len(layers)):
        # The rank of what is not there lands past every size.
        found = np.minimum(ranks.predicted[scored, row], widest) + place
        counts = np.bincount(found.ravel(), minlength=depth * (widest + 1))
        held = counts.reshape(depth, widest + 1)[:, :-1].cumsum(axis=1)
        curves[row, :, 1:] = held / np.maximum(1, known[row])[:, None]
    if ranks.policy != "pinned" and scored.any():
        for shape, rows in layers_by_shape(layers):
            _, held = _small_cache_rates(ranks, trace, shape, rows, part)
            curves[rows, :, 1 : shape.top_k] = held.transpose(1, 2, 0)
    return curves


def cross_fitted_hit_curves(
    trace: Trace,
    layers: Sequence[LayerShape],
    policy: Policy,
    half_lives: Sequence[float] = (),
) -> Curves:
    """Hit rates on *fit* that compare policies fairly, float64 [L, N_max + 1].

    A cache starts from a ranking of *fit*; were it scored on the same tokens, ``pinned`` would
    shine. So the ranking is learnt from the first half of each text's *fit* tokens, and the second
    halves are scored; the caches see all tokens of *fit* in order. See :func:`hit_curves`.

    Parameters
    ----------
    half_lives
        Of each layer, in tokens, where the policy is ``lfu_decay``.
    """
    halves = trace.halved_fit().unpredicted()
    hot = hot_rankings(halves, layers)
    ranks = stack_ranks(halves, layers, hot, policy, half_lives)
    return hit_curves(ranks, halves, layers, "select")


def _small_cache_rates(
    ranks: StackRanks,
    trace: Trace,
    shape: LayerShape,
    rows: Sequence[int],
    part: RoutingPart,
) -> tuple[Curves, Curves]:
    """Rates of caches of 1 to K - 1 slots, for some layers of one shape.

    Returns
    -------
    activated : float64 [K - 1, layers]
    predicted : float64 [K - 1, layers, 2K]
    """
    tokens = np.flatnonzero(trace.part == ROUTING_PARTS.index(part))
    if len(tokens) > STEPPED_TOKENS:
        length = STEPPED_TOKENS // _STEPPED_RUNS
        begins = np.linspace(0, len(tokens) - length, _STEPPED_RUNS).astype(np.intp)
        tokens = tokens[begins[:, None] + np.arange(length)].ravel()
    predicted = trace.predicted[tokens][:, rows]
    slots = np.arange(1, shape.top_k)
    hits, held = small_cache_hits(
        trace.ids[tokens][:, rows, : shape.top_k],
        predicted,
        np.array([ranks.hot[row] for row in rows]),
        ranks.policy,
        np.repeat(slots[:, None], len(rows), axis=1),
        [ranks.half_lives[row] for row in rows] if ranks.half_lives else [],
    )
    known = np.maximum(1, (predicted != NO_PREDICTION).sum(axis=0))
    return hits.mean(axis=(1, 3)), held.sum(axis=1) / known
