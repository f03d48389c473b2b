"""Curves are counts over the tokens of a part, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.belady import belady_ranks
from moepack.cache_curves import (
    cross_fitted_hit_curves,
    hit_curves,
    predicted_cached,
    prediction_accuracy,
    rank_curves,
)
from moepack.hit_rates import layer_curves, layer_hit_rates
from moepack.plan import POLICIES, Policy
from moepack.residency import ExpertCache
from moepack.stack_ranks import stack_ranks
from moepack.trace import (
    NO_PREDICTION,
    ROUTING_PARTS,
    LayerShape,
    RoutingPart,
    Trace,
    hot_rankings,
    part_of_tokens,
)
from tests.support.caches import half_life_of, random_rankings, random_trace, shapes, traces

parts = st.sampled_from(ROUTING_PARTS)


def cache_history(
    trace: Trace, row: int, layer: LayerShape, slots: int, hot: list[int], policy: Policy
) -> list[set[int]]:
    """What the runtime's cache of a layer holds when each token arrives."""
    cache = ExpertCache(slots, hot, policy, half_life_tokens=half_life_of(policy))
    history = []
    for token in trace.ids[:, row, : layer.top_k].tolist():
        history.append(set(cache.resident))
        cache.step([token])
    return history


@pytest.mark.parametrize("policy", POLICIES)
@given(part=parts, data=st.data())
@settings(max_examples=30)
def test_a_curve_is_what_caches_of_every_size_hit(
    policy: Policy, part: RoutingPart, data: st.DataObject
) -> None:
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    hot = random_rankings(layers, np.random.default_rng(data.draw(st.integers(0, 99))))
    half_life = half_life_of(policy)
    ranks = stack_ranks(trace, layers, hot, policy, [half_life] * len(layers) if half_life else ())
    hits = hit_curves(ranks, trace, layers, part)
    held = predicted_cached(ranks, trace, layers, part)
    scored = np.flatnonzero(trace.part == ROUTING_PARTS.index(part))
    small = trace.take(scored)  # caches below top-k see the part alone
    for row, layer in enumerate(layers):
        assert (hits[row, layer.num_experts :] == 1).all()
        for slots in range(layer.num_experts + 1):
            stepped = slots < layer.top_k and policy != "pinned"
            seen, moments = (small, range(len(scored))) if stepped else (trace, scored)
            history = cache_history(seen, row, layer, slots, hot[row], policy)
            found = [
                expert in history[now]
                for now in moments
                for expert in seen.ids[now, row, : layer.top_k].tolist()
            ]
            assert hits[row, slots] == pytest.approx(
                np.mean(found) if found else float(slots == layer.num_experts)
            )
            for place in range(trace.predicted.shape[2]):
                guesses = [
                    (now, guess)
                    for now in moments
                    if (guess := int(seen.predicted[now, row, place])) != NO_PREDICTION
                ]
                resident = [guess in history[now] for now, guess in guesses]
                assert held[row, place, slots] == pytest.approx(
                    np.mean(resident) if resident else 0
                )


@given(part=parts, data=st.data())
@settings(max_examples=30)
def test_accuracy_counts_the_predictions_that_exist(part: RoutingPart, data: st.DataObject) -> None:
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    accuracy = prediction_accuracy(trace, layers, part)
    for row, layer in enumerate(layers):
        for place in range(trace.predicted.shape[2]):
            right = [
                guess in trace.ids[now, row, : layer.top_k].tolist()
                for now in np.flatnonzero(trace.part == ROUTING_PARTS.index(part))
                if (guess := int(trace.predicted[now, row, place])) != NO_PREDICTION
            ]
            assert accuracy[row, place] == pytest.approx(np.mean(right) if right else 0)


def test_a_long_part_is_sampled_below_top_k_only() -> None:
    rng = np.random.default_rng(4)
    layers = (LayerShape(0, 24, 6),)
    trace = random_trace(layers, 3000, rng)
    hot = random_rankings(layers, rng)
    curve = hit_curves(stack_ranks(trace, layers, hot, "lfu"), trace, layers, "fit")[0]
    scored = np.flatnonzero(trace.part == 0)
    for slots in (2, 5, 6, 12):
        history = cache_history(trace, 0, layers[0], slots, hot[0], "lfu")
        found = np.mean([e in history[now] for now in scored for e in trace.ids[now, 0].tolist()])
        assert curve[slots] == pytest.approx(found, abs=1e-12 if slots >= 6 else 0.05)


def two_texts(lengths: tuple[int, int]) -> Trace:
    trace = random_trace((LayerShape(0, 20, 2),), sum(lengths), np.random.default_rng(8))
    part = np.concatenate([part_of_tokens(length) for length in lengths])
    return Trace(trace.ids, trace.weights, trace.predicted, trace.sequence, part)


def test_fit_is_halved_text_by_text() -> None:
    trace = two_texts((50, 25))
    halves = trace.halved_fit()
    assert halves.part.tolist() == [0] * 15 + [1] * 15 + [0] * 8 + [1] * 7
    assert np.array_equal(halves.ids, np.concatenate([trace.ids[:30], trace.ids[50:65]]))


def test_a_ranking_is_not_scored_on_the_tokens_it_was_learnt_from() -> None:
    """Routing at random has nothing to learn: any cache of half the experts hits a half."""
    layers = (LayerShape(0, 20, 2),)
    rng = np.random.default_rng(9)
    tokens = 160
    ids = np.argsort(rng.random((tokens, 1, 20)), axis=2)[:, :, :2].astype(np.uint16)
    blind = random_trace(layers, tokens, rng)
    trace = Trace(ids, blind.weights, blind.predicted, blind.sequence, part_of_tokens(tokens))
    ranks = stack_ranks(trace, layers, hot_rankings(trace, layers), "pinned")
    flattered = hit_curves(ranks, trace, layers, "fit")[0, 10]
    fair = cross_fitted_hit_curves(trace, layers, "pinned")[0, 10]
    assert flattered > 0.58
    assert fair == pytest.approx(0.5, abs=0.08)


def test_the_summary_is_read_off_the_curves() -> None:
    rng = np.random.default_rng(3)
    layers = (LayerShape(1, 8, 2), LayerShape(4, 20, 3))
    trace = random_trace(layers, 200, rng)
    curves = layer_curves(trace, layers)
    hot = hot_rankings(trace, layers)
    bound = rank_curves(belady_ranks(trace, layers, hot)[trace.part == 2], layers)
    for row, (entry, rates) in enumerate(zip(curves, layer_hit_rates(curves), strict=True)):
        experts = layers[row].num_experts
        assert entry.layer == rates.layer == layers[row].layer
        assert len(entry.lcp) == experts + 1
        assert len(entry.accuracy) == 2 * layers[row].top_k
        quarters = [experts // 4, experts // 2, 3 * experts // 4]
        assert rates.lru == tuple(entry.lru[slots] for slots in quarters)
        assert rates.belady == pytest.approx(bound[row, quarters], abs=1e-4)
        for online in (rates.lru, rates.lfu, rates.lcp):
            assert all(a <= b for a, b in zip(online, rates.belady, strict=True))
