"""Dividing quanta: the exact division against brute force and a solver, the exchange against it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from moepack.allocation import exact, exchange, total_cost, uniform
from moepack.cost import Array


def costs_of(falls: list[list[float]]) -> list[Array]:
    """Costs that fall by so much with each quantum."""
    return [100.0 - np.cumsum([0.0, *layer]) for layer in falls]


def drawn(rng: np.random.Generator, layers: int, width: int, bought: float) -> list[Array]:
    """Layers whose costs fall with this share of the quanta."""
    falls = rng.random((layers, width)) * (rng.random((layers, width)) < bought)
    return [100.0 - np.cumsum([0.0, *(layer / width)]) for layer in falls]


falls = st.lists(
    st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.5, 7.0]) | st.floats(0.0, 10.0), max_size=4),
    min_size=1,
    max_size=4,
)


@given(falls=falls, quanta=st.integers(0, 12))
def test_the_exact_division_is_the_best_of_all(falls: list[list[float]], quanta: int) -> None:
    costs = costs_of(falls)
    best = min(
        total_cost(costs, np.array(held))
        for held in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(held) <= quanta
    )
    assert total_cost(costs, exact(costs, quanta)) == pytest.approx(best, abs=1e-9)


@given(falls=falls, quanta=st.integers(0, 12))
def test_the_exchange_divides_everything_and_never_beats_the_exact_division(
    falls: list[list[float]], quanta: int
) -> None:
    costs = costs_of(falls)
    by_exchange, best = exchange(costs, quanta), exact(costs, quanta)
    assert by_exchange.sum() == best.sum() == quanta
    assert min(by_exchange.min(), best.min()) >= 0
    assert total_cost(costs, by_exchange) >= total_cost(costs, best) - 1e-9
    even = total_cost(costs, uniform(len(costs), quanta))
    assert total_cost(costs, by_exchange) <= even + 1e-9


def test_more_quanta_than_there_is_to_hold_take_no_longer() -> None:
    costs = [np.array([6.0, 5.0, 1.0]), np.array([4.0, 3.0, 3.0])]
    held = exact(costs, 10**15)
    assert held.sum() == 10**15
    assert total_cost(costs, held) == 4.0


def test_no_move_gives_a_layer_more_than_its_costs_tell_of() -> None:
    # Three quanta to the first layer gain what two do, and are taken from the other at once.
    costs = [np.array([6.0, 5.0, 5.0, 1.0]), np.array([4.0, 4.0, 3.0])]
    assert total_cost(costs, exchange(costs, 4)) == total_cost(costs, exact(costs, 4)) == 5.0


@given(falls=falls, quanta=st.integers(0, 12))
def test_the_exchange_is_exact_where_costs_are_convex(
    falls: list[list[float]], quanta: int
) -> None:
    costs = costs_of([sorted(layer, reverse=True) for layer in falls])
    assert total_cost(costs, exchange(costs, quanta)) == pytest.approx(
        total_cost(costs, exact(costs, quanta)), abs=1e-9
    )


@given(falls=falls, quanta=st.integers(0, 12))
def test_more_quanta_are_never_dearer(falls: list[list[float]], quanta: int) -> None:
    costs = costs_of(falls)
    less, more = (total_cost(costs, exact(costs, count)) for count in (quanta, quanta + 1))
    assert more <= less + 1e-9


@given(layers=st.integers(1, 40), quanta=st.integers(0, 400))
def test_the_even_division_is_even(layers: int, quanta: int) -> None:
    held = uniform(layers, quanta)
    assert held.sum() == quanta
    assert held.max() - held.min() <= 1
    assert (np.diff(held) <= 0).all()


def test_layers_that_are_alike_keep_the_even_division() -> None:
    convex = 1.0 / np.arange(1.0, 30.0)
    assert exchange([convex] * 7, 70).tolist() == [10] * 7
    assert exchange([convex] * 4, 10).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_solver_finds_nothing_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, width, quanta = 12, 15, 60
    costs = drawn(rng, layers, width, 0.4)
    # One of the columns of every layer, quanta in total.
    one_each = np.kron(np.eye(layers), np.ones(width + 1))
    weight = np.tile(np.arange(width + 1.0), layers)
    solved = milp(
        np.concatenate(costs),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], 0, quanta)],
        integrality=np.ones(len(weight), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert solved.success
    assert total_cost(costs, exact(costs, quanta)) == pytest.approx(solved.fun, rel=1e-9)


def test_costs_that_only_fall_in_steps_are_exchanged_nearly_as_well() -> None:
    rng = np.random.default_rng(2)
    for bought in (0.05, 0.2, 1.0):
        costs = drawn(rng, 94, 120, bought)
        best = total_cost(costs, exact(costs, 940))
        assert total_cost(costs, exchange(costs, 940)) <= best * 1.001
