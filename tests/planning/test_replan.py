"""Slots divided anew by live routing: never more bytes, and what a search by hand finds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.budget import slots_bytes, stored_bytes
from moepack.layout import Layout
from moepack.layouts import layer_layout
from moepack.model_spec import ModelSpec
from moepack.plan import POLICIES, LayerPlacement, Policy
from moepack.replan import LEAST_TOKENS, Replanned, replan
from moepack.segments import PARTS
from moepack.trace import Ids, LayerShape
from tests.support.caches import cache_of, half_life_of
from tests.support.routed import model_of

TOKENS = 400


def placed(
    spec: ModelSpec, ratios: Sequence[float], slots: Sequence[tuple[int, int]], policy: Policy
) -> tuple[Layout, list[LayerPlacement]]:
    layout = Layout(
        spec.digest,
        tuple(map(layer_layout, itertools.repeat(spec), spec.moe_layers, ratios)),
    )
    layers = []
    for cut, (tops, bottoms) in zip(layout.layers, slots, strict=True):
        hot = tuple(range(spec.moe(cut.layer).num_experts))
        place = LayerPlacement(
            cut.layer, 0, tops, bottoms, policy, hot, half_life_tokens=half_life_of(policy)
        )
        layers.append(replace(place, budget_bytes=slots_bytes(spec, cut, place)))
    return layout, layers


def routed(
    shapes: Sequence[LayerShape], skews: Sequence[float], *, tokens: int = TOKENS, seed: int = 0
) -> Ids:
    """Each layer likes some of its experts, the more the larger its skew."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, len(shapes), max(shape.top_k for shape in shapes)), dtype=np.uint16)
    for row, (shape, skew) in enumerate(zip(shapes, skews, strict=True)):
        liking = skew * rng.gumbel(size=shape.num_experts)
        order = np.argsort(-liking - rng.gumbel(size=(tokens, shape.num_experts)), axis=1)
        ids[:, row, : shape.top_k] = order[:, : shape.top_k]
    return ids


def sizes(spec: ModelSpec, layout: Layout, layers: Sequence[LayerPlacement]) -> Counter[int]:
    """How many slots there are of each size."""
    found: Counter[int] = Counter()
    for cut, place in zip(layout.layers, layers, strict=True):
        found[stored_bytes(spec, cut, "top")] += place.top_slots
        found[stored_bytes(spec, cut, "bottom")] += place.bottom_slots
    return +found


def misses(place: LayerPlacement, ids: Ids, begin: int, stop: int) -> int:
    """Of the tokens from ``begin`` on, in a cache that has seen those before them."""
    cache = cache_of(place, place.top_slots)
    hits = [len(cache.step([token]).resident) for token in ids.tolist()[:stop]]
    return (stop - begin) * int(ids.shape[1]) - sum(hits[begin:])


@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp", "lfu_decay"])
def test_the_division_is_the_best_of_all_on_the_tokens_that_decide(policy: Policy) -> None:
    shapes = [LayerShape(row, 7, 1) for row in range(3)]
    spec = model_of(shapes)
    layout, layers = placed(spec, [1.0] * 3, [(3, 0)] * 3, policy)
    ids = routed(shapes, (0.2, 3.0, 1.0), seed=2)
    quarter = TOKENS // 4

    def missed(slots: Sequence[int], begin: int, stop: int) -> int:
        return sum(
            misses(replace(place, top_slots=count), ids[:, row], begin, stop)
            for row, (place, count) in enumerate(zip(layers, slots, strict=True))
        )

    found = replan(spec, layout, layers, ids, float)
    assert found is not None
    chosen = [place.top_slots for place in found.layers]
    divisions = [each for each in itertools.product(range(8), repeat=3) if sum(each) == 9]
    least = min(missed(each, quarter, 3 * quarter) for each in divisions)
    assert missed(chosen, quarter, 3 * quarter) == least
    before = missed([3, 3, 3], 3 * quarter, TOKENS)
    assert found.saved == pytest.approx(1 - missed(chosen, 3 * quarter, TOKENS) / before)
    assert found.changed == tuple(row for row, count in enumerate(chosen) if count != 3)
    size_bytes = stored_bytes(spec, layout.layers[0], "top")
    assert found.moved_bytes == size_bytes * sum(max(0, count - 3) for count in chosen)
    assert [place.budget_bytes for place in found.layers] == [size_bytes * c for c in chosen]
    # What is best already stays.
    assert replan(spec, layout, found.layers, ids, float) is None


def test_pinned_layers_keep_what_they_have_and_take_what_is_used_most() -> None:
    shapes = [LayerShape(row, 6, 1) for row in range(2)]
    spec = model_of(shapes)
    layout, layers = placed(spec, [1.0] * 2, [(3, 0)] * 2, "pinned")
    ids = np.zeros((TOKENS, 2, 1), dtype=np.uint16)
    ids[:, 0, 0] = np.resize([5, 5, 5, 4, 2, 0], TOKENS)
    ids[:, 1, 0] = np.resize([1, 1, 1, 0], TOKENS)
    found = replan(spec, layout, layers, ids, float)
    assert found is not None
    first, second = found.layers
    assert (first.top_slots, second.top_slots) == (4, 2)
    assert first.hot == (0, 2, 1, 5, 4, 3)
    assert second.hot[:2] == (1, 0)
    assert found.saved == pytest.approx(0.75, abs=0.02)  # of 5, 5, 5, 4 the fives


@given(
    st.lists(st.sampled_from((0.0, 0.5, 1.0)), min_size=1, max_size=4),
    st.sampled_from((*POLICIES, "lfu_decay")),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_no_division_takes_a_slot_more_or_keeps_a_bottom_without_all_tops(
    ratios: list[float], policy: Policy, top_k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [LayerShape(2 * row, 5, top_k) for row in range(len(ratios))]
    spec = model_of(shapes)
    slots = []
    for ratio in ratios:
        count = int(rng.integers(0, 6))
        whole = [(count, 0), (5, count)][int(rng.integers(2))]
        slots.append({0.0: (0, count), 0.5: whole, 1.0: (count, 0)}[ratio])
    layout, layers = placed(spec, ratios, slots, policy)
    ids = routed(shapes, rng.uniform(0, 3, len(ratios)).tolist(), tokens=LEAST_TOKENS, seed=seed)
    found = replan(spec, layout, layers, ids, float)
    if found is None:
        return
    assert 0.01 < found.saved <= 1
    now, before = sizes(spec, layout, found.layers), sizes(spec, layout, layers)
    assert all(now[size] <= before[size] for size in now)
    for cut, old, new in zip(layout.layers, layers, found.layers, strict=True):
        if 0 < cut.split < cut.width:
            assert not new.bottom_slots or new.top_slots == 5
        assert new.budget_bytes == slots_bytes(spec, cut, new)
        assert replace(new, budget_bytes=0, top_slots=0, bottom_slots=0, hot=old.hot) == replace(
            old, budget_bytes=0, top_slots=0, bottom_slots=0
        )
        same = all(getattr(old, f"{part}_slots") == getattr(new, f"{part}_slots") for part in PARTS)
        assert same == (cut.layer not in found.changed)


def wasteful(tokens: int) -> Replanned | None:
    """Of three layers one needs two of its four slots."""
    shapes = [LayerShape(row, 8, 2) for row in range(3)]
    spec = model_of(shapes)
    layout, layers = placed(spec, [1.0] * 3, [(4, 0)] * 3, "lru")
    return replan(spec, layout, layers, routed(shapes, (0.0, 9.0, 0.0), tokens=tokens), float)


def test_few_tokens_move_nothing() -> None:
    assert wasteful(LEAST_TOKENS - 1) is None
    assert wasteful(LEAST_TOKENS) is not None


def test_what_has_room_for_everything_is_left_alone() -> None:
    shapes = [LayerShape(row, 4, 2) for row in range(2)]
    spec = model_of(shapes)
    layout, layers = placed(spec, [1.0, 0.5], [(4, 0), (4, 4)], "lru")
    assert replan(spec, layout, layers, routed(shapes, (1.0, 1.0)), float) is None
