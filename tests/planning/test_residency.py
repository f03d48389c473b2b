"""The cache's rules, against an LRU that is written to be obvious."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.hit_curves import lru_hit_curves
from moepack.residency import ExpertCache
from moepack.trace import Trace


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A number of experts, and some tokens' choices among them."""
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    token = st.permutations(range(experts)).map(lambda order: list(order[:top_k]))
    return experts, draw(st.lists(token, min_size=1, max_size=30))


def obvious_lru(capacity: int, hot: list[int], tokens: list[list[int]]) -> list[int]:
    """Hits of each token: a list from most to least recently used, cut at the capacity."""
    order = list(hot)
    hits = []
    for experts in tokens:
        hits.append(sum(expert in order[:capacity] for expert in experts))
        used = sorted(experts)
        order = used + [expert for expert in order if expert not in used]
    return hits


@given(routings(), st.data())
def test_decoding_hits_what_an_obvious_lru_hits(
    routing: tuple[int, list[list[int]]], data: st.DataObject
) -> None:
    experts, tokens = routing
    top_k = len(tokens[0])
    hot = data.draw(st.permutations(range(experts)))
    capacity = data.draw(st.integers(top_k, experts))
    cache = ExpertCache(capacity, hot)
    hits = [len(cache.step([token]).resident) for token in tokens]
    assert hits == obvious_lru(capacity, list(hot), tokens)


@given(routings(), st.integers(0, 9), st.integers(1, 7))
def test_slots_are_never_shared_and_never_more_than_the_capacity(
    routing: tuple[int, list[list[int]]], capacity: int, batch: int
) -> None:
    experts, tokens = routing
    capacity = min(capacity, experts)
    cache = ExpertCache(capacity, range(experts))
    contents = {slot: expert for expert, slot in cache.resident.items()}
    for start in range(0, len(tokens), batch):
        passed = tokens[start : start + batch]
        before = cache.resident
        access = cache.step(passed)
        needed = {expert for token in passed for expert in token}
        assert access.resident == {e: s for e, s in before.items() if e in needed}
        for expert in sorted(needed):
            # What the runtime does: read from the slot, or copy into it, in ascending order.
            if expert in access.resident:
                assert contents[access.resident[expert]] == expert
            elif expert in access.admitted:
                contents[access.admitted[expert]] = expert
        assert {slot: expert for expert, slot in cache.resident.items()} == contents
        assert len(contents) == capacity


@given(routings(), st.data())
def test_one_pass_gives_the_hit_rate_of_every_cache_size(
    routing: tuple[int, list[list[int]]], data: st.DataObject
) -> None:
    experts, tokens = routing
    top_k = len(tokens[0])
    ids = np.array(tokens, dtype=np.uint16)[:, None, :]
    part = np.array(
        data.draw(st.lists(st.integers(0, 2), min_size=len(tokens), max_size=len(tokens))),
        dtype=np.uint8,
    )
    nothing = np.zeros((len(tokens), 1, 2 * top_k), dtype=np.uint16)
    trace = Trace(ids, ids.astype(np.float16), nothing, part.astype(np.uint32), part)
    curves = lru_hit_curves(trace, ((0, experts, top_k),))
    counts = np.bincount(ids[part == 0].ravel(), minlength=experts)
    hot = sorted(range(experts), key=lambda expert: (-counts[expert], expert))
    assert curves.shape == (3, 1, experts + 1)
    for capacity in range(top_k, experts + 1):
        hits = obvious_lru(capacity, hot, tokens)
        for number in range(3):
            counted = [hit for hit, of in zip(hits, part, strict=True) if of == number]
            if counted:
                expected = sum(counted) / (len(counted) * top_k)
                assert curves[number, 0, capacity] == pytest.approx(expected)
    for capacity in range(1, top_k):
        cache = ExpertCache(capacity, hot)
        chosen = [token for token, of in zip(tokens, part, strict=True) if of == 2]
        found = [len(cache.step([token]).resident) for token in chosen]
        if found:
            assert curves[2, 0, capacity] == pytest.approx(sum(found) / (len(found) * top_k))


def test_a_full_cache_admits_every_expert_of_a_token_it_can_hold() -> None:
    cache = ExpertCache(3, [4, 2, 0, 1, 3])
    assert cache.step([[1, 4]]) == ({4: 0}, {1: 2})  # 0 was the coldest of the three
    assert cache.step([[3]]) == ({}, {3: 1})
    assert cache.resident == {4: 0, 1: 2, 3: 1}


def test_fewer_slots_than_experts_in_use_keep_the_lower_ids() -> None:
    cache = ExpertCache(1, [3, 0, 1, 2])
    access = cache.step([[0, 1, 2]])
    assert access == ({}, {0: 0})


@pytest.mark.parametrize(("capacity", "hot"), [(3, [0, 1]), (-1, [0, 1]), (1, [0, 0]), (1, [1, 2])])
def test_a_ranking_that_is_not_one_is_refused(capacity: int, hot: list[int]) -> None:
    with pytest.raises(ValueError, match="permutation"):
        ExpertCache(capacity, hot)
