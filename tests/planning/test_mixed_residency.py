"""Caches of mixed layers: each encoding's experts as if they were a layer of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.budget import class_slots
from moepack.errors import PlanMismatchError
from moepack.layout import LayerLayout
from moepack.mixed_residency import MixedCache, layer_cache, starting
from moepack.plan import LayerPlacement, Policy
from moepack.residency import Access
from tests.planning.test_residency import ObviousCache, policies, routings
from tests.support.caches import half_life_of, half_lives


def obvious_start(hot: list[int], members: set[int]) -> list[int]:
    return [expert for expert in hot if expert in members]


@given(routings(), policies, half_lives, st.integers(1, 7), st.data())
def test_every_class_does_what_a_cache_of_its_experts_alone_does(
    routing: tuple[int, list[list[int]]],
    policy: Policy,
    half_life: float,
    batch: int,
    data: st.DataObject,
) -> None:
    """Word for word, whatever each holds; time passes in all of them with every token."""
    experts, tokens = routing
    hot = data.draw(st.permutations(range(experts)))
    class_of = data.draw(st.lists(st.integers(0, 2), min_size=experts, max_size=experts))
    members = [{e for e in range(experts) if class_of[e] == its} for its in range(3)]
    slots = [data.draw(st.integers(0, len(mine))) for mine in members]
    cache = MixedCache(
        class_of, slots, hot, policy, half_life_tokens=half_life_of(policy, half_life)
    )
    alone = [
        ObviousCache(count, obvious_start(hot, mine), policy, half_life=half_life)
        for count, mine in zip(slots, members, strict=True)
    ]
    first_slot = [0, slots[0], slots[0] + slots[1]]
    for start in range(0, len(tokens), batch):
        passed = tokens[start : start + batch]
        unkept = data.draw(st.sets(st.integers(0, experts - 1)))
        found = cache.step(passed, unkept)
        expected = Access({}, {})
        for its, (one, mine) in enumerate(zip(alone, members, strict=True)):
            its_tokens = [[expert for expert in token if expert in mine] for token in passed]
            for whole, part in zip(expected, one.step(its_tokens, unkept & mine), strict=True):
                whole.update({expert: first_slot[its] + slot for expert, slot in part.items()})
        assert found == expected
        held = {
            expert: first_slot[its] + slot
            for its, one in enumerate(alone)
            for slot, expert in enumerate(one.slots)
        }
        assert cache.resident == held
        assert [cache.holds(expert) for expert in range(experts)] == [
            expert in held for expert in range(experts)
        ]


MIXED = LayerLayout(3, 64, 64, 64, "BF16", ("INT8", "BF16", "INT8", "INT4_G32", "INT8"))


def placed(slots: int, classes: tuple[int, ...] = (), policy: Policy = "lru") -> LayerPlacement:
    return LayerPlacement(3, 0, slots, 0, policy, (4, 3, 2, 1, 0), class_slots=classes)


def test_a_layer_starts_with_the_hottest_of_each_encoding() -> None:
    place = placed(3, (1, 2, 0))
    cache = layer_cache(MIXED, place, "top")
    assert cache.resident == {1: 0, 4: 1, 2: 2}
    assert starting(MIXED, place, "top") == (4, 2, 1)
    assert cache.step([[0, 3]]) == ({}, {0: 2})  # for a slot of INT8; there is none of INT4


def test_slots_need_not_be_told_apart_where_there_are_none_or_all() -> None:
    assert class_slots(MIXED, placed(0)) == (0, 0, 0)
    assert class_slots(MIXED, placed(5)) == (1, 3, 1)
    assert starting(MIXED, placed(5), "top") == (4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("slots", "classes"), [(2, ()), (2, (1, 1)), (3, (2, 1, 0)), (4, (0, 4, 0))]
)
def test_slots_that_do_not_fit_the_encodings_are_refused(
    slots: int, classes: tuple[int, ...]
) -> None:
    with pytest.raises(PlanMismatchError, match="1 in BF16, 3 in INT8, 1 in INT4_G32"):
        layer_cache(MIXED, placed(slots, classes), "top")


def test_slots_by_encoding_add_up() -> None:
    with pytest.raises(ValueError, match="expected 3 of them in all"):
        placed(3, (1, 1, 0))
    alike = LayerLayout(3, 64, 64, 64, "BF16")
    with pytest.raises(PlanMismatchError, match="its experts are stored alike"):
        class_slots(alike, placed(3, (1, 2)))
