"""What the latency model is made of: prompts, lacks, and the throttled link."""

from __future__ import annotations

import numpy as np
import pytest

from moepack.cost import Held, Parts, distinct_experts, missing_after, prefill_layer_s, throttled


def link(size_bytes: int) -> float:
    """A link of 1 byte per microsecond."""
    return size_bytes * 1e-6


def test_a_prompt_fetches_each_missing_expert_once() -> None:
    used = distinct_experts(np.array([0.5, 0.25, 0.125, 0.125]), tokens=1000, top_k=2)
    assert used == pytest.approx([1.0, 1.0, 1.0, 1.0])
    missing = missing_after(used)
    assert missing == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])
    whole = Parts(1.0, 0.0, 1.0)

    def seconds(staging_experts: int, *, ahead: bool = False) -> float:
        made = prefill_layer_s(
            1.0,
            2.0,
            0.0,
            0.0,
            whole,
            (missing[1], 0.0),
            staging_experts=staging_experts,
            ahead=ahead,
        )
        return float(made.item())

    assert seconds(2) == pytest.approx(1.0 + 3.0)
    assert seconds(1) == pytest.approx(1.0 + 3.0 + 2.0)
    assert seconds(2, ahead=True) == pytest.approx(3.0)


def test_a_prompt_is_priced_for_all_states_and_cuts_at_once() -> None:
    parts = Parts(np.array([1.0, 0.25]), np.array([0.0, 0.75]), np.array([1.0, 0.25]))
    tops, bottoms = np.array([4.0, 1.0, 0.0]), np.array([4.0, 4.0, 2.0])
    experts_s = np.array([2.0, 3.0])
    grid = prefill_layer_s(0.5, experts_s, 0.1, 0.2, parts, (tops, bottoms), staging_experts=4)
    for state in range(3):
        for cut in range(2):
            one = prefill_layer_s(
                0.5,
                experts_s[cut],
                0.1,
                0.2,
                Parts(*(values[cut] for values in parts.columns())),
                (tops[state], bottoms[state]),
                staging_experts=4,
            )
            assert grid[state, cut] == pytest.approx(one.item())


def test_one_token_uses_top_k_experts_in_expectation() -> None:
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    assert distinct_experts(shares, tokens=1, top_k=2).sum() == pytest.approx(2.0)


def test_bottoms_are_kept_only_where_tops_are() -> None:
    interior = Held(top=0.75, bottom=0.0).lacking()
    assert (interior.bottom.item(), interior.both.item()) == (0.75, 0.25)
    all_tops = Held(top=1.0, bottom=0.25).lacking()
    assert (all_tops.bottom.item(), all_tops.both.item()) == (0.75, 0.0)
    whole = Held(top=0.75, bottom=1.0).lacking()
    assert (whole.bottom.item(), whole.both.item()) == (0.0, 0.25)


def test_a_throttled_link_is_never_faster_than_the_real_one() -> None:
    slow = throttled(link, rate_bytes_per_s=1e5, latency_s=0.001)
    assert slow(1000) == pytest.approx(0.011)
    fast = throttled(link, rate_bytes_per_s=1e9, latency_s=0.0)
    assert fast(1000) == link(1000)
