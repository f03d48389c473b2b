"""The knapsack finds what trying everything finds: within a size, and within a cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from moepack.knapsack import Floats, Integers, least_cost, least_size


def every_solution(size: Integers, cost: Floats) -> Iterator[tuple[int, float]]:
    """Size and cost of every way to choose, by trying all."""
    items = range(len(size))
    for choices in itertools.product(range(size.shape[1]), repeat=len(size)):
        taken = sum(int(size[item, choices[item]]) for item in items)
        yield taken, sum(float(cost[item, choices[item]]) for item in items)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Integers, Floats]:
    """Few items, often of the same sizes; costs in eighths, so that sums are exact, with ties."""
    items = draw(st.integers(1, 5))
    choices = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 30), min_size=choices, max_size=choices)
    alike = draw(st.booleans())
    size = [draw(sizes)] * items if alike else [draw(sizes) for _ in range(items)]
    eighths = st.integers(0, draw(st.sampled_from([3, 1000])))
    cost = [[draw(eighths) / 8 for _ in range(choices)] for _ in range(items)]
    return np.array(size, np.int64), np.array(cost)


@given(problems(), st.floats(0, 1.1))
def test_no_choice_within_the_bound_costs_less(
    problem: tuple[Integers, Floats], share: float
) -> None:
    size, cost = problem
    least, most = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    bound = least + int(share * (most - least))
    chosen = least_cost(size, cost, bound)
    rows = np.arange(len(size))
    assert size[rows, chosen].sum() <= bound
    best = min(cost for taken, cost in every_solution(size, cost) if taken <= bound)
    assert cost[rows, chosen].sum() == best


@given(problems(), st.integers(0, 100))
def test_no_choice_within_the_limit_is_smaller(
    problem: tuple[Integers, Floats], eighths: int
) -> None:
    size, cost = problem
    limit = float(cost.min(axis=1).sum()) + eighths / 8
    chosen = least_size(size, cost, limit)
    rows = np.arange(len(size))
    assert cost[rows, chosen].sum() <= limit
    best = min(taken for taken, spent in every_solution(size, cost) if spent <= limit)
    assert size[rows, chosen].sum() == best


def test_thousands_of_items_fill_the_bound_to_the_last_unit() -> None:
    rng = np.random.default_rng(7)
    # An expert of 2048 by 768 in BF16, INT8, INT4_G32 and INT4_G64, in bytes.
    sizes = np.array([9437184, 4725760, 2949120, 2654208])
    worst = rng.lognormal(0, 1.5, (6144, 1))
    cost = worst * np.array([0, 0.008, 1.0, 1.3]) * rng.lognormal(0, 0.1, (6144, 4))
    size = np.tile(sizes, (6144, 1))
    rows = np.arange(6144)
    bound = 6144 * 3600000
    chosen = least_cost(size, cost, bound)
    unit = np.gcd.reduce(sizes[:-1] - sizes[1:])
    left = bound - size[rows, chosen].sum()
    assert 0 <= left < 100 * unit
    # No exchange of two experts' choices, and no change of one, gains anything.
    one = rng.integers(0, 6144, 200)
    assert np.all(
        (size[one] - size[one, chosen[one]][:, None] > left)
        | (cost[one] >= cost[one, chosen[one]][:, None])
    )
    again = least_size(size, cost, float(cost[rows, chosen].sum()) * (1 + 1e-9))
    assert size[rows, again].sum() <= size[rows, chosen].sum()
    assert size[rows, again].sum() >= bound - left - 100 * unit


def test_bounds_that_nothing_meets_are_refused() -> None:
    size, cost = np.array([[3, 5], [4, 6]]), np.array([[1.0, 0.5], [1.0, 0.25]])
    with pytest.raises(ValueError, match="the least sizes are 7 together, the bound 6"):
        least_cost(size, cost, 6)
    with pytest.raises(ValueError, match=r"the least costs are 0\.75 together, the limit 0\.5"):
        least_size(size, cost, 0.5)
