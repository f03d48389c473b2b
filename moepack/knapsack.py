"""One choice for each item, the sizes together within a bound, at the least cost: exactly.

The multiple-choice knapsack problem, for many items (every expert of a model: ten thousand) with a
few choices each (encodings):

    minimise sum_i cost[i, x_i]   subject to   sum_i size[i, x_i] <= bound

With a price ``p`` for a unit of size, the sum over items of ``min_x (cost + p size)``, less
``p bound``, is a lower bound. The best price is the slope at which the steps of all items' lower
convex hulls, the steepest first, reach the bound. Under it every choice has a *regret*, by how much
its ``cost + p size`` is above the item's least, and a solution costs the lower bound, plus its
regrets, plus ``p`` for every unit of size that it leaves. So no solution better than the best known
one holds a choice whose regret reaches the gap between that and the lower bound. Few choices are
left; the items that have them are gone through by ascending regret, as partial solutions of which
no other is at once as small and as cheap, and it ends with the first item whose regret reaches the
gap: what has been left out could not have gained. The gap starts at less than one item's step and
shrinks as combinations fill the bound.

Sizes come in whole units, the greatest common divisor of their differences. Less than one of them
cannot be filled, and with the roles exchanged (the least size within a bound on costs) a solution
that is not better by a whole one is not better.

Sources: Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27, 1979 (the
relaxation); Pisinger, A minimal algorithm for the multiple-choice knapsack problem, EJOR 83, 1995
(the core that grows by regret).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Choices = npt.NDArray[np.intp]

#: A bound on a sum of floats is kept but for the rounding of such sums, as a share of it.
_ROUNDING = 1e-12


class _Steps(NamedTuple):
    """The steps of every item's lower convex hull, from its smallest choice on, steepest first.

    ``slope`` is the cost that a unit of size saves, ``item`` and ``choice`` what is then chosen.
    """

    slope: Floats
    item: Choices
    choice: Choices


class _Core(NamedTuple):
    """Where to look: a solution within the bound, and what every choice loses under the price."""

    base: Choices  # [items]
    left: float  # of the bound, under the base
    price: float
    regret: Floats  # [items, choices]; the base's are 0


class _Stage(NamedTuple):
    """Partial solutions behind one item: sizes beside the base's, regrets, and how they came."""

    size: Floats
    regret: Floats
    parent: Choices
    choice: npt.NDArray[np.int8]


def least_cost(size: Integers, cost: Floats, bound: int) -> Choices:
    """The choices of least cost whose sizes together are within ``bound``.

    Exact up to the rounding of sums of float64. Takes a second or two for 12,000 items with 4
    choices of costs that differ; items that are all alike are its worst case.

    Parameters
    ----------
    size, cost
        [items, choices]; sizes below 2^53 altogether, costs finite.

    Returns
    -------
    array
        int [items]: which choice each item takes.

    Raises
    ------
    ValueError
        When the smallest choices together exceed the bound.
    """
    least = int(size.min(axis=1).sum())
    if least > bound:
        raise ValueError(f"the least sizes are {least} together, the bound {bound}")
    bound -= (bound - least) % _unit(size)
    return _solve(size.astype(np.float64), cost, float(bound), 0.0)


def least_size(size: Integers, cost: Floats, limit: float) -> Choices:
    """The choices of least size whose costs together are within ``limit``.

    Parameters and result as those of :func:`least_cost`; takes some times as long. The limit is
    kept but for the rounding of sums, a part in 10^12.

    Raises
    ------
    ValueError
        When the least costs together exceed the limit.
    """
    least = float(cost.min(axis=1).sum())
    if least > limit:
        raise ValueError(f"the least costs are {least} together, the limit {limit}")
    bound = limit + abs(limit) * _ROUNDING
    return _solve(cost, size.astype(np.float64), bound, float(_unit(size)))


def _unit(size: Integers) -> int:
    """What all differences of an item's sizes are multiples of; 1 where there are none."""
    return int(np.gcd.reduce((size - size[:, :1]).ravel())) or 1


def _solve(size: Floats, cost: Floats, bound: float, cost_unit: float) -> Choices:
    """Least cost within a bound on sizes, where solutions differ by ``cost_unit`` or not at all."""
    core = _core(size, cost, bound)
    return core.base if core.price == 0 else _close(size, core, cost_unit)


def _smallest(size: Floats, cost: Floats) -> Choices:
    """Of each item the smallest choice; among equal ones the cheapest."""
    least = size == size.min(axis=1, keepdims=True)
    found: Choices = np.argmin(np.where(least, cost, np.inf), axis=1)
    return found


def _steps(size: Floats, cost: Floats) -> _Steps:
    """Every step, found by walking along all hulls at once."""
    rows = np.arange(len(size))
    here = _smallest(size, cost)
    slopes: list[Floats] = []
    choices: list[Choices] = []
    before = np.full(len(size), np.inf)
    while True:
        more = size - size[rows, here][:, None]
        saved = cost[rows, here][:, None] - cost
        slope = np.divide(saved, more, out=np.full(cost.shape, -np.inf), where=more > 0)
        steepest = slope.max(axis=1)
        if not (steepest > 0).any():
            break
        # Of equal slopes the shortest step: the others are on the same line, behind it.
        following = np.argmin(np.where(slope == steepest[:, None], more, np.inf), axis=1)
        # Rounding may make a step look steeper than the one before it.
        before = np.minimum(before, np.maximum(steepest, 0.0))
        slopes.append(before)
        choices.append(following)
        here = np.where(before > 0, following, here)
    slope = np.concatenate([np.empty(0), *slopes])
    order = np.argsort(-slope, kind="stable")[: np.count_nonzero(slope)]
    choice = np.concatenate([np.empty(0, np.intp), *choices])
    return _Steps(slope[order], order % len(size), choice[order])


def _core(size: Floats, cost: Floats, bound: float) -> _Core:
    """Take steps, the steepest first, until one exceeds the bound: its slope is the price."""
    rows = np.arange(len(size))
    base = _smallest(size, cost)
    left = bound - float(size[rows, base].sum())
    price = 0.0
    for slope, item, choice in zip(*_steps(size, cost), strict=True):
        step = float(size[item, choice] - size[item, base[item]])
        if step > left:
            price = float(slope)
            break
        left -= step
        base[item] = choice
    total = cost + price * size
    regret = np.maximum(total - total[rows, base][:, None], 0.0)
    return _Core(base, left, price, regret)


def _close(size: Floats, core: _Core, cost_unit: float) -> Choices:
    """The best solution of all, from the core's."""
    rows = np.arange(len(size))
    more = size - size[rows, core.base][:, None]
    others = np.where(np.arange(size.shape[1]) == core.base[:, None], np.inf, core.regret)
    least = others.min(axis=1)
    order = np.argsort(least, kind="stable")
    nothing = _Stage(np.zeros(1), np.zeros(1), np.zeros(1, np.intp), np.zeros(1, np.int8))
    stages, best = [nothing], (0, 0)
    gap = core.price * core.left
    # What is to be found is better by a unit; half of one is left to the rounding of sums.
    needed = cost_unit / 2
    for item in order:
        if least[item] >= gap - needed:
            break
        base = int(core.base[item])
        stage = _extended(stages[-1], more[item], others[item], base, gap - needed)
        stage = _undominated(stage, core.price)
        stages.append(stage)
        unused = np.where(stage.size <= core.left, core.left - stage.size, np.inf)
        lost = stage.regret + core.price * unused
        first = int(np.argmin(lost))
        if lost[first] < gap:
            gap, best = float(lost[first]), (len(stages) - 1, first)
    chosen = core.base.copy()
    number, state = best
    for number in range(best[0], 0, -1):
        chosen[order[number - 1]] = stages[number].choice[state]
        state = int(stages[number].parent[state])
    return chosen


def _extended(stage: _Stage, more: Floats, regret: Floats, base: int, gap: float) -> _Stage:
    """Every partial solution with every choice of one more item, but for those that cannot win.

    One that is not worth this item's least regret is worth no later item's either.
    """
    kept = np.flatnonzero(stage.regret + regret.min() < gap)
    parts = [(kept, stage.size[kept], stage.regret[kept], base)]
    for choice in np.flatnonzero(regret < gap):
        able = np.flatnonzero(stage.regret + regret[choice] < gap)
        sizes = stage.size[able] + more[choice]
        parts.append((able, sizes, stage.regret[able] + regret[choice], int(choice)))
    parents, sizes_of, regrets, choices = zip(*parts, strict=True)
    made = np.repeat(np.array(choices, np.int8), [len(part) for part in parents])
    return _Stage(np.concatenate(sizes_of), np.concatenate(regrets), np.concatenate(parents), made)


def _undominated(stage: _Stage, price: float) -> _Stage:
    """Those beside which no other is at once as small and as cheap, by ascending size."""
    cost = stage.regret - price * stage.size
    order = np.lexsort((cost, stage.size))
    ascending = cost[order]
    least = np.minimum.accumulate(ascending)
    kept = order[np.concatenate([[True], ascending[1:] < least[:-1]])]
    return _Stage(*(column[kept] for column in stage))
