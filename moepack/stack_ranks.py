"""Which caches hold an expert when it is needed: the ranks of a whole trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moepack import percolation
from moepack.expert_order import policy_order
from moepack.plan import Policy
from moepack.trace import NO_PREDICTION, LayerShape, Trace

#: The rank of what is not there: no cache has more slots.
NO_RANK = np.iinfo(np.uint16).max

Ranks = npt.NDArray[np.uint16]
Hot = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class StackRanks:
    """The ranks of a trace in the stack of one policy.

    An expert of rank r is resident in the layer's caches of more than r slots, and in no smaller
    one. All ranks are of the moment when a token reaches its layer: before it is accounted for.

    Attributes
    ----------
    ids : uint16 [tokens, L, K]
        Ranks of the activated experts; :data:`NO_RANK` past a layer's own top-k.
    predicted : uint16 [tokens, L, 2K]
        Ranks of the predicted experts; :data:`NO_RANK` where there is no prediction.
    policy : str
    hot : tuple of tuples of int
        What the caches started from, by layer.
    half_lives : tuple of float
        By layer, in tokens, of ``lfu_decay``; else empty.
    """

    ids: Ranks
    predicted: Ranks
    policy: Policy
    hot: tuple[tuple[int, ...], ...]
    half_lives: tuple[float, ...] = ()


def stack_ranks(
    trace: Trace,
    layers: Sequence[LayerShape],
    hot: Hot,
    policy: Policy,
    half_lives: Sequence[float] = (),
) -> StackRanks:
    """Ranks under the rules of :mod:`moepack.residency`, one token a pass.

    They hold for caches of at least top-k slots: smaller ones cannot hold all that a token uses,
    and :func:`moepack.small_caches.stepped_hits` steps them. A part of a trace is ranked by itself
    when that part alone is passed.

    Parameters
    ----------
    hot
        For each layer every expert, hottest first: what a cache holds at the start.
    half_lives
        Of each layer, in tokens, where the policy is ``lfu_decay``.
    """
    ids = np.full(trace.ids.shape, NO_RANK, dtype=np.uint16)
    predicted = np.full(trace.predicted.shape, NO_RANK, dtype=np.uint16)
    for shape, rows in layers_by_shape(layers):
        ranking = np.array([hot[row] for row in rows], dtype=np.intp)
        used = trace.ids[:, rows, : shape.top_k]
        guessed = trace.predicted[:, rows]
        known = guessed != NO_PREDICTION
        asked = np.where(known, guessed, 0)
        if policy == "pinned":
            place = np.argsort(ranking, axis=1).astype(np.uint16)[None]
            found = tuple(
                np.take_along_axis(place, each.astype(np.intp), axis=2) for each in (used, asked)
            )
        else:
            each = [half_lives[row] for row in rows] if half_lives else []
            order = policy_order(used, ranking, policy, half_lives=each)
            found = percolation.ranks(order, ranking, asked if known.any() else None)
        ids[:, rows, : shape.top_k] = found[0]
        if known.any():
            predicted[:, rows] = np.where(known, found[1], NO_RANK)
    return StackRanks(ids, predicted, policy, tuple(map(tuple, hot)), tuple(half_lives))


def layers_by_shape(layers: Sequence[LayerShape]) -> Iterator[tuple[LayerShape, list[int]]]:
    """Layers with equally many experts and the same top-k, and where they stand in the trace."""
    for shape in dict.fromkeys(layer._replace(layer=0) for layer in layers):
        yield shape, [row for row, layer in enumerate(layers) if layer[1:] == shape[1:]]
