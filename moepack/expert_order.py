"""The orders in which caches keep experts, as integers: what makes a trace fast to replay.

What an expert is worth to a cache (:mod:`moepack.residency`) changes only when it is used, and
depends on no cache's size. So the worth after every activation of a trace is known before any
cache is looked at. Sorted, the worths of a layer become *codes*: larger is better, no two equal,
ties (to the lower expert id) settled. Whatever steps caches then compares small integers, the
same for every policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.plan import Policy
from moepack.residency import LCP_PER_TOKEN, decay, growth

Codes = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class ExpertOrder(NamedTuple):
    """The codes of some layers of one shape. Code 0 is nobody's, nor is the dtype's largest.

    Attributes
    ----------
    start : [layers, N]
        Code of every expert before the trace, by expert id.
    before, after : [tokens, layers, K]
        Code of every activated expert when its token arrives, and from then on.
    expert_of : uint16 [layers, codes]
        Whose code it is.
    """

    start: Codes
    before: Codes
    after: Codes
    expert_of: npt.NDArray[np.uint16]


class _Uses(NamedTuple):
    """Activations of some layers, grouped by expert; each expert's in order of time.

    Attributes
    ----------
    activation : int [layers, tokens * K]
        Which activation it is, counted token by token.
    expert : uint16 [layers, tokens * K]
    first, last : bool [layers, tokens * K]
        Whether it is its expert's first, or last.
    """

    activation: npt.NDArray[np.intp]
    expert: npt.NDArray[np.uint16]
    first: npt.NDArray[np.bool_]
    last: npt.NDArray[np.bool_]

    def scatter(self, values: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
        """Values by use, laid out as [tokens, layers, K]."""
        flat = np.empty_like(values)
        np.put_along_axis(flat, self.activation, values, axis=1)
        tokens, layers, top_k = shape
        return flat.reshape(layers, tokens, top_k).transpose(1, 0, 2)


def policy_order(
    ids: npt.NDArray[np.uint16],
    hot: npt.NDArray[np.integer],
    policy: Policy,
    *,
    half_lives: Sequence[float] = (),
    tokens_per_tick: int = 1,
) -> ExpertOrder:
    """The order of a policy that goes by use, under the rules of :mod:`moepack.residency`.

    Parameters
    ----------
    ids : uint16 [tokens, layers, K]
        Distinct experts of each token.
    hot : int [layers, N]
        Every expert, hottest first.
    half_lives
        Of each layer, in tokens, where the policy is ``lfu_decay``.
    tokens_per_tick
        Steps that the cache counts as one token: 1, or the number of layers for a shared pool.
    """
    experts = hot.shape[1]
    uses = _uses(ids)
    keys = _keys(uses, ids, experts, policy, half_lives, tokens_per_tick)
    after = _dense(keys, experts + 1, _code_dtype(ids, experts))
    start = _unused(hot, after)
    before = np.empty_like(after)
    before[:, 1:] = after[:, :-1]
    _put(before, uses.first, start, uses.expert)
    return _assemble(uses, start, before, after, ids.shape)


def policy_keys(
    ids: npt.NDArray[np.uint16], experts: int, policy: Policy, half_lives: Sequence[float] = ()
) -> npt.NDArray[Any]:
    """:func:`moepack.residency.access_key` after each activation, [tokens, layers, K].

    Good for comparing the experts of one token: under ``lru``, whose key is the token's number, all
    have 0.
    """
    if policy == "lru":
        return np.zeros(ids.shape, dtype=np.int8)
    if policy == "lfu_decay":
        return _decaying_keys(ids, experts, half_lives)
    uses = _uses(ids)
    return uses.scatter(_keys(uses, ids, experts, policy, (), 1), ids.shape)


def next_use_order(ids: npt.NDArray[np.uint16], experts: int) -> ExpertOrder:
    """The clairvoyant order: whoever is used sooner is worth more.

    Parameters
    ----------
    ids : uint16 [tokens, layers, K]
    experts
        N.
    """
    uses = _uses(ids)
    tokens, layers, top_k = ids.shape
    own = _dense(
        _narrow(tokens - 1 - uses.activation // top_k), experts + 1, _code_dtype(ids, experts)
    )
    start = _unused(np.broadcast_to(np.arange(experts), (layers, experts)), own)
    after = np.empty_like(own)
    after[:, :-1] = own[:, 1:]
    _put(after, uses.last, start, uses.expert)
    never = start.copy()
    row, column = np.nonzero(uses.first)
    start[row, uses.expert[row, column]] = own[row, column]
    order = _assemble(uses, never, own, after, ids.shape)
    return order._replace(start=start)


def _uses(ids: npt.NDArray[np.uint16]) -> _Uses:
    flat = np.ascontiguousarray(ids.transpose(1, 0, 2)).reshape(ids.shape[1], -1)
    index = np.argsort(flat, axis=1, kind="stable")
    expert = np.take_along_axis(flat, index, axis=1)
    edge = np.ones((len(expert), 1), dtype=np.bool_)
    changes = expert[:, 1:] != expert[:, :-1]
    return _Uses(index, expert, np.hstack([edge, changes]), np.hstack([changes, edge]))


def _nth_use(uses: _Uses) -> npt.NDArray[np.intp]:
    """Of its expert: 1, 2, 3 ..."""
    place = np.arange(uses.activation.shape[1])
    began = np.maximum.accumulate(np.where(uses.first, place, 0), axis=1)
    return place - began + 1


def _keys(
    uses: _Uses,
    ids: npt.NDArray[np.uint16],
    experts: int,
    policy: Policy,
    half_lives: Sequence[float],
    tokens_per_tick: int,
) -> npt.NDArray[Any]:
    """:func:`moepack.residency.access_key` after each use, [layers, tokens * K]."""
    if policy == "lfu":
        return _narrow(_nth_use(uses))
    if policy == "lfu_decay":
        assert len(half_lives) == len(uses.expert), "a policy that decays, without half-lives"
        by_layer = _decaying_keys(ids, experts, half_lives).transpose(1, 0, 2)
        flat = by_layer.reshape(len(by_layer), -1)
        return np.take_along_axis(flat, uses.activation, axis=1)
    clock = uses.activation // ids.shape[2]
    if policy == "lru":
        return _narrow(clock)
    logarithms = np.array([0.0, *map(math.log, range(1, len(ids) + 1))])
    ticks = clock if tokens_per_tick == 1 else clock / tokens_per_tick
    return np.asarray(logarithms[_nth_use(uses)] + ticks * LCP_PER_TOKEN)


def _decaying_keys(
    ids: npt.NDArray[np.uint16], experts: int, half_lives: Sequence[float]
) -> npt.NDArray[np.float64]:
    """:func:`moepack.residency.access_key` after each activation, [tokens, layers, K]."""
    tokens, layers, _ = ids.shape
    known = {half_life: place for place, half_life in enumerate(dict.fromkeys(half_lives))}
    kind = np.array([known[half_life] for half_life in half_lives])
    # [kinds, tokens], and [kinds, tokens, 2]
    left = np.array([[decay(age, each) for age in range(tokens)] for each in known])
    grown = np.array([[growth(token, each) for token in range(tokens)] for each in known])
    score, last = np.zeros((layers, experts)), np.zeros((layers, experts), dtype=np.intp)
    row, kinds = np.arange(layers)[:, None], kind[:, None]
    scores = np.empty(ids.shape)
    for now, used in enumerate(ids.astype(np.intp)):
        kept = score[row, used] * left[kinds, now - last[row, used]]
        scores[now] = score[row, used] = kept + 1.0
        last[row, used] = now
    doubled, rest = grown[kind].transpose(2, 1, 0)  # [tokens, layers]
    mantissa, exponent = np.frexp(scores * rest[:, :, None])
    return np.asarray(doubled[:, :, None] + exponent + 2.0 * mantissa)


def _narrow(keys: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """In 16 bits where they fit: numpy then sorts by radix."""
    return keys.astype(np.uint16) if keys.size and keys.max() < 1 << 16 else keys


def _code_dtype(ids: npt.NDArray[np.uint16], experts: int) -> type[np.uint16] | type[np.uint32]:
    largest = experts + ids.shape[0] * ids.shape[2]
    return np.uint16 if largest < np.iinfo(np.uint16).max else np.uint32


def _dense(
    keys: npt.NDArray[Any], lowest: int, dtype: type[np.uint16] | type[np.uint32]
) -> npt.NDArray[Any]:
    """Codes from ``lowest`` on, in the order of the keys; ties to the lower expert.

    Parameters
    ----------
    keys : [layers, uses]
        In the order of :class:`_Uses`, so that backwards the higher expert comes first.
    """
    order = np.argsort(keys[:, ::-1], axis=1, kind="stable")
    codes = np.empty(keys.shape, dtype=dtype)
    ascending = np.arange(lowest, lowest + keys.shape[1], dtype=dtype)[None]
    np.put_along_axis(codes[:, ::-1], order, ascending, axis=1)
    return codes


def _unused(hot: npt.NDArray[np.integer], like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Codes of experts never used, by expert id: below all others, the hotter the higher."""
    experts = hot.shape[1]
    codes = np.empty(hot.shape, dtype=like.dtype)
    np.put_along_axis(codes, hot, np.arange(experts, 0, -1, dtype=like.dtype)[None], axis=1)
    return codes


def _put(
    values: npt.NDArray[Any],
    where: npt.NDArray[np.bool_],
    of_expert: npt.NDArray[Any],
    expert: npt.NDArray[np.uint16],
) -> None:
    """Set the values of some uses to what ``of_expert`` [layers, N] says of their expert."""
    row, column = np.nonzero(where)
    values[row, column] = of_expert[row, expert[row, column]]


def _assemble(
    uses: _Uses,
    unused: npt.NDArray[Any],
    before: npt.NDArray[Any],
    after: npt.NDArray[Any],
    shape: tuple[int, int, int],
) -> ExpertOrder:
    layers, experts = unused.shape
    expert_of = np.zeros((layers, experts + 1 + after.shape[1]), dtype=np.uint16)
    np.put_along_axis(expert_of, unused.astype(np.intp), np.arange(experts)[None], axis=1)
    for codes in (before, after):
        np.put_along_axis(expert_of, codes.astype(np.intp), uses.expert, axis=1)
    return ExpertOrder(unused, uses.scatter(before, shape), uses.scatter(after, shape), expert_of)
