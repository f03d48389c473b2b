"""Nothing that fetches on demand hits more than the clairvoyant cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack import percolation
from moepack.belady import belady_hits, belady_ranks
from moepack.plan import POLICIES
from moepack.stack_ranks import NO_RANK, stack_ranks
from moepack.trace import LayerShape
from tests.support.caches import random_rankings, random_trace, shapes, traces


def most_hits(capacity: int, hot: Sequence[int], tokens: Sequence[Sequence[int]]) -> int:
    """By trying everything: the best hits of any choice of what to keep after each token."""
    reached = {frozenset(hot[:capacity]): 0}
    for experts in tokens:
        following: dict[frozenset[int], int] = {}
        for held, hits in reached.items():
            total = hits + len(held & set(experts))
            for kept in combinations(sorted(held | set(experts)), capacity):
                following[frozenset(kept)] = max(total, following.get(frozenset(kept), 0))
        reached = following
    return max(reached.values())


@given(data=st.data())
@settings(max_examples=60)
def test_no_choice_of_what_to_keep_hits_more(data: st.DataObject) -> None:
    layers = data.draw(shapes(layers=2, experts=5))
    trace = data.draw(traces(layers, tokens=12))
    hot = random_rankings(layers, np.random.default_rng(data.draw(st.integers(0, 99))))
    for slots in range(6):
        capacities = [min(slots, layer.num_experts) for layer in layers]
        hits = belady_hits(trace, layers, hot, capacities)
        for row, layer in enumerate(layers):
            tokens = trace.ids[:, row, : layer.top_k].tolist()
            assert hits[:, row].sum() == most_hits(capacities[row], hot[row], tokens)


@given(data=st.data())
@settings(max_examples=30)
def test_no_policy_hits_more(data: st.DataObject) -> None:
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    hot = random_rankings(layers, np.random.default_rng(data.draw(st.integers(0, 99))))
    bound = belady_ranks(trace, layers, hot)
    for policy in POLICIES:
        each = [9.0] * len(layers) if policy == "lfu_decay" else []
        ranks = stack_ranks(trace, layers, hot, policy, each).ids
        for row, layer in enumerate(layers):
            assert (bound[:, row, layer.top_k :] == NO_RANK).all()
            for capacity in range(layer.top_k, layer.num_experts + 1):
                assert (bound[:, row] < capacity).sum() >= (ranks[:, row] < capacity).sum()


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    layers = tuple(LayerShape(number, 20, 4) for number in range(3))
    trace, hot = random_trace(layers, 100, rng), random_rankings(layers, rng)
    whole = belady_ranks(trace, layers, hot)
    monkeypatch.setattr(percolation, "_CHUNK_TOKENS", 33)
    assert np.array_equal(belady_ranks(trace, layers, hot), whole)
