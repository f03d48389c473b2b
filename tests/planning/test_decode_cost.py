"""The price of a decoded token, against hand-computed cases and simulations."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.cost import Array, Held, LayerTimes, Parts
from moepack.decode_cost import decode_ahead_s, decode_layer_s, ranks_in_time
from moepack.in_order import in_order_s
from moepack.plan import PrefetchMode
from moepack.prefetching import Ahead, brought
from tests.support.links import StackOfLayers

WHOLE = Parts(1.0, 0.0, 1.0)

FOUR: dict[str, Any] = {"staging_experts": 4}


def simulate(
    miss: float, fetch_s: float, expert_s: float, top_k: int, frames: int, rng: random.Random
) -> float:
    """One token through one layer on demand, in order: frames, one link, one compute queue."""
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
def test_loading_on_demand_agrees_with_a_simulation(frames: int, miss: float, ratio: float) -> None:
    rng = random.Random(1)
    runs = 4000
    simulated = sum(simulate(miss, ratio, 1.0, 4, frames, rng) for _ in range(runs)) / runs
    parts, held = Parts(ratio, 0.0, 1.0), Held(1.0 - miss, 1.0)
    priced = decode_layer_s(LayerTimes(0.0, 1.0), 4, parts, held, staging_experts=frames)
    assert priced.item() == pytest.approx(simulated, rel=0.03)


#: (theta, tops of 32, top-k, whole expert's transfer over its compute, gap over its compute)
SHAPES = [
    (1.0, 8, 4, 1.0, 1.0),
    (1.0, 8, 4, 4.0, 4.0),
    (1.0, 0, 4, 2.0, 4.0),
    (1.0, 16, 1, 3.0, 2.0),
    (0.5, 12, 4, 1.0, 1.0),
    (0.5, 12, 4, 3.0, 4.0),
    (0.25, 20, 2, 2.0, 2.0),
    (0.25, 32, 4, 2.0, 1.0),
    (1.0, 8, 2, 20.0, 1.0),
    (0.5, 8, 2, 20.0, 1.0),
]


@pytest.mark.parametrize("as_ready", [False, True])
@pytest.mark.parametrize("mode", ["off", "bottoms", "all"])
@pytest.mark.parametrize(("theta", "tops", "top_k", "ratio", "gap_s"), SHAPES)
def test_a_stack_of_layers_agrees_with_a_simulation(
    theta: float,
    tops: int,
    top_k: int,
    ratio: float,
    gap_s: float,
    mode: PrefetchMode,
    as_ready: bool,
) -> None:
    experts, depth = 32, 2 * top_k
    accuracy = np.linspace(0.9, 0.1, depth)
    top_s, bottom_s = theta * ratio, (1.0 - theta) * ratio
    simulated = StackOfLayers(
        experts=experts,
        top_k=top_k,
        tops=tops,
        bottoms=0,
        top_s=top_s,
        bottom_s=bottom_s,
        top_share=theta,
        expert_s=1.0,
        gap_s=gap_s,
        accuracy=() if mode == "off" else accuracy.tolist(),
        bottoms_only=mode == "bottoms",
        as_ready=as_ready,
    ).mean_s(2000, random.Random(1))
    held = Held(tops / experts, 1.0 if theta == 1.0 else 0.0)
    times, parts = LayerTimes(gap_s, 1.0), Parts(top_s, bottom_s, theta)
    kind: dict[str, Any] = {"staging_experts": depth, "as_ready": as_ready}
    if mode == "off" or (mode == "bottoms" and theta == 1.0):
        priced = decode_layer_s(times, top_k, parts, held, **kind)
    else:
        ranks = Held(*(np.full(depth, chance) for chance in held[:2]))
        ahead = Ahead(mode, gap_s, accuracy, ranks)
        priced = decode_ahead_s(times, top_k, parts, held, ahead, depth, **kind)[depth - 1]
    assert priced.item() == pytest.approx(simulated, rel=0.06)


def test_everything_resident_costs_the_compute_alone() -> None:
    times = LayerTimes(other_s=0.5, expert_s=0.25)
    made = decode_layer_s(times, 4, WHOLE, Held(1.0, 1.0), staging_experts=2)
    assert made.item() == 1.5


def test_each_missing_part_is_a_transfer_for_the_computing_thread() -> None:
    def seconds(parts: Parts, held: Held) -> float:
        times = LayerTimes(0.0, expert_s=100.0, transfer_s=1.0)
        made = decode_layer_s(times, 4, parts, held, staging_experts=8, as_ready=True)
        return float(made.item())

    nothing = 400.0  # the link's own time hides behind the compute
    whole, half = Parts(1e-9, 0.0, 1.0), Parts(1e-9, 1e-9, 0.5)
    assert seconds(whole, Held(0.75, 1.0)) == pytest.approx(nothing + 1.0)
    # A bottom for each of four experts, and a top for one of them.
    assert seconds(half, Held(0.75, 0.0)) == pytest.approx(nothing + 5.0)


def test_having_to_transfer_anything_costs_the_burst_once() -> None:
    times = LayerTimes(0.0, expert_s=100.0, transfer_s=1.0, burst_s=10.0)
    whole = Parts(1e-9, 0.0, 1.0)
    for held, any_of_it in ((1.0, 0.0), (0.75, 1 - 0.75**4), (0.0, 1.0)):
        made = decode_layer_s(times, 4, whole, Held(held, 1.0), staging_experts=8, as_ready=True)
        assert made.item() == pytest.approx(400.0 + 4 * (1 - held) + 10.0 * any_of_it)


@pytest.mark.parametrize("as_ready", [False, True])
def test_the_shared_expert_hides_transfers(as_ready: bool) -> None:
    times = LayerTimes(other_s=0.0, expert_s=0.0, shared_s=3.0)
    none = Held(0.0, 1.0)
    found = decode_layer_s(times, 4, WHOLE, none, staging_experts=8, as_ready=as_ready)
    assert found.item() == pytest.approx(4.0)


def test_as_ready_what_is_there_hides_the_first_transfer_whatever_the_frames() -> None:
    """Two of four are there: computed until 4, when the first has come at 1.

    With a frame for each the other two follow at once; with one the second comes at 6 + 1.
    """
    times = LayerTimes(other_s=0.0, expert_s=2.0)
    always = Held(np.array([0.5]), 1.0)
    expert_s, top_s, bottom_s = np.array([2.0]), np.array([0.0]), np.array([1.0])
    ample, one = (
        in_order_s(4, expert_s, top_s, bottom_s, top_s, frames, as_ready=True) for frames in (4, 1)
    )
    assert ample[2, 0].item() == 8.0
    assert one[2, 0].item() == 9.0
    slow, fast = (
        decode_layer_s(times, 4, WHOLE, always, staging_experts=frames, as_ready=True).item()
        for frames in (1, 4)
    )
    assert fast < slow


def test_guesses_and_what_they_waste_cost_the_compute() -> None:
    """Every guess is wrong, and begun in a long window: each costs what a transfer does."""
    wrong = Ahead("all", 100.0, np.zeros(2), Held(np.zeros(2), np.ones(2)), guess_s=0.5)
    times = LayerTimes(100.0, 10.0, transfer_s=0.25, ahead_transfer_s=0.25)
    plain = decode_layer_s(times, 2, WHOLE, Held(1.0, 1.0), staging_experts=4, as_ready=True)
    found = decode_ahead_s(
        times, 2, WHOLE, Held(1.0, 1.0), wrong, 2, staging_experts=4, as_ready=True
    )
    assert found[:, 0, 0] == pytest.approx(plain.item() + np.array([0.75, 1.0]))


def test_what_is_fetched_ahead_costs_as_much_as_is_said_of_that() -> None:
    """All four are lacking, and hide behind the compute whenever they are asked for."""
    alike = LayerTimes(
        0.0, 100.0, transfer_s=1.0, burst_s=8.0, ahead_transfer_s=1.0, ahead_burst_s=8.0
    )
    whole, nothing = Parts(1e-9, 0.0, 1.0), Held(0.0, 1.0)

    def ahead_s(accuracy: float, times: LayerTimes) -> float:
        guesses = Ahead("all", 100.0, np.full(4, accuracy), Held(np.zeros(4), np.ones(4)))
        made = decode_ahead_s(
            times, 4, whole, nothing, guesses, 4, staging_experts=8, as_ready=True
        )
        return float(made[-1].item())

    cheaper = alike._replace(ahead_transfer_s=0.25, ahead_burst_s=2.0)
    demanded_s = 400.0 + 4 * 1.0 + 8.0
    assert ahead_s(1.0, alike) == pytest.approx(demanded_s)
    assert ahead_s(1.0, cheaper) == pytest.approx(400.0 + 4 * 0.25 + 2.0)
    assert ahead_s(0.0, cheaper) == pytest.approx(demanded_s + 4 * 0.25), "all for nothing"


def test_a_window_for_all_that_is_lacking_leaves_the_compute() -> None:
    ahead = Ahead("all", 10.0, np.ones(4), Held(np.zeros(4), np.ones(4)))
    times = LayerTimes(10.0, 0.5)
    made = decode_ahead_s(times, 4, WHOLE, Held(0.0, 1.0), ahead, 4, staging_experts=8)
    # Two experts come ahead. The other two arrive after 1 and 2 s, at places 1 and 2, 1 and 3 ...
    # 3 and 4 of four that take half a second each.
    two = (3.5 + 3.0 + 3.0 + 3.0 + 2.5 + 2.5) / 6
    assert made[[1, 3], 0, 0] == pytest.approx([10.0 + two, 12.0])


def test_a_wrong_transfer_in_flight_delays_by_what_is_left_of_it() -> None:
    # A second of window, transfers of ten: 9 s are left when the routing is known.
    def seconds(accuracy: float) -> float:
        ahead = Ahead("all", 1.0, np.array([accuracy]), Held(np.zeros(1), np.ones(1)))
        made = decode_ahead_s(
            LayerTimes(1.0, 0.0), 1, Parts(10.0, 0.0, 1.0), Held(0.0, 1.0), ahead, 1, **FOUR
        )
        return float(made.item())

    on_demand = decode_layer_s(
        LayerTimes(1.0, 0.0), 1, Parts(10.0, 0.0, 1.0), Held(0.0, 1.0), **FOUR
    )
    assert on_demand.item() == 11.0
    assert seconds(1.0) == pytest.approx(10.0)
    assert seconds(0.0) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("rooms_s", "begun", "done"),
    [
        ((1.5, 0.5, -0.5, -1.5), (1.0, 1.0, 0.0), (1.0, 0.5, 0.0)),
        ((9.0, 8.0, 7.0, 6.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        ((-1.0, -2.0, -3.0, -4.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        # A window that would be long enough for all only if more were there in time already.
        ((0.5, -0.5, 7.0, 6.0), (1.0, 0.0, 0.0), (0.5, 0.0, 0.0)),
    ],
)
def test_ranks_are_in_time_until_the_window_ends(
    rooms_s: tuple[float, ...], begun: tuple[float, ...], done: tuple[float, ...]
) -> None:
    rooms = np.array(rooms_s)[:, None]
    found = ranks_in_time(rooms, np.zeros((4, 1)), np.ones((3, 1)))
    assert found[0][:, 0] == pytest.approx(begun)
    assert found[1][:, 0] == pytest.approx(done)


def test_ranks_that_vary_are_in_time_as_often_as_drawn_ones() -> None:
    rng = np.random.default_rng(1)
    lack, window_s = np.array([0.9, 0.5, 0.5, 0.3, 0.7]), 2.2
    ends_s = np.cumsum(rng.random((20_000, 5)) < lack, axis=1)  # transfers of 1 s
    begins_s = np.concatenate([np.zeros((20_000, 1)), ends_s[:, :-1]], axis=1)
    begun = (begins_s < window_s).mean(axis=0)
    done = np.clip(window_s - begins_s, 0.0, 1.0).mean(axis=0)
    means_s = np.cumsum([0.0, *lack])[:, None]
    deviations_s = np.sqrt(np.cumsum([0.0, *(lack * (1.0 - lack))]))[:, None]
    found = ranks_in_time(window_s - means_s, deviations_s, np.ones((5, 1)))
    assert found[0][:, 0] == pytest.approx(begun, abs=0.2)  # transfers come in whole seconds
    assert found[1][:, 0] == pytest.approx(done, abs=0.04)


def test_ranks_are_right_or_wrong_by_themselves() -> None:
    ahead = Ahead("all", 0.0, np.array([0.9, 0.5]), Held(np.zeros(2), np.ones(2)))
    found = brought(Held(0.0, 1.0).lacking(), ahead, 2)
    assert found.covered == pytest.approx(
        np.array([[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.05, 0.5, 0.45]])
    )
    assert found.lacks.both[:, 0] == pytest.approx([1.0, 1.0, 1.0])
    assert found.mean_lacks().both[:, 0] == pytest.approx([1.0, 0.55, 0.3])


def test_ranks_find_the_same_share_of_what_is_lacking_and_of_what_is_held() -> None:
    # A rank that is mostly held and one that is mostly not, of experts of which half are held.
    ahead = Ahead("all", 0.0, np.array([0.8, 0.8]), Held(np.array([0.9, 0.1]), np.ones(2)))
    found = brought(Held(0.5, 1.0).lacking(), ahead, 4).mean_lacks().both[:, 0]
    recall = 1.6 / 4
    assert found[[0, 2]] == pytest.approx([0.5, 0.5 * (1.0 - recall)])
    assert 0.5 - found[1] < found[1] - found[2]


def test_bottoms_alone_leave_an_expert_without_top_as_it_was() -> None:
    held = Held(np.array([0.5, 0.25]), np.zeros(2))
    ahead = Ahead("bottoms", 0.0, np.array([1.0, 1.0]), held)
    found = brought(Held(0.5, 0.0).lacking(), ahead, 4).mean_lacks()
    assert found.both[:, 0] == pytest.approx([0.5, 0.5, 0.5])
    assert found.bottom[:, 0] == pytest.approx([0.5, 0.5 * (1 - 0.5 * 2 / 3), 0.25])


def test_ranks_bring_accuracy_times_lack_where_held_and_predicted_are_independent() -> None:
    accuracy, hit = np.array([0.9, 0.5, 0.2]), 0.3
    ahead = Ahead("all", 0.0, accuracy, Held(np.full(3, hit), np.ones(3)))
    after = brought(Held(hit, 1.0).lacking(), ahead, 3).mean_lacks()
    ready = hit + np.cumsum([0.0, *(accuracy * (1 - hit) / 3)])
    assert 1.0 - after.both[:, 0] == pytest.approx(ready)


def test_a_grid_of_options_is_priced_like_each_by_itself() -> None:
    tops = np.array([0.0, 0.3, 1.0, 1.0])
    bottoms = np.array([0.0, 0.0, 0.0, 0.6])
    top_s, bottom_s = np.array([0.0, 0.5, 0.9]), np.array([2.0, 1.5, 1.1])
    share, expert_s = np.array([0.0, 0.25, 0.45]), np.array([1.0, 1.2, 1.2])
    accuracy = np.array([0.9, 0.6, 0.3])
    for mode in ("bottoms", "all"):
        for as_ready in (False, True):
            kind: dict[str, Any] = {"staging_experts": 4, "as_ready": as_ready}

            def ahead(top: Array, bottom: Array, mode: PrefetchMode = mode) -> Ahead:
                held = Held(np.tile(top, (3, 1)), np.tile(bottom, (3, 1)))
                return Ahead(mode, 1.5, accuracy, held)

            grid = decode_ahead_s(
                LayerTimes(1.5, expert_s, 0.1, 0.2, ahead_transfer_s=0.1),
                3,
                Parts(top_s, bottom_s, share),
                Held(tops, bottoms),
                ahead(tops, bottoms),
                2,
                **kind,
            )
            assert grid.shape == (2, 4, 3)
            for state in range(4):
                for cut in range(3):
                    one = decode_ahead_s(
                        LayerTimes(1.5, expert_s[cut], 0.1, 0.2, ahead_transfer_s=0.1),
                        3,
                        Parts(top_s[cut], bottom_s[cut], share[cut]),
                        Held(tops[state], bottoms[state]),
                        ahead(tops[[state]], bottoms[[state]]),
                        2,
                        **kind,
                    )
                    assert grid[:, state, cut] == pytest.approx(one[:, 0, 0])


chances = st.floats(0.0, 1.0)
seconds = st.floats(0.0, 10.0)


@given(
    top_k=st.integers(1, 6),
    split=st.sampled_from(["whole", "interior", "all tops"]),
    hit=chances,
    ratio=st.floats(0.01, 5.0),
    theta=st.floats(0.05, 0.95),
    faster=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)),
    gap_s=seconds,
    shared_s=seconds,
    transfer_s=st.floats(0.0, 1.0),
    burst_s=st.floats(0.0, 2.0),
    accuracy=st.lists(chances, min_size=1, max_size=8),
    rank_hits=st.lists(chances, min_size=8, max_size=8),
    mode=st.sampled_from(["off", "bottoms", "all"]),
    frames=st.integers(1, 8),
    as_ready=st.booleans(),
)
@settings(max_examples=400)
def test_a_faster_link_is_never_dearer(
    top_k: int,
    split: str,
    hit: float,
    ratio: float,
    theta: float,
    faster: tuple[float, float],
    gap_s: float,
    shared_s: float,
    transfer_s: float,
    burst_s: float,
    accuracy: list[float],
    rank_hits: list[float],
    mode: PrefetchMode,
    frames: int,
    as_ready: bool,
) -> None:
    depth = len(accuracy)
    hits = np.array(rank_hits[:depth])
    whole = split == "whole"
    if split == "all tops":
        held, ranks = Held(1.0, hit), Held(np.ones(depth), hits)
    else:
        held, ranks = Held(hit, float(whole)), Held(hits, np.full(depth, float(whole)))
    share = 1.0 if whole else theta
    times = LayerTimes(gap_s, 1.0, transfer_s, shared_s, burst_s, transfer_s, burst_s)

    def best_s(top: float, bottom: float) -> float:
        parts = Parts(share * ratio * top, (1.0 - share) * ratio * bottom, share)
        kind: dict[str, Any] = {"staging_experts": frames, "as_ready": as_ready}
        on_demand = decode_layer_s(times, top_k, parts, held, **kind).item()
        if mode == "off":
            return on_demand
        ahead = Ahead(mode, gap_s, np.array(accuracy), ranks)
        made = decode_ahead_s(times, top_k, parts, held, ahead, depth, **kind)
        return min(on_demand, float(made.min()))

    assert best_s(*faster) <= best_s(1.0, 1.0) * (1.0 + 1e-9)
