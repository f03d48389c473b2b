"""The planner's optimiser: one division of the fast tier among layers, and one choice in each.

Minimise ``sum over layers of f(layer, bytes)`` subject to the bytes adding up to the budget, where
f is the best that a layer can do with so many bytes (:mod:`moepack.layer_tables`: cut, slots,
policy, prefetching). After MoEpic (arXiv 2509.08342): the inner solve divides, the outer one
conquers, by exchanging quanta of the budget (:mod:`moepack.allocation`). Layers need not be convex
(slots are whole), so the division is also solved exactly, and the better of the two is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moepack.allocation import exact, exchange, total_cost
from moepack.cost import Array
from moepack.layer_tables import Choice, LayerTable

#: A quantum is this share of the budget, or this share of a layer's even part, if that is less.
QUANTA = 100
QUANTA_PER_LAYER = 10


@dataclass(frozen=True)
class Optimum:
    """The best division that was found.

    Attributes
    ----------
    choices : tuple of Choice
        By layer, in the order of the tables.
    seconds : float
        The objective: the sum of the choices' seconds. Below ``exact_s`` where bytes that quanta
        left over bought something.
    exchange_s, exact_s : float
        The objective of the division into quanta that the exchange ended with, and of the best.
    quanta : tuple of int
        By layer, of the better of the two.
    """

    choices: tuple[Choice, ...]
    seconds: float
    exchange_s: float
    exact_s: float
    quanta: tuple[int, ...]

    @property
    def gap_to_exact(self) -> float:
        """(exchange - exact) / exact: what the exchange alone would lose."""
        return (self.exchange_s - self.exact_s) / self.exact_s if self.exact_s else 0.0


def optimise(tables: Sequence[LayerTable], budget_bytes: int) -> Optimum:
    """Divide a budget among layers.

    The quantum is the smaller of 1 % of the budget and a tenth of a layer's even share. Bytes that
    no quantum uses are spent one option at a time, on what gains most for each of them.

    Parameters
    ----------
    tables
        One for each layer with experts, from :func:`moepack.layer_tables.tabulate`.
    budget_bytes
        For the slots of all layers.
    """
    quanta = max(QUANTA, QUANTA_PER_LAYER * len(tables))
    options = [_Options(table, budget_bytes, quanta) for table in tables]
    costs = [option.seconds for option in options]
    by_exchange, best = exchange(costs, quanta), exact(costs, quanta)
    exchange_s, exact_s = total_cost(costs, by_exchange), total_cost(costs, best)
    if exchange_s <= exact_s:  # of equals the one that began as an even division
        best, exact_s = by_exchange, exchange_s
    found = [option.at(int(count)) for option, count in zip(options, best, strict=True)]
    found = _spend_rest(tables, found, budget_bytes)
    choices = tuple(table.choice(*place) for table, place in zip(tables, found, strict=True))
    return Optimum(
        choices=choices,
        seconds=sum(choice.seconds for choice in choices),
        exchange_s=exchange_s,
        exact_s=exact_s,
        quanta=tuple(best.tolist()),
    )


def fixed_point_split(window_share: float, budget_experts: float, hits: Array) -> float:
    """MoEpic's split: the bottoms of the expected hits just fill the prefetch window.

    The root of ``h(M / (theta U)) (1 - theta) = W / (K t_e)``. The left side falls in theta
    (derived), so there is one root at most, found by bisection; the paper's iteration, damped or
    not, ends there too where it ends.

    Parameters
    ----------
    window_share
        W / (K t_e): the window over the transfer of all whole experts that a token needs.
    budget_experts
        M / U: the layer's budget in whole experts.
    hits : [N + 1]
        Hit rate of 0, 1 ... N slots; linear in between.

    Returns
    -------
    float
        theta; 0 where the window is long enough for everything that hits.
    """
    slots = np.arange(len(hits))

    def excess(theta: float) -> float:
        held = min(budget_experts / theta, float(slots[-1]))
        return float(np.interp(held, slots, hits)) * (1.0 - theta) - window_share

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if excess(middle) > 0.0 else (low, middle)
    return low


class _Options:
    """What one layer can do with 0, 1 ... quanta: seconds that never rise, and how."""

    def __init__(self, table: LayerTable, budget_bytes: int, quanta: int) -> None:
        useful = 0 if budget_bytes <= 0 else -(-table.full_bytes * quanta // budget_bytes)
        counts = range(min(quanta, useful) + 1)
        # Exact in integers, so that the even division of a budget is even to the byte.
        budgets = np.array([count * budget_bytes // quanta for count in counts], dtype=np.int64)
        best = table.best(budgets)
        self.seconds: Array = np.minimum.accumulate(best.seconds)
        falls = np.diff(self.seconds, prepend=np.inf) < 0.0
        self._reached: npt.NDArray[np.intp] = np.maximum.accumulate(
            np.where(falls, np.arange(len(falls)), 0)
        )
        self._best = best

    def at(self, count: int) -> tuple[int, int]:
        """(state, cut) of the best option within so many quanta."""
        place = self._reached[min(count, len(self._reached) - 1)]
        return int(self._best.state[place]), int(self._best.cut[place])


def _spend_rest(
    tables: Sequence[LayerTable], found: list[tuple[int, int]], budget_bytes: int
) -> list[tuple[int, int]]:
    """Improve single layers, most seconds for a byte first, while bytes are left."""
    found = list(found)
    used = np.array([table.used_bytes(*place) for table, place in zip(tables, found, strict=True)])
    while True:
        rest_bytes = budget_bytes - int(used.sum())
        rates = np.zeros(len(tables))
        better: list[tuple[int, int]] = []
        for index, (table, place) in enumerate(zip(tables, found, strict=True)):
            best = table.best(np.array([used[index] + rest_bytes]))
            better.append((int(best.state[0]), int(best.cut[0])))
            gain_s = float(table.seconds[place]) - float(best.seconds[0])
            more_bytes = table.used_bytes(*better[-1]) - int(used[index])
            if gain_s > 0.0:
                rates[index] = gain_s / more_bytes if more_bytes > 0 else np.inf
        chosen = int(rates.argmax())
        if rates[chosen] <= 0.0:
            return found
        found[chosen] = better[chosen]
        used[chosen] = tables[chosen].used_bytes(*found[chosen])
