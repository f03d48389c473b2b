"""The cache's rules, against caches that are written to be obvious."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.plan import POLICIES, POOL_POLICIES, LayerPlacement, Policy, SharedPool
from moepack.residency import (
    LCP_OMEGA,
    LCP_RHO,
    Access,
    ExpertCache,
    SharedCache,
    access_key,
    decay,
    growth,
)
from tests.support.caches import half_life_of, half_lives

policies = st.sampled_from(POLICIES)


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A number of experts, and some tokens' choices among them."""
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    token = st.permutations(range(experts)).map(lambda order: list(order[:top_k]))
    return experts, draw(st.lists(token, min_size=1, max_size=30))


class ObviousCache:
    """The rules word for word, from everything that ever happened."""

    def __init__(
        self,
        capacity: int,
        hot: Sequence[int],
        policy: Policy,
        *,
        half_life: float = 0.0,
        layers: int = 1,
    ) -> None:
        self.slots = list(hot[:capacity])
        self._half_life = half_life
        self._hot = list(hot)
        self._policy = policy
        self._layers = layers
        self._history: list[list[int]] = []

    def step(self, tokens: Iterable[Sequence[int]], unkept: Collection[int] = ()) -> Access:
        passed = [list(token) for token in tokens]
        self._history += passed
        used = {expert for token in passed for expert in token}
        before = list(self.slots)
        contenders = sorted(
            used.difference(unkept).union(before),
            key=lambda expert: (expert in used, *self._order(expert)),
            reverse=True,
        )
        wanted = contenders[: len(before)] if self._policy != "pinned" else before
        admitted = {}
        for expert in sorted(used):
            if expert in before or expert not in wanted:
                continue
            victims = [
                held
                for held in self.slots
                if held not in wanted and not (held in used and held > expert)
            ]
            if victims:
                admitted[expert] = self.slots.index(min(victims, key=self._order))
                self.slots[admitted[expert]] = expert
        return Access({e: before.index(e) for e in sorted(used) if e in before}, admitted)

    def after_resizing(self, capacity: int, hot: Sequence[int]) -> set[int]:
        """Who is there with another number of slots; ``hot`` is the ranking from now on."""
        self._hot = list(hot)
        ranking = sorted(hot, key=self._order, reverse=True) if self._policy != "pinned" else hot
        first = [expert for expert in ranking if expert in self.slots]
        others = [expert for expert in ranking if expert not in self.slots]
        return set([*first, *others][:capacity])

    def _order(self, expert: int) -> tuple[bool, float, int]:
        """Used at all; then the policy's own measure; then the lower id."""
        uses = [when for when, token in enumerate(self._history) if expert in token]
        if not uses or self._policy == "pinned":
            return bool(uses), -self._hot.index(expert), -expert
        ages = [(len(self._history) - when) / self._layers for when in uses]
        if self._policy == "lfu_decay":
            return True, sum(0.5 ** (age / self._half_life) for age in ages), -expert
        priority = {
            "lru": -ages[-1],
            "lfu": len(uses),
            "lcp": len(uses) * 0.25 ** (ages[-1] / 128),  # as the paper prints it
        }[self._policy]
        return True, priority, -expert


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


@given(routings(), policies, half_lives, st.integers(0, 9), st.integers(1, 7), st.data())
def test_every_policy_does_what_its_rules_say(
    routing: tuple[int, list[list[int]]],
    policy: Policy,
    half_life: float,
    capacity: int,
    batch: int,
    data: st.DataObject,
) -> None:
    experts, tokens = routing
    hot = data.draw(st.permutations(range(experts)))
    capacity = min(capacity, experts)
    cache = ExpertCache(capacity, hot, policy, half_life_tokens=half_life_of(policy, half_life))
    obvious = ObviousCache(capacity, hot, policy, half_life=half_life)
    for start in range(0, len(tokens), batch):
        passed = tokens[start : start + batch]
        assert cache.step(passed) == obvious.step(passed)
        assert cache.resident == {expert: slot for slot, expert in enumerate(obvious.slots)}


@given(routings(), policies, st.integers(0, 9), st.integers(1, 3), st.data())
def test_what_is_not_kept_counts_as_used_and_stays_outside(
    routing: tuple[int, list[list[int]]],
    policy: Policy,
    capacity: int,
    batch: int,
    data: st.DataObject,
) -> None:
    experts, tokens = routing
    capacity = min(capacity, experts)
    cache = ExpertCache(
        capacity, range(experts), policy, half_life_tokens=half_life_of(policy, 3.0)
    )
    pool = SharedCache(capacity, [range(experts)], policy if policy in POOL_POLICIES else "lru")
    plain = ObviousCache(capacity, range(experts), policy, half_life=3.0)
    pooled = ObviousCache(capacity, range(experts), policy if policy in POOL_POLICIES else "lru")
    for start in range(0, len(tokens), batch):
        passed = tokens[start : start + batch]
        unkept = data.draw(st.sets(st.integers(0, experts - 1)))
        found = cache.step(passed, unkept)
        assert found == plain.step(passed, unkept)
        assert not unkept.intersection(found.admitted)
        assert pool.layer(0).step(passed, unkept) == pooled.step(passed, unkept)


@given(
    routings(),
    st.sampled_from(POOL_POLICIES),
    st.integers(1, 4),
    st.integers(1, 36),
    st.integers(1, 5),
    st.data(),
)
def test_a_pool_is_one_cache_over_the_experts_of_all_layers(
    routing: tuple[int, list[list[int]]],
    policy: Policy,
    layers: int,
    slots: int,
    batch: int,
    data: st.DataObject,
) -> None:
    experts, tokens = routing
    rankings = [data.draw(st.permutations(range(experts))) for _ in range(layers)]
    slots = min(slots, layers * experts)
    pool = SharedCache(slots, rankings, policy)
    start = [
        layer * experts + rankings[layer][n] for n in range(experts) for layer in range(layers)
    ]
    obvious = ObviousCache(slots, start, policy, layers=layers)
    for begin in range(0, len(tokens), batch):
        for layer in range(layers):
            # Another routing in each layer.
            passed = [
                [(expert + layer) % experts for expert in token]
                for token in tokens[begin : begin + batch]
            ]
            first = layer * experts
            expected = obvious.step([[first + expert for expert in token] for token in passed])
            found = pool.layer(layer).step(passed)
            for mine, others in zip(found, expected, strict=True):
                assert {first + expert: slot for expert, slot in mine.items()} == others
        held = {
            slot: layer * experts + expert
            for layer in range(layers)
            for expert, slot in pool.layer(layer).resident.items()
        }
        assert [held[slot] for slot in range(slots)] == obvious.slots


def test_layers_of_a_pool_may_have_different_numbers_of_experts() -> None:
    pool = SharedCache(4, [[1, 0], [2, 0, 1]], "lru")
    assert pool.layer(0).resident == {1: 0, 0: 2}
    assert pool.layer(1).resident == {2: 1, 0: 3}
    assert pool.layer(1).step([[1]]) == ({}, {1: 3})  # of the second hottest, the higher number
    assert pool.layer(0).step([[0]]) == ({0: 2}, {})


@given(routings(), policies, half_lives, st.data())
def test_from_top_k_slots_on_a_larger_cache_holds_what_a_smaller_one_does(
    routing: tuple[int, list[list[int]]], policy: Policy, half_life: float, data: st.DataObject
) -> None:
    experts, tokens = routing
    hot = data.draw(st.permutations(range(experts)))
    caches = [
        ExpertCache(n, hot, policy, half_life_tokens=half_life_of(policy, half_life))
        for n in range(len(tokens[0]), experts + 1)
    ]
    for token in tokens:
        for cache in caches:
            cache.step([token])
        for smaller, larger in itertools.pairwise(caches):
            assert smaller.resident.keys() < larger.resident.keys()


@given(routings(), policies, st.integers(0, 9), st.integers(1, 7))
def test_slots_are_never_shared_and_never_more_than_the_capacity(
    routing: tuple[int, list[list[int]]], policy: Policy, capacity: int, batch: int
) -> None:
    experts, tokens = routing
    capacity = min(capacity, experts)
    cache = ExpertCache(capacity, range(experts), policy, half_life_tokens=half_life_of(policy))
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


sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=5)


@given(routings(), policies, half_lives, st.integers(0, 9), st.integers(1, 4), sizes, st.data())
def test_a_cache_of_another_size_keeps_its_first_and_goes_on_by_the_rules(
    routing: tuple[int, list[list[int]]],
    policy: Policy,
    half_life: float,
    capacity: int,
    batch: int,
    sizes: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    experts, tokens = routing
    hot = data.draw(st.permutations(range(experts)))
    capacity = min(capacity, experts)
    cache = ExpertCache(capacity, hot, policy, half_life_tokens=half_life_of(policy, half_life))
    obvious = ObviousCache(capacity, hot, policy, half_life=half_life)
    passes = iter([tokens[start : start + batch] for start in range(0, len(tokens), batch)])
    for size, steps in sizes:
        for passed in itertools.islice(passes, steps):
            assert cache.step(passed) == obvious.step(passed)
        hot = data.draw(st.permutations(range(experts)))
        wanted = min(size, experts)
        contents = {slot: expert for expert, slot in cache.resident.items()}
        resized = cache.resize(wanted, hot)
        # What the runtime does: slots go and come at the end.
        for slot, source in resized.moved.items():
            assert slot < wanted <= source
            contents[slot] = contents[source]
        contents = {slot: contents[slot] for slot in contents if slot < wanted}
        for expert, slot in resized.admitted.items():
            assert slot not in contents
            contents[slot] = expert
        assert {slot: expert for expert, slot in cache.resident.items()} == contents
        assert sorted(contents) == list(range(wanted))
        assert set(contents.values()) == obvious.after_resizing(wanted, hot)
        obvious.slots = [contents[slot] for slot in range(wanted)]


@given(routings(), st.sampled_from(("lru", "pinned")), st.data())
def test_a_cache_of_another_size_holds_what_one_of_that_size_always_held(
    routing: tuple[int, list[list[int]]], policy: Policy, data: st.DataObject
) -> None:
    experts, tokens = routing
    hot = data.draw(st.permutations(range(experts)))
    before, after = (data.draw(st.integers(len(tokens[0]), experts)) for _ in range(2))
    cache, always = ExpertCache(before, hot, policy), ExpertCache(after, hot, policy)
    for token in tokens:
        cache.step([token])
        always.step([token])
    cache.resize(after, hot)
    assert cache.resident.keys() == always.resident.keys()


def test_a_cache_refuses_a_size_that_it_cannot_have() -> None:
    cache = ExpertCache(1, [1, 0])
    with pytest.raises(ValueError, match="no more slots than experts"):
        cache.resize(3, [1, 0])
    with pytest.raises(ValueError, match="permutation of all experts"):
        cache.resize(1, [1, 0, 2])
    assert cache.resident == {1: 0}


def test_a_full_cache_admits_every_expert_of_a_token_it_can_hold() -> None:
    cache = ExpertCache(3, [4, 2, 0, 1, 3])
    assert cache.step([[1, 4]]) == ({4: 0}, {1: 2})  # 0 was the coldest of the three
    assert cache.step([[3]]) == ({}, {3: 1})
    assert cache.resident == {4: 0, 1: 2, 3: 1}


def test_fewer_slots_than_experts_in_use_keep_the_lower_ids() -> None:
    cache = ExpertCache(1, [3, 0, 1, 2])
    access = cache.step([[0, 1, 2]])
    assert access == ({}, {0: 0})


def test_what_is_used_now_is_admitted_however_seldom_it_was_before() -> None:
    cache = ExpertCache(2, [0, 1, 2], "lfu")
    for _ in range(5):
        cache.step([[0, 1]])
    assert cache.step([[2]]) == ({}, {2: 1})  # 0 and 1 tie: the higher number goes
    assert cache.step([[1]]) == ({}, {1: 1})


def test_a_pinned_cache_keeps_what_it_began_with() -> None:
    cache = ExpertCache(2, [3, 1, 0, 2], "pinned")
    for _ in range(3):
        assert cache.step([[0, 1, 2]]) == ({1: 1}, {})
    assert cache.resident == {3: 0, 1: 1}


def test_the_key_of_lcp_orders_as_the_priority_of_the_paper_does() -> None:
    now = 500
    used = [(count, last) for count in range(1, 40) for last in range(0, now, 7)]
    by_key = sorted(used, key=lambda use: access_key("lcp", *use))
    priorities = [count * LCP_RHO ** ((now - last) / LCP_OMEGA) for count, last in by_key]
    assert all(np.diff(priorities) >= -1e-12)
    # 128 tokens of age cost three quarters of the activations.
    assert access_key("lcp", 4, 0) == pytest.approx(access_key("lcp", 1, 128))


def test_a_decaying_count_is_what_is_left_of_each_activation() -> None:
    """By hand: with a half-life of two tokens the older of two uses counts .71 of the later."""
    cache = ExpertCache(2, [0, 1, 2, 3], "lfu_decay", half_life_tokens=2)
    for expert in (0, 0, 1):
        cache.step([[expert]])
    assert cache.step([[2]]) == ({}, {2: 1})  # 0 counts .50 + .35, 1 counts .71
    assert cache.step([[3]]) == ({}, {3: 0})  # 0 counts .35 + .25, 2 counts .71


def test_the_key_of_a_decaying_count_orders_as_the_count_does() -> None:
    now, half_life = 500, 17.0
    rng = np.random.default_rng(0)
    used = [np.sort(rng.choice(now, rng.integers(1, 30), replace=False)) for _ in range(300)]

    def key(uses: np.ndarray) -> float:
        counted = sum(decay(uses[-1] - use, half_life) for use in uses.tolist())
        return access_key("lfu_decay", counted, int(uses[-1]), half_life)

    left = [sum(0.5 ** ((now - uses) / half_life)) for uses in sorted(used, key=key)]
    assert all(np.diff(left) > 0)


@given(st.integers(0, 10**9), st.floats(1, 1e6))
def test_growth_is_decay_backwards(tokens: int, half_life: float) -> None:
    doubled, rest = growth(tokens, half_life)
    assert 1 <= rest < 2
    assert doubled + np.log2(rest) == pytest.approx(tokens / half_life)
    if tokens < 500 * half_life:
        assert decay(tokens, half_life) * 2.0**doubled * rest == pytest.approx(1)


@given(st.integers(1, 10**6), st.lists(st.integers(1, 5000), max_size=30), st.floats(1, 1e5))
def test_keys_of_decaying_counts_never_fall(begin: int, gaps: list[int], half_life: float) -> None:
    uses, last = 1.0, begin
    for gap in gaps:
        before = access_key("lfu_decay", uses, last, half_life)
        uses, last = 1.0 + uses * decay(gap, half_life), last + gap
        assert access_key("lfu_decay", uses, last, half_life) > before


@pytest.mark.parametrize(
    ("policy", "half_life", "expected"),
    [
        ("lfu_decay", None, "half-life of None tokens, expected 1 or more"),
        ("lfu_decay", 0.5, "half-life of 0.5 tokens, expected 1 or more"),
        ("lfu_decay", float("inf"), "half-life of inf tokens, expected 1 or more"),
        ("lfu_decay", float("nan"), "half-life of nan tokens, expected 1 or more"),
        ("lfu", 64.0, "half-life of 64.0 tokens, expected none for lfu"),
    ],
)
def test_a_half_life_belongs_to_the_policy_that_decays(
    policy: Policy, half_life: float | None, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        ExpertCache(1, [0, 1], policy, half_life_tokens=half_life)
    with pytest.raises(ValueError, match=f"layer 3 has a {expected}"):
        LayerPlacement(3, 0, 1, 0, policy, (0, 1), half_life_tokens=half_life)


def test_a_shared_pool_has_no_half_life() -> None:
    with pytest.raises(ValueError, match="a shared pool is lfu_decay, expected one of lru, lfu"):
        SharedPool(2, "lfu_decay")


def test_a_pinned_cache_has_no_keys() -> None:
    with pytest.raises(ValueError, match="pinned keeps nothing by its use"):
        access_key("pinned", 1, 0)


@pytest.mark.parametrize(("capacity", "hot"), [(3, [0, 1]), (-1, [0, 1]), (1, [0, 0]), (1, [1, 2])])
def test_a_ranking_that_is_not_one_is_refused(capacity: int, hot: list[int]) -> None:
    with pytest.raises(ValueError, match="permutation"):
        ExpertCache(capacity, hot)
