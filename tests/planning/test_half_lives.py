"""The half-life of a count that decays is chosen for each layer by what it hits on *fit*."""

from __future__ import annotations

import numpy as np
import pytest

from moepack import half_lives
from moepack.half_lives import HALF_LIVES, fitted_half_lives
from moepack.residency import ExpertCache
from moepack.trace import LayerShape, Trace, hot_rankings, part_of_tokens
from tests.support.caches import random_trace

EXPERTS, TOP_K = 16, 2


def drifting_trace(stays: tuple[int, ...], tokens: int = 900) -> Trace:
    """Every layer likes another third of its experts again after so many tokens."""
    rng = np.random.default_rng(12)
    layers = [LayerShape(row, EXPERTS, TOP_K) for row in range(len(stays))]
    trace = random_trace(layers, tokens, rng)
    for row, stay in enumerate(stays):
        liking = np.repeat(rng.gumbel(size=(1 + tokens // stay, EXPERTS)), stay, axis=0)[:tokens]
        scores = 3.0 * liking + rng.gumbel(size=liking.shape)
        trace.ids[:, row] = np.argsort(-scores, axis=1)[:, :TOP_K]
    trace.part[:] = part_of_tokens(tokens)
    return trace


def shapes_of(trace: Trace) -> list[LayerShape]:
    return [LayerShape(row, EXPERTS, TOP_K) for row in range(trace.ids.shape[1])]


def hits(trace: Trace, row: int, half_life: float) -> float:
    """Of the second half of *fit*, by the engine's caches of an eighth to a half of the experts."""
    halves = trace.halved_fit()
    hot = hot_rankings(halves, shapes_of(trace))[row]
    found = []
    for slots in range(2, 9):
        cache = ExpertCache(slots, hot, "lfu_decay", half_life_tokens=half_life)
        for ids, part in zip(halves.ids[:, row].tolist(), halves.part.tolist(), strict=True):
            resident = cache.step([ids]).resident
            if part == 1:
                found.append(len(resident))
    return float(np.mean(found))


def test_each_layer_gets_the_half_life_that_hits_most() -> None:
    trace = drifting_trace((12, 900))
    short, long = fitted_half_lives(trace, shapes_of(trace))
    assert short < long
    for row, chosen in enumerate((short, long)):
        tried = {each: hits(trace, row, each) for each in HALF_LIVES if each <= 540}
        assert tried[chosen] == max(tried.values())


def test_what_comes_after_the_tokens_that_it_is_fitted_on_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(half_lives, "FITTED_TOKENS", 200)
    trace = drifting_trace((12, 900))
    found = fitted_half_lives(trace, shapes_of(trace))
    trace.ids[200:] = trace.ids[200:, ::-1]
    assert fitted_half_lives(trace, shapes_of(trace)) == found


def test_no_half_life_is_longer_than_what_it_was_fitted_on() -> None:
    trace = drifting_trace((900,)).take(slice(70))
    assert fitted_half_lives(trace, shapes_of(trace)) <= (64.0,)
