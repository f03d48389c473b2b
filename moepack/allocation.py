"""The outer solve: dividing quanta of a budget among layers, by exchange and exactly.

A layer is its *costs*: seconds with 0, 1, 2 ... quanta, float64 [W], never rising; more quanta than
it has entries change nothing. The objective is the sum over layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moepack.cost import Array

Quanta = npt.NDArray[np.int64]

# Improvements below this share of the total are rounding.
_SAME = 1e-13


def uniform(layers: int, quanta: int) -> Quanta:
    """The same for every layer, the remainder spread over the first ones."""
    each, rest = divmod(quanta, layers)
    return np.full(layers, each) + (np.arange(layers) < rest)


def total_cost(costs: Sequence[Array], quanta: Quanta) -> float:
    """The objective of an allocation."""
    return float(
        sum(cost[min(count, len(cost) - 1)] for cost, count in zip(costs, quanta, strict=True))
    )


def exchange(costs: Sequence[Array], quanta: int) -> Quanta:
    """Divide quanta by exchange, from the uniform division on.

    As in MoEpic (arXiv 2509.08342) quanta move to the layer that gains most from the one that loses
    least, until no move helps. Here a move may be of any number of quanta, since a single one
    seldom buys a slot, and what a layer holds without using it lies in a reserve that all draw on.
    Every move lowers the total and there are finitely many divisions, so it ends; the end is the
    optimum where every layer's costs are convex.

    Returns
    -------
    int64 [L]
        Its sum is ``quanta``.
    """
    table = _padded(costs)
    layers, width = table.shape
    held = _smallest(table, np.minimum(uniform(layers, quanta), width - 1))
    moves = np.arange(width)
    # What k more quanta save a layer, and what k fewer cost it.
    gain, loss = np.empty(table.shape), np.empty(table.shape)
    changed = list(range(layers))
    while True:
        for layer in changed:
            here = table[layer, held[layer]]
            gain[layer] = -np.inf
            gain[layer, : width - held[layer]] = here - table[layer, held[layer] :]
            loss[layer] = np.inf
            loss[layer, : held[layer] + 1] = table[layer, held[layer] :: -1] - here
        # A move gives k quanta and takes from a layer what the reserve lacks for that.
        taken = np.maximum(moves - (quanta - int(held.sum())), 0)
        receivers, givers = _two_largest(gain), _two_largest(-loss)[:, taken]
        pairs = [(0, 0), (0, 1), (1, 0)]
        net = np.array([gain[receivers[i], moves] - loss[givers[j], taken] for i, j in pairs])
        alone = [(receivers[i] != givers[j]) | (taken == 0) for i, j in pairs]
        net = np.where(np.array(alone), net, -np.inf)
        pair, move = np.unravel_index(int(net.argmax()), net.shape)
        if not net[pair, move] > _SAME * table[np.arange(layers), held].sum():
            return held + uniform(layers, quanta - int(held.sum()))
        receiver, giver = receivers[pairs[pair][0], move], givers[pairs[pair][1], move]
        held[receiver] += move
        held[giver] -= taken[move]
        changed = [int(receiver), int(giver)]
        held[changed] = _smallest(table[changed], held[changed])


def exact(costs: Sequence[Array], quanta: int) -> Quanta:
    """Divide quanta optimally, by dynamic programming over the layers: O(L Q^2).

    ``best(l, q) = min over s of best(l - 1, q - s) + cost(l, s)``, where only those s are tried at
    which the layer's cost falls.

    Returns
    -------
    int64 [L]
        Its sum is ``quanta``.
    """
    # Beyond their entries no cost falls: a budget may be any number of times what there is to hold.
    surplus = max(0, quanta - sum(len(cost) - 1 for cost in costs))
    quanta -= surplus
    best = np.zeros(quanta + 1)
    chosen = np.zeros((len(costs), quanta + 1), dtype=np.int64)
    for layer, cost in enumerate(costs):
        steps = np.flatnonzero(np.diff(cost, prepend=np.inf) < 0.0)
        steps = steps[steps <= quanta]
        # Row r of the window is best[q - r] for every q; unreachable before the start.
        padded = np.concatenate([np.full(quanta, np.inf), best])
        shifted = np.lib.stride_tricks.sliding_window_view(padded, quanta + 1)[::-1]
        sums = shifted[steps] + cost[steps, None]
        place = sums.argmin(axis=0)
        chosen[layer] = steps[place]
        best = sums[place, np.arange(quanta + 1)]
    held = np.zeros(len(costs), dtype=np.int64)
    left = quanta
    for layer in reversed(range(len(costs))):
        held[layer] = chosen[layer, left]
        left -= held[layer]
    return held + uniform(len(costs), left + surplus)


def _padded(costs: Sequence[Array]) -> Array:
    """All layers in one table, the last cost repeated, [L, W]."""
    width = max(len(cost) for cost in costs)
    return np.array([np.pad(cost, (0, width - len(cost)), mode="edge") for cost in costs])


def _smallest(table: Array, held: Quanta) -> Quanta:
    """The fewest quanta with the same cost, [L]."""
    here = np.take_along_axis(table, held[:, None], axis=1)
    return np.asarray((table <= here).argmax(axis=1), dtype=np.int64)


def _two_largest(scores: Array) -> Quanta:
    """The rows of the two largest entries of every column, [2, W]."""
    first = scores.argmax(axis=0)
    others = scores.copy()
    others[first, np.arange(scores.shape[1])] = -np.inf
    return np.stack([first, others.argmax(axis=0)])
