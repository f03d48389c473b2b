"""The outer solve, to the byte: one option for every layer, all of them within a budget.

Minimise ``sum over layers of f(o)`` subject to ``sum of b(o) <= B``, where a layer's option o takes
b bytes and f seconds: a multiple-choice knapsack. For any price p >= 0 of a byte

    ``sum f = bound + sum r + p (B - sum b)``,    ``r(o) = f(o) + p b(o) - min (f + p b)``,

where ``bound``, what those minima add up to less p B, is the same for all divisions. Every term
after it is 0 or more. So no division takes less than the bound; and where one is known that takes
e more, no option whose r is e or more is in a better one, which leaves a few options of each layer
(Pisinger, 1995, "A minimal algorithm for the multiple-choice knapsack problem"). Of these, layer by
layer, every partial division is kept that can still be better than the known one and that no other
undercuts in bytes and in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.cost import Array

Integers = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]

#: Options of a layer, and partial divisions, that are followed at most: the most promising. Up to
#: there the division is the best of all.
MOST_OPTIONS = 64
MOST_PARTIAL = 1024

# Differences below this share of the total are rounding.
_SAME = 1e-13


class Frontier(NamedTuple):
    """The options of one layer that no other undercuts in bytes and in seconds, each [O].

    Attributes
    ----------
    bytes : int64
        Ascending from 0.
    seconds : float64
        Descending.
    state, cut : int
        Their places in the layer's table.
    """

    bytes: Integers
    seconds: Array
    state: Places
    cut: Places

    def within(self, budget_bytes: Integers) -> Places:
        """The best option within each of some budgets, [Q]."""
        return np.searchsorted(self.bytes, budget_bytes, side="right") - 1


class Division(NamedTuple):
    """One option of every layer.

    Attributes
    ----------
    places : int [L]
        In each layer's frontier.
    bound_s : float
        No division of the budget takes less.
    """

    places: Places
    bound_s: float


def divide(layers: Sequence[Frontier], budget_bytes: int) -> Division:
    """Divide a budget, 0 bytes or more."""
    width = max(len(layer.bytes) for layer in layers)
    taken, seconds = (
        np.array([np.pad(each, (0, width - len(each)), mode="edge") for each in values])
        for values in (
            [layer.bytes for layer in layers],
            [layer.seconds for layer in layers],
        )
    )
    price, places = _price(taken, seconds, budget_bytes)
    places = _filled(taken, seconds, places, budget_bytes)
    costs = seconds + price * taken
    least = costs.min(axis=1, keepdims=True)
    bound_s = float(least.sum()) - price * budget_bytes
    total_s = float(seconds[np.arange(len(layers)), places].sum())
    better = _Search(taken, costs - least, price, budget_bytes).below(
        total_s - bound_s - _SAME * total_s
    )
    return Division(places if better is None else better, bound_s)


def _price(taken: Integers, seconds: Array, budget_bytes: int) -> tuple[float, Places]:
    """The price of a byte with the highest bound, and the options that it chooses within budget.

    By secants: between the options that a high price chooses, which fit, and those of a low one,
    which do not, lies the price at which both cost the same. It is the best where nothing costs
    less at it, else what does takes the place of one of them.
    """
    rows = np.arange(len(taken))

    def totals(places: Places) -> tuple[int, float]:
        return int(taken[rows, places].sum()), float(seconds[rows, places].sum())

    fitting = np.zeros(len(taken), dtype=np.intp)
    wanted = seconds.argmin(axis=1)
    (few, slow_s), (many, fast_s) = totals(fitting), totals(wanted)
    if many <= budget_bytes:
        return 0.0, wanted
    while True:
        price = (slow_s - fast_s) / (many - few)
        found = (seconds + price * taken).argmin(axis=1)
        found_bytes, found_s = totals(found)
        same_s = slow_s + price * few
        if not found_s + price * found_bytes < same_s - _SAME * abs(same_s):
            return price, fitting
        if found_bytes <= budget_bytes:
            fitting, few, slow_s = found, found_bytes, found_s
        else:
            many, fast_s = found_bytes, found_s


def _filled(taken: Integers, seconds: Array, places: Places, budget_bytes: int) -> Places:
    """Spend what is left on single layers, on most seconds for a byte first."""
    rows, places = np.arange(len(taken)), places.copy()
    while True:
        used = taken[rows, places]
        more = taken - used[:, None]
        fits = (more > 0) & (more <= budget_bytes - int(used.sum()))
        gain_s = seconds[rows, places][:, None] - seconds
        rates = np.divide(gain_s, more, out=np.zeros_like(gain_s), where=fits)
        row, place = np.unravel_index(int(rates.argmax()), rates.shape)
        if not rates[row, place] > 0.0:
            return places
        places[row] = place


class _Search:
    """All divisions by how far they lie above the bound: their *excess*.

    Parameters
    ----------
    taken, above : [L, O]
        Bytes of every option, and its r.
    """

    def __init__(self, taken: Integers, above: Array, price: float, budget_bytes: int) -> None:
        self._taken = taken
        self._above = above
        self._price = price
        self._budget_bytes = budget_bytes

    def below(self, excess_s: float) -> Places | None:
        """The best division of less excess; None where none was found."""
        options = [self._options(row, excess_s) for row in range(len(self._taken))]
        if not all(map(len, options)):
            return None
        sizes = [taken[places] for taken, places in zip(self._taken, options, strict=True)]
        # What the layers to come may take, at the least and at the most.
        least = sum(int(size.min()) for size in sizes)
        most = sum(int(size.max()) for size in sizes)
        used, excess = np.zeros(1, dtype=np.int64), np.zeros(1)
        steps: list[tuple[Places, Places]] = []
        for row, (size, places) in enumerate(zip(sizes, options, strict=True)):
            least -= int(size.min())
            most -= int(size.max())
            used = (used[:, None] + size).ravel()
            excess = (excess[:, None] + self._above[row, places]).ravel()
            unused = np.maximum(self._budget_bytes - most - used, 0)
            open_ = used + least <= self._budget_bytes
            open_ &= excess + self._price * unused < excess_s
            kept = self._kept(np.flatnonzero(open_), used, excess)
            if not len(kept):
                return None
            used, excess = used[kept], excess[kept]
            steps.append((kept // len(places), places[kept % len(places)]))
        at = int((excess + self._price * (self._budget_bytes - used)).argmin())
        found = np.empty(len(steps), dtype=np.intp)
        for row in reversed(range(len(steps))):
            before, places = steps[row]
            found[row], at = places[at], int(before[at])
        return found

    def _options(self, row: int, excess_s: float) -> Places:
        """Those of a layer that a division of less excess may have, ascending."""
        above = self._above[row]
        # Behind its own options a layer's last is repeated.
        own = np.diff(self._taken[row], prepend=-1) > 0
        places = np.flatnonzero(own & (above < excess_s))
        if len(places) > MOST_OPTIONS:
            places = np.sort(places[above[places].argsort(kind="stable")[:MOST_OPTIONS]])
        return places

    def _kept(self, places: Places, used: Integers, excess: Array) -> Places:
        """Of partial divisions those that none undercuts, thinned evenly where they are many."""
        seconds = excess - self._price * used  # but for what all of them share
        places = places[np.lexsort((seconds[places], used[places]))]
        lowest = np.minimum.accumulate(seconds[places])
        places = places[np.concatenate([[True], lowest[1:] < lowest[:-1]])[: len(places)]]
        if len(places) <= MOST_PARTIAL:
            return places
        begin, end = int(used[places[0]]), int(used[places[-1]])
        part = (used[places] - begin) * MOST_PARTIAL // (end - begin + 1)
        order = np.lexsort((excess[places], part))
        first = np.diff(part[order], prepend=-1) > 0
        return places[np.sort(order[first])]
