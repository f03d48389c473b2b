"""The fast replay of a shared pool is the runtime's pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack import pool_hits
from moepack.plan import POOL_POLICIES, Policy
from moepack.pool_hits import pool_masks
from moepack.residency import SharedCache
from moepack.trace import NO_PREDICTION, LayerShape, Trace
from tests.support.caches import random_rankings, random_trace, shapes, traces


def check(
    trace: Trace,
    layers: Sequence[LayerShape],
    hot: Sequence[Sequence[int]],
    slots: int,
    policy: Policy,
) -> None:
    activated, predicted = pool_masks(trace, layers, hot, slots, policy)
    pool = SharedCache(slots, hot, policy)
    for now in range(len(trace.ids)):
        for row, layer in enumerate(layers):
            held = pool.layer(row).resident
            guesses = trace.predicted[now, row].tolist()
            assert predicted[now, row].tolist() == [guess in held for guess in guesses]
            token = trace.ids[now, row, : layer.top_k].tolist()
            assert activated[now, row, : layer.top_k].tolist() == [e in held for e in token]
            assert not activated[now, row, layer.top_k :].any()
            pool.layer(row).step([token])


@pytest.mark.parametrize("policy", POOL_POLICIES)
@given(data=st.data())
@settings(max_examples=80)
def test_a_pool_of_any_size_over_any_layers(policy: Policy, data: st.DataObject) -> None:
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    hot = random_rankings(layers, np.random.default_rng(data.draw(st.integers(0, 99))))
    slots = data.draw(st.integers(1, sum(layer.num_experts for layer in layers)))
    check(trace, layers, hot, slots, policy)


@pytest.mark.parametrize("policy", POOL_POLICIES)
def test_chunks_leave_no_trace(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_hits, "_CHUNK_TOKENS", 7)
    rng = np.random.default_rng(2)
    layers = tuple(LayerShape(row, 16, 4) for row in range(5))
    trace = random_trace(layers, 90, rng)
    assert (trace.predicted == NO_PREDICTION).any()
    check(trace, layers, random_rankings(layers, rng), 30, policy)
