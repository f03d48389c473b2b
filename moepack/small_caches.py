"""Caches of fewer slots than a token uses experts: no stack, so each is stepped.

They hold nothing but experts of the last token. Which ones is what the rules of
:mod:`moepack.residency` say: wanted are the best of the token; they are admitted in ascending id,
each into the slot of an expert that this token does not use or, past those, of the worst unwanted
one that has been consumed; without such a slot not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moepack.expert_order import policy_keys
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
    half_lives: Sequence[float | None] | None = None,
) -> tuple[Mask, Mask]:
    """Which activated, and which predicted, experts such caches hold when a token arrives.

    Exactly what :class:`moepack.residency.ExpertCache` does with one token a pass.

    Parameters
    ----------
    hot, policies, capacities
        Of each layer: its ranking, policy, and slots.
    half_lives
        Of each layer, in tokens, where its policy is ``lfu_decay``.

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
            each = [half_lives[row] for row in rows] if half_lives else []
            hits, guessed = small_cache_hits(
                trace.ids[:, rows, : shape.top_k],
                trace.predicted[:, rows],
                np.array([hot[row] for row in rows]),
                policy,
                np.array([[capacities[row] for row in rows]]),
                [half_life for half_life in each if half_life is not None],
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
    half_lives: Sequence[float] = (),
) -> tuple[Mask, Mask]:
    """Several such caches for each of some layers of one shape.

    Parameters
    ----------
    ids : uint16 [tokens, layers, K]
    predicted : uint16 [tokens, layers, any]
    hot : int [layers, N]
    capacities : int [caches, layers]
        Each less than K.
    half_lives
        Of each layer, in tokens, where the policy is ``lfu_decay``.

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
        keys = policy_keys(ids, hot.shape[1], policy, half_lives)
        keys = np.take_along_axis(keys, by_id, axis=2)
        # Ties to the lower id, which comes first.
        best_first = np.argsort(-keys.astype(np.float64), axis=2, kind="stable")
        _step(kept, holdable, np.argsort(best_first, axis=2), capacities)

    def held(asked: npt.NDArray[np.uint16]) -> Mask:
        found = np.zeros((len(kept), *asked.shape), dtype=np.bool_)
        for place in range(top_k):
            same = asked == holdable[:-1, :, place, None]
            found |= same & kept[:, :-1, :, place, None]
        return found

    return held(ids), held(predicted)


def _step(
    kept: Mask,
    holdable: npt.NDArray[np.uint16],
    better: npt.NDArray[np.intp],
    capacities: npt.NDArray[np.integer],
) -> None:
    """Fill ``kept`` [caches, tokens + 1, layers, K]: which of ``holdable`` each cache holds.

    Parameters
    ----------
    better : int [tokens, layers, K]
        How many of a token's experts are worth more than each, in ascending id.
    """
    same = holdable[1:, :, :, None] == holdable[:-1, :, None]  # [tokens, layers, K, K]
    for now, above in enumerate(better):
        wanted = above < capacities[:, :, None]  # [caches, layers, K]
        hit = (same[now] & kept[:, now, :, None]).any(axis=3)
        missing, loose = wanted & ~hit, hit & ~wanted
        # Where nothing that is used is unwanted, there is a slot for everything that is wanted.
        kept[:, now + 1] = hit | missing
        cache, layer = np.nonzero(loose.any(axis=2))
        if len(cache):
            free = capacities[cache, layer] - hit[cache, layer].sum(axis=1)
            kept[cache, now + 1, layer] = _replace(
                hit[cache, layer], missing[cache, layer], loose[cache, layer], above[layer], free
            )


def _replace(
    hit: Mask,
    missing: Mask,
    loose: Mask,
    above: npt.NDArray[np.intp],
    free: npt.NDArray[np.integer],
) -> Mask:
    """What caches hold after a token, some of whose hits are loose: not wanted any more.

    All are [caches, K], the token's experts in the order in which they are consumed, ``above`` as
    in :func:`_step`; ``free`` [caches] counts slots of experts that the token does not use.
    """
    into_free = missing & (missing.cumsum(axis=1) <= free[:, None])
    holds = hit | into_free
    instead = missing & ~into_free
    badness = np.where(loose, above, -1)  # of those whose slot may be taken
    for place in np.flatnonzero(instead[:, 1:].any(axis=0)) + 1:
        (rows,) = np.nonzero(instead[:, place])
        consumed = badness[rows, :place]
        worst = consumed.argmax(axis=1)
        found = consumed[np.arange(len(rows)), worst] >= 0
        rows, worst = rows[found], worst[found]
        holds[rows, worst] = False
        holds[rows, place] = True
        badness[rows, worst] = -1
    return holds
