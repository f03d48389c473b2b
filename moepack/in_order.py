"""The experts of a token one after the other, through frames: in one fixed order, or as ready.

A fixed order knows nothing of what is missing: there the mean over all ways to place it is taken.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.cost import Array

#: Ways to place what is missing that are averaged over; of more than these so many are drawn.
MAX_PLACINGS = 70

_Key = tuple[float, ...]


def in_order_s(
    top_k: int,
    expert_s: Array,
    top_s: Array,
    bottom_s: Array,
    hidden_s: Array,
    frames: int,
    shared_s: float = 0.0,
    *,
    as_ready: bool = False,
) -> Array:
    """Seconds of the K experts of a token, by how many lack their bottom and how many both.

    Everything that is missing is asked for at once, in order; a fetch takes over the frame of the
    one that is ``frames`` before it, once that expert has been computed. Derived: the pipeline is
    walked for every way to place the missing experts among the K, each taking the same time.

    Parameters
    ----------
    expert_s, top_s, bottom_s : [C]
        Compute of an expert, and the link's seconds for a top and for a bottom.
    hidden_s : [C]
        Compute of a top, which may begin before the bottom has come.
    shared_s
        Compute of what comes before the experts, and needs none of them.
    as_ready
        What is there is computed first, then the others as they arrive.

    Returns
    -------
    [K + 1, K + 1, C]
        Meaningless where the two numbers add up to more than K.
    """
    columns = (
        tuple(np.asarray(values).tolist()) for values in (expert_s, top_s, bottom_s, hidden_s)
    )
    return _by_lacks(top_k, *columns, min(frames, top_k), shared_s, as_ready)


@functools.lru_cache(maxsize=128)  # layers of one kind ask for the same
def _by_lacks(
    top_k: int,
    expert_s: _Key,
    top_s: _Key,
    bottom_s: _Key,
    hidden_s: _Key,
    frames: int,
    shared_s: float,
    as_ready: bool,
) -> Array:
    compute_s, first_s, second_s, head_s = (
        np.array(values) for values in (expert_s, top_s, bottom_s, hidden_s)
    )
    found = np.zeros((top_k + 1, top_k + 1, len(compute_s)))
    found[0, 0] = shared_s + top_k * compute_s
    for lack in range(1, top_k + 1):
        both = np.arange(lack + 1)
        # The mean over the missing ones, [lack + 1, C]: a top beside its bottom is hidden behind
        # the bottom's transfer at most.
        share = (both / lack)[:, None]
        missing = _Missing(
            lack,
            second_s + share * first_s,
            (1.0 - share) * head_s,
            share * np.minimum(head_s, second_s),
        )
        walk = _walk_as_ready if as_ready else _walk_in_order
        found[lack - both, both] = walk(top_k, compute_s, missing, frames, shared_s)
    return found


class _Missing(NamedTuple):
    """So many that lack something, and of each on average, [lack + 1, C].

    ``fetch_s`` is the link's; ``head_s`` what is computed of tops that are there, and ``hidden_s``
    of those that come, before their bottoms are there.
    """

    lack: int
    fetch_s: Array
    head_s: Array
    hidden_s: Array


def _walk_as_ready(
    top_k: int, compute_s: Array, missing: _Missing, frames: int, shared_s: float
) -> Array:
    """Seconds with so many missing, [lack + 1, C]: what is there is computed before anything."""
    lack, fetch_s, head_s, hidden_s = missing
    each_s = compute_s - head_s
    last_s = each_s - hidden_s
    now_s = shared_s + top_k * compute_s - lack * each_s
    arrival_s = np.zeros_like(fetch_s)
    done_s: list[Array] = []
    for turn in range(lack):
        if turn >= frames:
            arrival_s = np.maximum(arrival_s, done_s[turn - frames])
        arrival_s = arrival_s + fetch_s
        now_s = np.maximum(now_s + each_s, arrival_s + last_s)
        done_s.append(now_s)
    return now_s


def _walk_in_order(
    top_k: int, compute_s: Array, missing: _Missing, frames: int, shared_s: float
) -> Array:
    """The mean of them over all places of what is missing."""
    lack, fetch_s, head_s, hidden_s = missing
    before_s = head_s + hidden_s
    places = _placings(top_k, lack)  # [P, lack]
    done_s: list[Array] = []
    arrival_s = np.zeros((1, *fetch_s.shape))
    now_s = np.full((1, *fetch_s.shape), shared_s)
    last = np.full(len(places), -1)
    for turn in range(lack):
        if turn >= frames:
            arrival_s = np.maximum(arrival_s, done_s[turn - frames])
        arrival_s = arrival_s + fetch_s
        there = (places[:, turn] - last - 1)[:, None, None]
        now_s = np.maximum(now_s + (there + 1) * compute_s, arrival_s + compute_s - before_s)
        done_s.append(now_s)
        last = places[:, turn]
    return np.asarray((now_s + (top_k - 1 - last)[:, None, None] * compute_s).mean(axis=0))


@functools.cache
def _placings(top_k: int, lack: int) -> npt.NDArray[np.intp]:
    """Places of the missing ones, ascending, [P, lack]: all, or some drawn once and for all."""
    if math.comb(top_k, lack) <= MAX_PLACINGS:
        return np.array(list(itertools.combinations(range(top_k), lack)), dtype=np.intp)
    drawn = np.random.default_rng(0).random((MAX_PLACINGS, top_k)).argsort(axis=1)[:, :lack]
    return np.sort(drawn, axis=1).astype(np.intp)
