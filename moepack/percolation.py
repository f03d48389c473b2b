"""The caches of all sizes at once: what one token does to the stack of a layer.

A cache of n slots that keeps the n best of what it held and what the token used holds, whatever n,
the first n of one *stack* (Mattson et al., 1970, "Evaluation techniques for storage hierarchies").
A token changes the stack by percolation: a *pool* walks down it with the experts that the caches
so far have dropped. At each place the expert that stood there joins the pool, unless the token
uses it, and the best of the pool stays; the pool never holds more than K.

A place needs the pool of the place above it and the stack that the token before left there. So
token t can be at place n while token t + 1 is at place n - 1: all tokens in flight, of all
layers, are one numpy operation, and a trace takes tokens + N steps instead of tokens x N.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moepack.expert_order import ExpertOrder

#: Tokens whose stacks are held at once, each N codes of every layer.
_CHUNK_TOKENS = 1024

#: Places of stacks that are turned into ranks at once, so that they stay in the processor's cache.
_RANKED_PLACES = 1 << 17


def ranks(
    order: ExpertOrder,
    hot: npt.NDArray[np.integer],
    asked: npt.NDArray[np.integer] | None = None,
    *,
    bypass: bool = False,
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Where experts stand in the stack when a token arrives: held by every cache of more slots.

    Peak memory: the stacks of 1,024 tokens, twice.

    Parameters
    ----------
    hot : int [layers, N]
        The stack before the first token.
    order
        Where a token uses fewer than K experts, the code ``before`` of what is not there is the
        dtype's largest, and that ``after`` 0.
    asked : int [tokens, layers, any]
        Ids of experts beside those that the token uses.
    bypass
        Whether a cache may drop what the token used; else those experts stand above all others.

    Returns
    -------
    used : uint16 [tokens, layers, K]
        Of the experts that the token uses; anything where there is none.
    others : uint16 [tokens, layers, any]
        Of what was asked for.
    """
    if asked is None:
        asked = np.zeros((*order.before.shape[:2], 0), dtype=np.intp)
    used = np.empty(order.before.shape, dtype=np.uint16)
    others = np.empty(asked.shape, dtype=np.uint16)
    stack = np.take_along_axis(order.start, hot, axis=1).T  # [N, layers]
    ranked = 1 + _RANKED_PLACES // stack.size  # tokens
    for begin in range(0, len(used), _CHUNK_TOKENS):
        rows = slice(begin, begin + _CHUNK_TOKENS)
        before, after = (
            np.ascontiguousarray(codes[rows].transpose(2, 0, 1))
            for codes in (order.before, order.after)
        )
        stacks, found = _percolate(stack, before, after, bypass=bypass)
        stack = stacks[-1].copy()
        used[rows] = found.transpose(1, 2, 0)
        for part in range(0, len(stacks) - 1 if asked.shape[2] else 0, ranked):
            arrived = stacks[part : min(part + ranked, len(stacks) - 1)]
            here = slice(begin + part, begin + part + len(arrived))
            places = _places(arrived, order.expert_of)
            others[here] = np.take_along_axis(places, asked[here].astype(np.intp), axis=2)
    return used, others


def _percolate(
    stack: npt.NDArray[Any],
    before: npt.NDArray[Any],
    after: npt.NDArray[Any],
    *,
    bypass: bool,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The stack before each token, and after the last; and where each token's experts stood.

    Parameters
    ----------
    stack : [N, layers]
    before, after : [K, tokens, layers]

    Returns
    -------
    stacks : [tokens + 1, N, layers]
        Codes.
    found : [K, tokens, layers]
        Places.
    """
    top_k, tokens, layers = before.shape
    experts = len(stack)
    stacks = np.empty((tokens + 1, experts, layers), dtype=before.dtype)
    stacks[0] = stack
    # Sorted, best first. Filled with the largest code it passes K places without a word: those
    # of the experts that the token used.
    full = np.iinfo(before.dtype).max
    pool = np.full_like(before, full)
    taken = top_k
    padded = not bypass and bool((before == full).any())
    if bypass:
        pool, taken = np.ascontiguousarray(np.sort(after, axis=0)[::-1]), 0
    elif padded:
        # Where fewer are used, fewer places are taken: what is not there comes last.
        pool[after == 0] = 0
        pool, taken = np.ascontiguousarray(np.sort(pool, axis=0)[::-1]), 0
        stacks[1:, :top_k] = np.sort(after, axis=0)[::-1].transpose(1, 0, 2)[:, :experts]
    else:
        stacks[1:, :top_k] = after.transpose(1, 0, 2)
    flat = stacks.reshape(-1, layers)
    # Every place that is not an expert's own is one more above it, until it is found.
    sought = np.ones(before.shape, dtype=np.bool_)
    above = np.zeros(before.shape, dtype=np.uint8 if experts <= 1 << 8 else np.uint16)
    # Place n of token t is row t * N + n; in step s, n = s - t: rows N - 1 apart.
    stride = max(1, experts - 1)
    for step in range(tokens + experts - 1):
        first, last = max(0, step - experts + 1), min(tokens, step + 1)
        begin = first * experts + step - first
        held = flat[begin : begin + (last - first - 1) * stride + 1 : stride].copy()
        same = before[:, first:last] == held
        left = sought[:, first:last]
        np.greater(left, same, out=left)
        above[:, first:last] += left.view(np.uint8)
        joining = held * ~same.any(axis=0)  # code 0 loses to all: one less in the pool
        inside = pool[:, first:last]
        settled = min(tokens, step + 1 - taken) - first
        if settled > 0:
            begin += experts  # the same place of the next token
            there = flat[begin : begin + (settled - 1) * stride + 1 : stride]
            stays = np.maximum(inside[0, :settled], joining[:settled])
            if padded:
                np.copyto(stays, there, where=inside[0, :settled] == full)
            there[...] = stays
        worse = np.minimum(inside, joining)
        np.maximum(inside[1:], worse[:-1], out=inside[:-1])
        inside[-1] = worse[-1]
    return stacks, above


def _places(stacks: npt.NDArray[Any], expert_of: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Place of every expert, by id: uint16 [tokens, layers, N] from codes [tokens, N, layers]."""
    tokens, experts, layers = stacks.shape
    row = np.arange(layers)
    ids = expert_of.reshape(-1).take(stacks + row * expert_of.shape[1])
    target = ids + (np.arange(tokens)[:, None, None] * layers + row) * experts
    places = np.empty(tokens * layers * experts, dtype=np.uint16)
    places[target] = np.arange(experts, dtype=np.uint16)[:, None]
    return places.reshape(tokens, layers, experts)
