"""Caches of fewer slots than a token uses experts: no stack, so each is stepped.

They hold nothing but experts of the last token. Which ones is what the rules of
:mod:`moepack.residency` say: wanted are the best of the token; they are admitted in ascending id,
each into the slot of an expert that this token does not use or, past those, of the worst unwanted
one that has been consumed; without such a slot not at all.

A token leaves what is wanted of it, unless an unwanted expert was there already. So all tokens are
taken at once, as if each had found what is wanted of the one before; then those that find
something else, as long as there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moepack.expert_order import policy_keys
from moepack.plan import Policy
from moepack.stack_ranks import Hot, layers_by_shape
from moepack.trace import NO_PREDICTION, LayerShape, Trace

Mask = npt.NDArray[np.bool_]

#: No expert, and no prediction either.
_NOBODY = np.uint16(NO_PREDICTION - 1)


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
        _keep(kept, holdable, _better(keys), capacities)

    # Of each cache what it holds, and nobody behind that.
    experts = np.sort(np.where(kept[:, :-1], holdable[:-1], _NOBODY), axis=3)

    def held(asked: npt.NDArray[np.uint16]) -> Mask:
        found = np.zeros((len(kept), *asked.shape), dtype=np.bool_)
        for cache, most in enumerate(capacities.max(axis=1, initial=0)):
            for place in range(most):
                found[cache] |= asked == experts[cache, :, :, place, None]
        return found

    return held(ids), held(predicted)


def _better(keys: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """How many of a token's experts are worth more than each, [tokens, layers, K].

    Experts are in ascending id; of equals the first is worth more.
    """
    each = np.ascontiguousarray(keys.transpose(2, 0, 1))
    better = np.zeros(each.shape, dtype=np.int8)
    for place, key in enumerate(each):
        for before in range(place):
            first = each[before] >= key
            better[place] += first
            better[before] += ~first
    return np.ascontiguousarray(better.transpose(1, 2, 0))


def _keep(
    kept: Mask,
    holdable: npt.NDArray[np.uint16],
    better: npt.NDArray[np.int8],
    capacities: npt.NDArray[np.integer],
) -> None:
    """Fill ``kept`` [caches, tokens + 1, layers, K]: which of ``holdable`` each cache holds.

    Parameters
    ----------
    better : int [tokens, layers, K]
        How many of a token's experts are worth more than each, in ascending id.
    """
    tokens, layers, top_k = better.shape
    # Where each expert stands in the token before; K where it does not.
    place = np.full(better.shape, top_k, dtype=np.intp)
    for before in range(top_k):
        np.copyto(place, before, where=holdable[1:] == holdable[:-1, :, before, None])
    kept[:, 1:] = better < capacities[:, None, :, None]
    found = np.zeros((tokens, layers, top_k + 1), dtype=np.bool_)
    begins = np.arange(tokens * layers).reshape(tokens, layers, 1) * (top_k + 1)
    loose = np.empty((len(kept), tokens, layers), dtype=np.bool_)
    for cache, mine in enumerate(kept):
        found[:, :, :top_k] = mine[:-1]
        loose[cache] = (found.ravel()[begins + place] & ~mine[1:]).any(axis=2)
    rows: tuple[npt.NDArray[np.intp], ...] = loose.nonzero()
    there = np.zeros((len(rows[0]), top_k + 1), dtype=np.bool_)
    while len(rows[0]):
        caches, now, row = rows
        there = there[: len(now)]
        there[:, :top_k] = kept[caches, now, row]
        hit = np.take_along_axis(there, place[now, row], axis=1)
        slots, above = capacities[caches, row], better[now, row]
        after = _after(hit, above < slots[:, None], above, slots - hit.sum(axis=1))
        changed = (after != kept[caches, now + 1, row]).any(axis=1)
        kept[caches[changed], now[changed] + 1, row[changed]] = after[changed]
        # The tokens behind those that leave something else.
        changed &= now + 1 < tokens
        rows = caches[changed], now[changed] + 1, row[changed]


def _after(
    hit: Mask,
    wanted: Mask,
    above: npt.NDArray[np.int8],
    free: npt.NDArray[np.integer],
) -> Mask:
    """What caches hold after a token.

    All are [caches, K], the token's experts in the order in which they are consumed, ``above`` as
    in :func:`_keep`; ``free`` [caches] counts slots of experts that the token does not use.
    """
    missing, loose = wanted & ~hit, hit & ~wanted
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
