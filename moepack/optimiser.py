"""The planner's optimiser: one division of the fast tier among layers, and one choice in each.

Minimise ``sum over layers of f(layer, bytes)`` subject to the bytes adding up to the budget, where
f is the best that a layer can do with so many bytes (:mod:`moepack.layer_tables`: cut, slots,
policy, prefetching). After MoEpic (arXiv 2509.08342): the inner solve divides, the outer one
conquers. MoEpic exchanges quanta of the budget between layers; here the budget is divided to the
byte (:mod:`moepack.byte_division`), since what does not fill a quantum is lost otherwise: slots are
large beside quanta. What the exchange would lose (:mod:`moepack.allocation`) can still be asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moepack.allocation import exact, exchange, total_cost
from moepack.byte_division import Frontier, divide
from moepack.cost import Array
from moepack.layer_tables import Choice, LayerTable
from moepack.mixed_tables import MixedTable

#: A quantum is this share of the budget, or this share of a layer's even part, if that is less.
QUANTA = 100
QUANTA_PER_LAYER = 10


@dataclass(frozen=True)
class InQuanta:
    """The same budget divided into quanta.

    Attributes
    ----------
    exchange_s, exact_s : float
        The objective of the division that the exchange ended with, and of the best.
    quanta : tuple of int
        By layer, of the best.
    """

    exchange_s: float
    exact_s: float
    quanta: tuple[int, ...]

    @property
    def gap_to_exact(self) -> float:
        """(exchange - exact) / exact: what the exchange alone would lose."""
        return (self.exchange_s - self.exact_s) / self.exact_s if self.exact_s else 0.0


@dataclass(frozen=True)
class Optimum:
    """The best division that was found.

    Attributes
    ----------
    choices : tuple of Choice
        By layer, in the order of the tables.
    seconds : float
        The objective: the sum of the choices' seconds.
    bound_s : float
        No division of the budget takes less.
    """

    choices: tuple[Choice, ...]
    seconds: float
    bound_s: float
    _frontiers: tuple[Frontier, ...] = field(repr=False)
    _budget_bytes: int = field(repr=False)

    @cached_property
    def in_quanta(self) -> InQuanta:
        """What dividing quanta comes to; see :mod:`moepack.allocation`.

        The quantum is the smaller of 1 % of the budget and a tenth of a layer's even share.
        """
        quanta = max(QUANTA, QUANTA_PER_LAYER * len(self._frontiers))
        costs = [_costs(each, self._budget_bytes, quanta) for each in self._frontiers]
        by_exchange, best = exchange(costs, quanta), exact(costs, quanta)
        exchange_s, exact_s = total_cost(costs, by_exchange), total_cost(costs, best)
        # The sums of equals may differ by their rounding.
        return InQuanta(exchange_s, min(exchange_s, exact_s), tuple(best.tolist()))


def optimise(tables: Sequence[LayerTable | MixedTable], budget_bytes: int) -> Optimum:
    """Divide a budget among layers.

    Parameters
    ----------
    tables
        One for each layer with experts, from :func:`moepack.layer_tables.tabulate`; of a mixed one
        from :func:`moepack.mixed_tables.tabulate_mixed`.
    budget_bytes
        For the slots of all layers.
    """
    frontiers = tuple(table.frontier for table in tables)
    found = divide(frontiers, budget_bytes)
    choices = tuple(
        table.choice(int(frontier.state[place]), int(frontier.cut[place]))
        for table, frontier, place in zip(tables, frontiers, found.places, strict=True)
    )
    seconds = sum(choice.seconds for choice in choices)
    return Optimum(choices, seconds, found.bound_s, frontiers, budget_bytes)


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


def _costs(frontier: Frontier, budget_bytes: int, quanta: int) -> Array:
    """Seconds of one layer with 0, 1 ... quanta, as far as they fall."""
    full_bytes = int(frontier.bytes[-1])
    useful = 0 if budget_bytes <= 0 else -(-full_bytes * quanta // budget_bytes)
    counts = range(min(quanta, useful) + 1)
    # Exact in integers, so that the even division of a budget is even to the byte.
    budgets = np.array([count * budget_bytes // quanta for count in counts], dtype=np.int64)
    return frontier.seconds[frontier.within(budgets)]
