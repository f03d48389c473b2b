"""Caches too small for a token do what the runtime's cache does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.plan import POLICIES
from moepack.residency import ExpertCache
from moepack.small_caches import stepped_hits
from moepack.trace import LayerShape
from tests.support.caches import (
    half_life_of,
    half_lives,
    random_rankings,
    random_trace,
    shapes,
    traces,
)


@given(data=st.data())
@settings(max_examples=150)
def test_what_is_stepped_at_once_is_what_each_cache_does(data: st.DataObject) -> None:
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    hot = random_rankings(layers, np.random.default_rng(data.draw(st.integers(0, 99))))
    capacities = [data.draw(st.integers(0, layer.top_k - 1)) for layer in layers]
    policies = [data.draw(st.sampled_from(POLICIES)) for _ in layers]
    each = [half_life_of(policy, data.draw(half_lives)) for policy in policies]
    activated, predicted = stepped_hits(trace, layers, hot, policies, capacities, each)
    for row, layer in enumerate(layers):
        cache = ExpertCache(capacities[row], hot[row], policies[row], half_life_tokens=each[row])
        assert not activated[:, row, layer.top_k :].any()
        for now, token in enumerate(trace.ids[:, row, : layer.top_k].tolist()):
            held = cache.resident
            guesses = trace.predicted[now, row].tolist()
            assert predicted[now, row].tolist() == [guess in held for guess in guesses]
            hits = cache.step([token]).resident
            assert activated[now, row, : layer.top_k].tolist() == [e in hits for e in token]


def test_a_cache_that_holds_a_whole_token_is_not_stepped() -> None:
    layers = (LayerShape(3, 8, 2),)
    trace = random_trace(layers, 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="layer 3 has 2 slots, expected 0 to 1"):
        stepped_hits(trace, layers, [range(8)], ["lru"], [2])
