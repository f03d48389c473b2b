"""Caches of fewer slots than a token uses experts: no stack, so each is stepped.

They hold nothing but experts of the last token. Which ones is what the rules of
:mod:`moepack.residency` say: wanted are the best of the token; they are admitted in ascending id,
each into the slot of an expert that this token does not use or, past those, of the worst unwanted
one that has been consumed; without such a slot not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moepack.expert_order import policy_order
from moepack.plan import Policy
from moepack.stack_ranks import Hot, layers_by_shape
from moepack.trace import LayerShape, Trace

Mask = npt.NDArray[np.bool_]


def stepped_hits(
    trace: Trace,
    layers: Sequence[LayerShape],
    hot: Hot,
    policies: Sequence[Policy],
    capacities: Sequence[int],
) -> tuple[Mask, Mask]:
    """Which activated, and which predicted, experts such caches hold when a token arrives.

    Exactly what :class:`moepack.residency.ExpertCache` does with one token a pass.

    Parameters
    ----------
    hot, policies, capacities
        Of each layer: its ranking, policy, and slots.

    Returns
    -------
    activated : bool [tokens, L, K]
    predicted : bool [tokens, L, 2K]

    Raises
    ------
    ValueError
        When a layer has slots for all that a token uses: :func:`moepack.stack_ranks.stack_ranks`
        ranks such.
    """
    for layer, slots in zip(layers, capacities, strict=True):
        if not 0 <= slots < layer.top_k:
            raise ValueError(
                f"layer {layer.layer} has {slots} slots, expected 0 to {layer.top_k - 1}: fewer "
                "than a token uses"
            )
    activated = np.zeros(trace.ids.shape, dtype=np.bool_)
    predicted = np.zeros(trace.predicted.shape, dtype=np.bool_)
    for shape, alike in layers_by_shape(layers):
        for policy in dict.fromkeys(policies[row] for row in alike):
            rows = [row for row in alike if policies[row] == policy]
            hits, guessed = small_cache_hits(
                trace.ids[:, rows, : shape.top_k],
                trace.predicted[:, rows],
                np.array([hot[row] for row in rows]),
                policy,
                np.array([[capacities[row] for row in rows]]),
            )
            activated[:, rows, : shape.top_k] = hits[0]
            predicted[:, rows] = guessed[0]
    return activated, predicted


def small_cache_hits(
    ids: npt.NDArray[np.uint16],
    predicted: npt.NDArray[np.uint16],
    hot: npt.NDArray[np.integer],
    policy: Policy,
    capacities: npt.NDArray[np.integer],
) -> tuple[Mask, Mask]:
    """Several such caches for each of some layers of one shape.

    Parameters
    ----------
    ids : uint16 [tokens, layers, K]
    predicted : uint16 [tokens, layers, any]
    hot : int [layers, N]
    capacities : int [caches, layers]
        Each less than K.

    Returns
    -------
    activated : bool [caches, tokens, layers, K]
    predicted : bool [caches, tokens, layers, any]
    """
    tokens, layers, top_k = ids.shape
    by_id = np.argsort(ids, axis=2, kind="stable")
    # What may be held when a token arrives: of the ranking, or of the token before.
    ascending = np.take_along_axis(ids, by_id, axis=2)
    holdable = np.concatenate([hot[None, :, :top_k].astype(np.uint16), ascending])
    kept = np.empty((len(capacities), tokens + 1, layers, top_k), dtype=np.bool_)
    kept[:, 0] = np.arange(top_k) < capacities[:, :, None]
    if policy == "pinned":
        holdable[1:] = holdable[0]
        kept[:, 1:] = kept[:, :1]
    else:
        codes = np.take_along_axis(policy_order(ids, hot, policy).after, by_id, axis=2)
        _step(kept, holdable, codes, capacities)

    def held(asked: npt.NDArray[np.uint16]) -> Mask:
        same = asked[:, :, :, None] == holdable[:-1, :, None]
        found: Mask = (same & kept[:, :-1, :, None]).any(axis=4)
        return found

    return held(ids), held(predicted)


def _step(
    kept: Mask,
    holdable: npt.NDArray[np.uint16],
    codes: npt.NDArray[Any],
    capacities: npt.NDArray[np.integer],
) -> None:
    """Fill ``kept`` [caches, tokens + 1, layers, K]: which of ``holdable`` each cache holds.

    Parameters
    ----------
    codes : [tokens, layers, K]
        What each token's experts are worth, in ascending id.
    """
    better = np.argsort(np.argsort(-codes.astype(np.int64), axis=2), axis=2)
    never = np.iinfo(codes.dtype).max
    for now, code in enumerate(codes):
        wanted = better[now] < capacities[:, :, None]  # [caches, layers, K]
        same = holdable[now + 1][:, :, None] == holdable[now][:, None]
        hit = (same & kept[:, now, :, None]).any(axis=3)
        missing, loose = wanted & ~hit, hit & ~wanted
        free = capacities - hit.sum(axis=2)  # slots of experts that this token does not use
        holds = kept[:, now + 1]
        holds[:] = hit
        worth = np.full(hit.shape, never, dtype=codes.dtype)  # of the unwanted that are consumed
        for place in range(hit.shape[2]):
            into_free = missing[:, :, place] & (free > 0)
            free -= into_free
            holds[:, :, place] |= into_free
            instead = missing[:, :, place] & ~into_free
            if instead.any():
                cache, layer = np.nonzero(instead & (worth.min(axis=2) < never))
                worst = worth[cache, layer].argmin(axis=1)
                holds[cache, layer, worst] = False
                holds[cache, layer, place] = True
                worth[cache, layer, worst] = never
            np.copyto(worth[:, :, place], code[:, place], where=loose[:, :, place])
