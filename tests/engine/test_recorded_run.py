"""Caches that are stepped over a recorded run find, pass by pass, what the engine found."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from moepack_runtime.tokenizer import Tokenizer

from moepack.checkpoint import Checkpoint
from moepack.plan import POLICIES, POOL_POLICIES, Placement, Policy, SharedPool
from moepack.residency import LayerCache, SharedCache
from moepack.shipped import shipped_model, shipped_texts
from tests.support.caches import cache_of
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.recorded_run import RecordedRun, record_run

PROMPT_TOKENS = 40
NEW_TOKENS = 32

#: Experts of a token of the shipped model: fewer slots hold less than one token uses.
TOP_K = 4


@functools.cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(shipped_model())


@functools.cache
def prompt() -> list[int]:
    text = shipped_texts()[0].read_text("utf-8")
    return Tokenizer.load(shipped_model()).encode(text)[:PROMPT_TOKENS]


def run(ratio: float, place_options: dict[str, object]) -> tuple[Placement, RecordedRun]:
    layout = mixed_layout(checkpoint().spec, (ratio,), block_tokens=16)
    place = placement(
        checkpoint().spec,
        layout,
        staging=4,
        context=PROMPT_TOKENS + NEW_TOKENS,
        bottoms=0,
        **place_options,  # type: ignore[arg-type]
    )
    with open_engine(checkpoint(), layout, place) as engine:
        return place, record_run(engine, prompt(), NEW_TOKENS)


def fresh_caches(place: Placement) -> list[LayerCache]:
    if place.pool is not None:
        pool = SharedCache(place.pool.slots, [it.hot for it in place.layers], place.pool.policy)
        return [pool.layer(index) for index in range(len(place.layers))]
    return [cache_of(it, it.top_slots) for it in place.layers]


def replayed_hits(place: Placement, recorded: RecordedRun) -> list[npt.NDArray[np.bool_]]:
    """By layer, bool [tokens, top_k]."""
    caches = fresh_caches(place)
    found: list[list[npt.NDArray[np.bool_]]] = [[] for _ in caches]
    edges = [0, *itertools.accumulate(recorded.passes)]
    for begin, end in itertools.pairwise(edges):
        for cache, ids, hits in zip(caches, recorded.ids, found, strict=True):
            tokens = ids[begin:end]
            hits.append(np.isin(tokens, list(cache.step(tokens.tolist()).resident)))
    return [np.concatenate(hits) for hits in found]


def check(place: Placement, recorded: RecordedRun) -> float:
    """The replay agrees in every event. Returns the hit rate of decoding."""
    assert recorded.passes == (PROMPT_TOKENS, *[1] * (NEW_TOKENS - 1))
    for mine, engines in zip(replayed_hits(place, recorded), recorded.hits, strict=True):
        assert np.array_equal(mine, engines)
    decoded = np.concatenate([hits[PROMPT_TOKENS:].ravel() for hits in recorded.hits])
    assert recorded.stats.hit_rate == pytest.approx(decoded.mean())
    return float(decoded.mean())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("slots", "ratio"), [(TOP_K - 1, 1.0), (9, 1.0), (9, 0.5), (20, 1.0)])
def test_every_hit_of_a_layers_own_slots_is_found_again(
    policy: Policy, slots: int, ratio: float
) -> None:
    place, recorded = run(ratio, {"tops": slots, "policy": policy})
    rate = check(place, recorded)
    assert 0 < rate < 1
    if ratio == 1.0:
        assert recorded.stats.ready_rate == recorded.stats.hit_rate
    else:
        assert recorded.stats.ready_rate == 0, "every bottom is fetched"


@pytest.mark.parametrize("policy", POOL_POLICIES)
@pytest.mark.parametrize("slots", [TOP_K - 1, 21, 90])
def test_every_hit_of_a_shared_pool_is_found_again(policy: Policy, slots: int) -> None:
    place, recorded = run(1.0, {"tops": 0, "pool": SharedPool(slots, policy)})
    assert 0 <= check(place, recorded) < 1


def test_the_routing_is_the_same_under_every_placement() -> None:
    _, first = run(1.0, {"tops": 2, "policy": "lcp"})
    _, second = run(1.0, {"tops": 0, "pool": SharedPool(50, "lru")})
    for mine, others in zip(first.ids, second.ids, strict=True):
        assert np.array_equal(mine, others)
