"""One pass over a trace says what caches of every size hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack import expert_order, percolation
from moepack.plan import POLICIES, Policy
from moepack.residency import ExpertCache
from moepack.stack_ranks import NO_RANK, stack_ranks
from moepack.trace import NO_PREDICTION, LayerShape
from tests.support.caches import (
    half_life_of,
    half_lives,
    obvious_cache,
    random_rankings,
    random_trace,
    shapes,
    traces,
)


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@settings(max_examples=60)
def test_ranks_say_what_an_obvious_cache_of_every_size_holds(
    policy: Policy, data: st.DataObject
) -> None:
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    hot = random_rankings(layers, np.random.default_rng(data.draw(st.integers(0, 99))))
    each = [data.draw(half_lives) for _ in layers]
    ranks = stack_ranks(trace, layers, hot, policy, each if policy == "lfu_decay" else ())
    for row, layer in enumerate(layers):
        tokens = trace.ids[:, row, : layer.top_k].tolist()
        guesses = trace.predicted[:, row].tolist()
        assert (ranks.ids[:, row, layer.top_k :] == NO_RANK).all()
        for capacity in range(layer.top_k, layer.num_experts + 1):
            history = obvious_cache(capacity, hot[row], policy, tokens, each[row])
            for now, held in enumerate(history):
                resident = (ranks.ids[now, row, : layer.top_k] < capacity).tolist()
                assert resident == [expert in held for expert in tokens[now]]
                for guess, rank in zip(guesses[now], ranks.predicted[now, row], strict=True):
                    assert (rank < capacity) == (guess in held)
                    assert (rank == NO_RANK) == (guess == NO_PREDICTION)


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@settings(max_examples=60)
def test_ranks_say_what_the_runtimes_cache_hits(policy: Policy, data: st.DataObject) -> None:
    layers = data.draw(shapes(layers=1, experts=12))
    trace = data.draw(traces(layers, tokens=150))
    (layer,), (hot,) = layers, random_rankings(layers, np.random.default_rng(1))
    half_life = half_life_of(policy, data.draw(half_lives))
    ranks = stack_ranks(trace, layers, [hot], policy, [half_life] if half_life else ())
    for capacity in range(layer.top_k, layer.num_experts + 1):
        cache = ExpertCache(capacity, hot, policy, half_life_tokens=half_life)
        for now, token in enumerate(trace.ids[:, 0, : layer.top_k].tolist()):
            held = [guess in cache.resident for guess in trace.predicted[now, 0].tolist()]
            assert (ranks.predicted[now, 0] < capacity).tolist() == held
            hits = cache.step([token]).resident
            resident = ranks.ids[now, 0, : layer.top_k] < capacity
            assert resident.tolist() == [expert in hits for expert in token]


@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp", "lfu_decay"])
def test_chunks_and_the_width_of_codes_leave_no_trace(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    layers = tuple(LayerShape(number, 20, 4) for number in range(3))
    trace, hot = random_trace(layers, 100, rng), random_rankings(layers, rng)
    each = (7.0, 64.0, 7.0) if policy == "lfu_decay" else ()
    whole = stack_ranks(trace, layers, hot, policy, each)
    monkeypatch.setattr(percolation, "_CHUNK_TOKENS", 33)
    monkeypatch.setattr(percolation, "_RANKED_PLACES", 400)
    monkeypatch.setattr(expert_order, "_code_dtype", lambda *_: np.uint32)
    pieces = stack_ranks(trace, layers, hot, policy, each)
    assert np.array_equal(whole.ids, pieces.ids)
    assert np.array_equal(whole.predicted, pieces.predicted)


def test_a_prefix_is_ranked_as_in_the_whole_trace() -> None:
    rng = np.random.default_rng(6)
    layers = (LayerShape(0, 12, 3), LayerShape(1, 12, 3))
    trace, hot = random_trace(layers, 60, rng), random_rankings(layers, rng)
    whole = stack_ranks(trace, layers, hot, "lfu_decay", (30.0, 5.0))
    prefix = stack_ranks(trace.take(slice(25)), layers, hot, "lfu_decay", (30.0, 5.0))
    assert np.array_equal(prefix.ids, whole.ids[:25])
    assert np.array_equal(prefix.predicted, whole.predicted[:25])
