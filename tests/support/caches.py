"""Caches written to be obvious, and traces to try them on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from moepack.plan import LayerPlacement, Policy
from moepack.residency import ExpertCache
from moepack.trace import NO_PREDICTION, LayerShape, Trace

#: Half-lives to draw from: none is a whole number of any other's.
half_lives = st.sampled_from((1.0, 2.5, 7.3, 64.0, 1000.0))

LCP_RATE = math.log(1 / 0.25) / 128


def half_life_of(policy: Policy, tokens: float = 5.0) -> float | None:
    """What a policy needs beside its name."""
    return tokens if policy == "lfu_decay" else None


def cache_of(place: LayerPlacement, slots: int) -> ExpertCache:
    """The engine's cache for one part of a layer's experts."""
    return ExpertCache(slots, place.hot, place.policy, half_life_tokens=place.half_life_tokens)


def obvious_cache(
    capacity: int,
    hot: Sequence[int],
    policy: str,
    tokens: Sequence[Sequence[int]],
    half_life: float = 5.0,
) -> list[set[int]]:
    """What a cache of no fewer slots than a token has experts holds when each token arrives."""
    count, last = dict.fromkeys(hot, 0), dict.fromkeys(hot, 0)
    score = dict.fromkeys(hot, 0.0)

    def key(expert: int) -> float:
        if policy == "pinned" or not count[expert]:
            return -1 - hot.index(expert)
        lcp = math.log(count[expert]) + last[expert] * LCP_RATE
        keys = {"lru": last[expert], "lfu": count[expert], "lcp": lcp, "lfu_decay": score[expert]}
        return keys[policy]

    held = set(hot[:capacity])
    history = []
    for clock, experts in enumerate(tokens):
        history.append(held)
        score = {expert: points * 2 ** (-1 / half_life) for expert, points in score.items()}
        for expert in experts:
            count[expert], last[expert] = count[expert] + 1, clock
            score[expert] += 1
        if policy != "pinned":
            contenders = held | set(experts)
            order = sorted(contenders, key=lambda e: (e in experts, key(e), -e), reverse=True)
            held = set(order[:capacity])
    return history


@st.composite
def shapes(draw: st.DrawFn, *, layers: int = 3, experts: int = 9) -> tuple[LayerShape, ...]:
    """Some layers, not all alike."""
    kinds = [
        (wide, draw(st.integers(1, wide)))
        for wide in draw(st.lists(st.integers(1, experts), min_size=1, max_size=2))
    ]
    count = draw(st.integers(1, layers))
    return tuple(LayerShape(2 * row, *kinds[row % len(kinds)]) for row in range(count))


@st.composite
def traces(draw: st.DrawFn, layers: Sequence[LayerShape], *, tokens: int = 40) -> Trace:
    """Random routing with some skew, and predictions here and there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_trace(layers, draw(st.integers(1, tokens)), rng, skew=draw(st.floats(0, 3)))


def random_trace(
    layers: Sequence[LayerShape], tokens: int, rng: np.random.Generator, *, skew: float = 1.5
) -> Trace:
    """Routing with some skew; one prediction in five is absent. Parts in no order."""
    top_k = max(layer.top_k for layer in layers)
    ids = np.zeros((tokens, len(layers), top_k), dtype=np.uint16)
    predicted = np.full((tokens, len(layers), 2 * top_k), NO_PREDICTION, dtype=np.uint16)
    for row, layer in enumerate(layers):
        liking = skew * rng.gumbel(size=layer.num_experts)
        for guess in (False, True):
            noise = rng.gumbel(size=(tokens, layer.num_experts))
            ranking = np.argsort(-liking - noise, axis=1)
            if guess:
                depth = min(2 * layer.top_k, layer.num_experts)
                predicted[:, row, :depth] = ranking[:, :depth]
            else:
                ids[:, row, : layer.top_k] = ranking[:, : layer.top_k]
    predicted[rng.random(tokens) < 0.2] = NO_PREDICTION
    return Trace(
        ids=ids,
        weights=np.ones(ids.shape, dtype=np.float16),
        predicted=predicted,
        sequence=np.zeros(tokens, dtype=np.uint32),
        part=rng.integers(0, 3, tokens).astype(np.uint8),
    )


def random_rankings(layers: Sequence[LayerShape], rng: np.random.Generator) -> list[list[int]]:
    """A hot ranking of each layer."""
    return [rng.permutation(layer.num_experts).tolist() for layer in layers]
