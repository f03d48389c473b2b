"""Dividing the slots of a mixed layer: against every division that there is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.class_division import UNSEEN, divisions
from moepack.class_tables import ClassCurves
from moepack.cost import Array
from moepack.layer_problem import Cuts, LayerProblem
from moepack.layer_tables import tabulate
from moepack.mixed_tables import MixedProblem, tabulate_mixed
from moepack.optimiser import optimise
from tests.support.layer_problems import STREAMING, layer_problem


def curve(hits: list[float], predicted: Array | None = None) -> ClassCurves:
    """A class of whose activations so many are held by 0, 1 ... slots."""
    ahead = np.zeros((0, len(hits))) if predicted is None else predicted
    return ClassCurves(len(hits) - 1, hits[-1], np.array(hits), ahead)


@st.composite
def curves(draw: st.DrawFn) -> ClassCurves:
    gains = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25]) | st.floats(0, 1), max_size=4))
    return curve([0.0, *np.cumsum(gains).tolist()])


class_of = st.tuples(curves(), st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]))


@given(classes=st.lists(class_of, min_size=1, max_size=3), budget_bytes=st.integers(0, 60))
def test_no_division_misses_less_within_as_many_bytes(
    classes: list[tuple[ClassCurves, int, float]], budget_bytes: int
) -> None:
    known, sizes, weights = (list(each) for each in zip(*classes, strict=True))
    found = divisions(known, sizes, weights)

    def taken(slots: tuple[int, ...]) -> int:
        return sum(count * size for count, size in zip(slots, sizes, strict=True))

    def missed(slots: tuple[int, ...]) -> float:
        lost = (
            weight * float(each.activations - each.hits[count] + UNSEEN * (each.members - count))
            for count, each, weight in zip(slots, known, weights, strict=True)
        )
        return sum(lost, 0.0)

    every = itertools.product(*(range(each.members + 1) for each in known))
    best = min(missed(slots) for slots in every if taken(slots) <= budget_bytes)
    chosen = found.within(budget_bytes)
    assert taken(chosen) <= budget_bytes
    assert missed(chosen) == pytest.approx(best, abs=1e-12)
    assert found.within(10**6) == tuple(each.members for each in known), "all that there is"
    for slots, size, cost in zip(found.slots.tolist(), found.bytes, found.missed, strict=True):
        assert taken(slots) == size
        assert missed(slots) == pytest.approx(float(cost))


def uncut(**changes: object) -> LayerProblem:
    """Whole experts of 1 MiB under one policy."""
    whole = Cuts(np.array([256]), 256, np.array([2**20]), np.array([0]))
    problem = layer_problem(cuts=whole, engine=STREAMING, **changes)  # type: ignore[arg-type]
    lru = dataclasses.replace(STREAMING, policies=("lru",))
    return dataclasses.replace(problem, engine=lru)


def as_one_class(problem: LayerProblem, *, in_top: bool = True) -> MixedProblem:
    ahead = problem.accuracy[:, None] * 0 + problem.predicted_held["lru"]
    hits = problem.top_k * problem.hits["lru"]
    one = ClassCurves(problem.num_experts, float(problem.top_k), hits, ahead)
    return MixedProblem(problem, in_top, (2**20,), {"lru": (one,)}, (problem.used,))


@pytest.mark.parametrize("new_tokens", [1, 64])
def test_a_layer_of_one_class_is_priced_as_one_that_is_stored_alike(new_tokens: int) -> None:
    problem = uncut(new_tokens=new_tokens)
    alike, (mixed,) = tabulate(problem), tabulate_mixed([as_one_class(problem)])
    whole = alike.seconds[problem.num_experts :, 0]  # 0, 1 ... slots of whole experts
    assert mixed.seconds == pytest.approx(whole)
    assert mixed.frame_bytes == alike.frame_bytes
    for slots in range(problem.num_experts + 1):
        one = alike.choice(problem.num_experts + slots, 0)
        other = mixed.choice(slots, 0)
        assert other == one._replace(classes=(slots,), seconds=other.seconds)


def two_classes(problem: LayerProblem, *, small: bool) -> MixedProblem:
    """Half of the experts each, used alike; the second class is smaller where asked for."""
    half = problem.num_experts // 2
    hits = problem.top_k / 2 * np.linspace(0.0, 1.0, half + 1) ** 0.8
    ahead = np.tile(np.linspace(0.0, 0.5, half + 1), (len(problem.accuracy), 1))
    each = ClassCurves(half, problem.top_k / 2, hits, ahead)
    sizes = (2**20, 2**18 if small else 2**20)
    return MixedProblem(problem, True, sizes, {"lru": (each, each)}, (problem.used[::2],) * 2)


def test_smaller_experts_make_a_layer_cheaper_at_every_budget() -> None:
    problem = uncut()
    (large,), (small,) = (
        tabulate_mixed([two_classes(problem, small=small)]) for small in (False, True)
    )
    for budget_bytes in range(0, 9 * 2**20, 2**18):
        before, after = (optimise([each], budget_bytes) for each in (large, small))
        (choice,) = after.choices
        used = choice.classes[0] * 2**20 + choice.classes[1] * 2**18
        assert used == choice.budget_bytes <= budget_bytes
        assert choice.tops == sum(choice.classes)
        assert after.seconds <= before.seconds * (1 + 1e-9)
    assert optimise([small], 5 * 2**20).choices[0].classes == (4, 4), "everything fits"


def test_amounts_of_staging_are_priced_as_each_alone() -> None:
    deep = uncut()
    engine = dataclasses.replace(deep.engine, max_prefetch_depth=1)
    shallow = dataclasses.replace(deep, staging_experts=3, engine=engine)
    problems = [two_classes(each, small=True) for each in (shallow, deep)]
    together = tabulate_mixed(problems)
    for table, problem in zip(together, problems, strict=True):
        (alone,) = tabulate_mixed([problem])
        assert table.seconds == pytest.approx(alone.seconds)
        assert [table.choice(state, 0).depth for state in range(len(table.seconds))] == [
            alone.choice(state, 0).depth for state in range(len(alone.seconds))
        ]
