"""The latency model, against hand-computed cases and a simulation of what the engine does."""

from __future__ import annotations

import random

import pytest

from moepack.cost import (
    LayerTimes,
    PartCost,
    decode_layer_s,
    distinct_experts,
    miss_bytes,
    miss_seconds,
    prefill_layer_s,
    throttled,
)


def link(size_bytes: int) -> float:
    """A link of 1 byte per microsecond."""
    return size_bytes * 1e-6


def simulate(
    miss: float, fetch_s: float, expert_s: float, top_k: int, frames: int, rng: random.Random
) -> float:
    """One token through one layer, event by event: frames, one serial link, one compute queue."""
    missing = [rng.random() < miss for _ in range(top_k)]
    now = link_free = 0.0
    frame_free = [0.0] * frames
    arrival: dict[int, tuple[float, int]] = {}
    waiting = [place for place in range(top_k) if missing[place]]

    def start_fetches(at: float) -> None:
        nonlocal link_free
        for frame in range(frames):
            if waiting and frame_free[frame] <= at:
                link_free = max(link_free, at) + fetch_s
                arrival[waiting.pop(0)] = (link_free, frame)
                frame_free[frame] = float("inf")

    start_fetches(0.0)
    for place in range(top_k):
        if not missing[place]:
            now += expert_s
            continue
        arrived, frame = arrival[place]
        now = max(now, arrived) + expert_s
        frame_free[frame] = now
        start_fetches(now)
    return now


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("miss", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0])
def test_decoding_agrees_with_a_simulation(frames: int, miss: float, ratio: float) -> None:
    rng = random.Random(1)
    runs = 4000
    simulated = sum(simulate(miss, ratio, 1.0, 4, frames, rng) for _ in range(runs)) / runs
    part = PartCost(stored_bytes=round(ratio * 1e6), hit_rate=1.0 - miss, slots=0)
    priced = decode_layer_s(LayerTimes(0.0, 1.0), 4, [part], link, staging_experts=frames)
    assert priced == pytest.approx(simulated, rel=0.12)


def test_everything_resident_costs_the_compute_alone() -> None:
    part = PartCost(stored_bytes=1000, hit_rate=1.0, slots=8)
    times = LayerTimes(other_s=0.5, expert_s=0.25)
    assert decode_layer_s(times, 4, [part], link, staging_experts=2) == 1.5
    assert miss_bytes(4, [part]) == 0


def test_a_miss_of_a_split_expert_is_two_reads_and_a_hit_one() -> None:
    top = PartCost(stored_bytes=300, hit_rate=0.75, slots=3)
    bottom = PartCost(stored_bytes=700, hit_rate=0.0, slots=0)
    probability, fetch_s = miss_seconds([top, bottom], link)
    assert probability == 1.0
    assert fetch_s == pytest.approx(0.25 * 300e-6 + 700e-6)
    assert miss_bytes(4, [top, bottom]) == pytest.approx(4 * (75 + 700))


def test_a_prompt_fetches_each_missing_expert_once() -> None:
    used = distinct_experts([0.5, 0.25, 0.125, 0.125], tokens=1000, top_k=2)
    assert used == pytest.approx([1.0, 1.0, 1.0, 1.0])
    part = PartCost(stored_bytes=1_000_000, hit_rate=0.0, slots=1)
    times = LayerTimes(other_s=1.0, expert_s=0.5)
    hot = (0, 1, 2, 3)
    assert prefill_layer_s(times, used, hot, [part], link, staging_experts=2) == pytest.approx(4.0)
    assert prefill_layer_s(times, used, hot, [part], link, staging_experts=1) == pytest.approx(6.0)


def test_one_token_uses_top_k_experts_in_expectation() -> None:
    shares = [0.4, 0.3, 0.2, 0.1]
    assert sum(distinct_experts(shares, tokens=1, top_k=2)) == pytest.approx(2.0)


def test_a_throttled_link_is_never_faster_than_the_real_one() -> None:
    slow = throttled(link, rate_bytes_per_s=1e5, latency_s=0.001)
    assert slow(1000) == pytest.approx(0.011)
    fast = throttled(link, rate_bytes_per_s=1e9, latency_s=0.0)
    assert fast(1000) == link(1000)
