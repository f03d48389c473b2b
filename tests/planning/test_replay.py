"""Replays against a plain walk over every token, and cases worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.activations import activations
from moepack.belady import belady_hits
from moepack.compute import Curve
from moepack.decoding import Decoding
from moepack.fixed_times import FixedTimes
from moepack.layout import Layout
from moepack.passes import Oracle, decode_passes
from moepack.plan import (
    POLICIES,
    POOL_POLICIES,
    LayerPlacement,
    Placement,
    PrefetchMode,
    SharedPool,
)
from moepack.replay import Replayer
from moepack.replayed import Replayed
from moepack.routing_tables import RoutingTables
from moepack.segment_times import segments_of
from moepack.trace import NO_PREDICTION, ROUTING_PARTS, LayerShape, RoutingPart, Trace
from tests.support.caches import half_life_of, half_lives, random_trace, shapes
from tests.support.routed import (
    Setting,
    compute_of,
    drawn_compute,
    layer_compute,
    layout_of,
    model_of,
    placed,
    profile_of,
)
from tests.support.walk import Walked, first_token_s, walk

MODES: tuple[PrefetchMode, ...] = ("off", "bottoms", "all")


def drawn_setting(data: st.DataObject, *, alike: bool, one_part: bool = False) -> Setting:
    """A small model with random routing on a random machine."""
    drawn = data.draw(shapes(experts=7))
    if alike:
        drawn = tuple(shape._replace(num_experts=7, top_k=3) for shape in drawn)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    spec = model_of(drawn, tail=int(rng.integers(0, 2)))
    trace = random_trace(drawn, data.draw(st.integers(1, 24)), rng)
    if one_part:
        trace.part[:] = 2
    latency_s, rate = 1e-4 * rng.random(), 10 ** rng.uniform(6.5, 9)
    return Setting(
        spec,
        drawn_compute(spec, rng),
        RoutingTables(profile_of(spec, trace, drawn)),
        lambda size: latency_s + size / rate,
    )


def drawn_placement(
    data: st.DataObject, setting: Setting, *, pooled: bool
) -> tuple[Layout, Placement]:
    """Any cut, any slots, any policy and any prefetching in every layer."""
    ratios = [1.0] * len(setting.tables.layers)
    if not pooled:
        choice = data.draw(st.sampled_from([(1.0,), (0.0,), (0.0, 1.0), (0.0, 0.25, 0.5, 1.0)]))
        ratios = [data.draw(st.sampled_from(choice)) for _ in ratios]
    layout = layout_of(setting.spec, ratios, block_tokens=data.draw(st.integers(1, 9)))
    layers = []
    for shape, cut in zip(setting.tables.layers, layout.layers, strict=True):
        mode = data.draw(st.sampled_from(MODES))
        count = st.integers(0, shape.num_experts)
        policy = data.draw(st.sampled_from(POLICIES))
        layers.append(
            LayerPlacement(
                layer=shape.layer,
                budget_bytes=0,
                top_slots=data.draw(count) if cut.split and not pooled else 0,
                bottom_slots=data.draw(count) if cut.split < cut.width else 0,
                policy=policy,
                hot=tuple(data.draw(st.permutations(range(shape.num_experts)))),
                prefetch=mode,
                prefetch_depth=0 if mode == "off" else data.draw(st.integers(1, 8)),
                half_life_tokens=half_life_of(policy, data.draw(half_lives)),
            )
        )
    pool = None
    if pooled:
        experts = sum(shape.num_experts for shape in setting.tables.layers)
        policy = data.draw(st.sampled_from(POOL_POLICIES))
        pool = SharedPool(data.draw(st.integers(1, experts)), policy)
    return layout, placed(layout, layers, staging=data.draw(st.integers(1, 9)), pool=pool)


def replayed(
    setting: Setting,
    layout: Layout,
    placement: Placement,
    *,
    as_ready: bool = True,
    oracle: Oracle = "none",
    part: RoutingPart = "test",
    prompt_tokens: int = 1,
) -> Replayed:
    replayer = Replayer(
        setting.spec,
        setting.compute,
        setting.tables,
        setting.link,
        prompt_tokens=prompt_tokens,
        part=part,
    )
    return replayer.replay(layout, placement, as_ready=as_ready, oracle=oracle)


def check(found: Replayed, walked: Walked) -> None:
    """Every sum of the two is the same."""
    assert walked.tokens
    for name in ("demand_bytes", "ahead_used_bytes", "ahead_wasted_bytes", "link_s"):
        assert getattr(found, name) == pytest.approx(getattr(walked, name) / walked.tokens), name
    assert found.hit_rate == pytest.approx(walked.hits / walked.activations)
    assert found.ready_rate == pytest.approx(walked.ready / walked.activations)
    assert found.tpot_s == pytest.approx(walked.seconds / walked.tokens)
    waits = [wait_s / walked.tokens for wait_s in walked.layer_wait_s.values()]
    assert found.layer_wait_s == pytest.approx(waits, abs=1e-12)
    assert found.events == walked.tokens * len(waits)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("perfect", [False, True])
@given(data=st.data())
def test_decoding_takes_what_a_walk_over_every_token_takes(
    pooled: bool, perfect: bool, data: st.DataObject
) -> None:
    setting = drawn_setting(data, alike=pooled)
    part = data.draw(st.sampled_from(ROUTING_PARTS))
    if not len(setting.tables.tokens(part)):
        return
    layout, placement = drawn_placement(data, setting, pooled=pooled)
    as_ready = data.draw(st.booleans())
    if not as_ready:  # in order, frames have to be left for what nobody guessed
        placement = dataclasses.replace(placement, staging_experts=16)
    found = replayed(
        setting,
        layout,
        placement,
        as_ready=as_ready,
        oracle="prediction" if perfect else "none",
        part=part,
    )
    check(found, walk(setting, layout, placement, part, as_ready=as_ready, perfect=perfect))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("perfect", [False, True])
@given(data=st.data())
def test_a_prompt_takes_what_a_walk_through_its_layers_takes(
    pooled: bool, perfect: bool, data: st.DataObject
) -> None:
    setting = drawn_setting(data, alike=pooled, one_part=True)
    tokens = range(len(setting.tables.trace.ids))
    layout, placement = drawn_placement(data, setting, pooled=pooled)
    found = replayed(
        setting,
        layout,
        placement,
        oracle="prediction" if perfect else "none",
        prompt_tokens=len(tokens),
    )
    expected_s = first_token_s(setting, layout, placement, tokens, perfect=perfect)
    assert found.ttft_s == pytest.approx(expected_s)


#: Three tokens of two experts each, and what is guessed for them: experts 0, 2 and 3.
TOKENS = np.array([[0, 1], [1, 2], [0, 1]], dtype=np.uint16)
GUESSES = np.array([[0, 2], [2, 3], [3, 0]], dtype=np.uint16)


def by_hand(*, slots: int, prefetch: int = 0) -> tuple[Setting, Layout, Placement]:
    """Two layers of four experts: 2 ms of attention, 1 ms an expert, half a millisecond of shared
    expert, 3 ms a transfer, 1 ms of head. Expert 1 is the hottest."""
    drawn = (LayerShape(0, 4, 2), LayerShape(1, 4, 2))
    spec = model_of(drawn)
    entry = layer_compute((0, 1), attention=2e-3, expert=1e-3, ffn=5e-4)
    trace = Trace(
        ids=np.repeat(TOKENS[:, None], 2, axis=1),
        weights=np.ones((3, 2, 2), dtype=np.float16),
        predicted=np.pad(
            np.repeat(GUESSES[:, None], 2, axis=1),
            ((0, 0), (0, 0), (0, 2)),
            constant_values=NO_PREDICTION,
        ),
        sequence=np.zeros(3, dtype=np.uint32),
        part=np.zeros(3, dtype=np.uint8),
    )
    compute = compute_of(spec, [entry], head_s=1e-3)
    setting = Setting(spec, compute, RoutingTables(profile_of(spec, trace, drawn)), lambda _: 3e-3)
    layers = [
        LayerPlacement(
            number, 0, slots, 0, "pinned", (1, 0, 2, 3), "all" if prefetch else "off", prefetch
        )
        for number in range(2)
    ]
    layout = layout_of(spec, (1.0, 1.0), block_tokens=2)
    return setting, layout, placed(layout, layers, staging=4)


@pytest.mark.parametrize("as_ready", [False, True])
def test_with_nothing_cached_each_layer_waits_for_two_transfers(as_ready: bool) -> None:
    """Routed at 2; transfers end at 5 and 8, the second expert at 9. The shared expert hides."""
    found = replayed(*by_hand(slots=0), part="fit", as_ready=as_ready)
    assert found.tpot_s == pytest.approx(2 * (2 + 3 + 3 + 1) * 1e-3 + 1e-3)
    assert found.hit_rate == found.ready_rate == 0
    assert found.layer_wait_s == pytest.approx([(9 - 2 - 2.5) * 1e-3] * 2)
    assert found.link_s == pytest.approx(4 * 3e-3)


@pytest.mark.parametrize("as_ready", [False, True])
def test_with_everything_cached_only_compute_counts(as_ready: bool) -> None:
    found = replayed(*by_hand(slots=4), part="fit", as_ready=as_ready, prompt_tokens=3)
    assert found.tpot_s == pytest.approx(2 * (2 + 1 + 1 + 0.5) * 1e-3 + 1e-3)
    # In two blocks: attention and shared expert twice, and three and two experts.
    assert found.ttft_s == pytest.approx(2 * (2 * 2 + 2 * 0.5 + 5) * 1e-3 + 1e-3)
    assert found.hit_rate == found.ready_rate == 1
    assert found.link_bytes_per_token == 0
    assert found.layer_wait_s == pytest.approx([0, 0], abs=1e-15)


def test_a_prompt_through_two_layers_takes_what_it_takes_by_hand() -> None:
    """Expert 1 is there. Both blocks' attention ends at 4; transfers of 0 and 2 at 7 and 10.

    Both blocks' shared expert hides; in order: expert 0 (both blocks) until 9, expert 1 (both)
    until 11, expert 2 until 12.
    """
    found = replayed(*by_hand(slots=1), part="fit", prompt_tokens=3)
    assert found.ttft_s == pytest.approx((12 + 12 + 1) * 1e-3)
    # Of the 12 it waits 2 for expert 0, between shared expert and arrival.
    assert found.prompt_wait_s == pytest.approx(2 * 2e-3)


def test_transfers_cost_a_prompt_what_was_measured_beside_prompts() -> None:
    """Expert 0 now takes until 9.75, expert 1 until 11.75, expert 2 until 13; tokens as before."""
    setting, layout, place = by_hand(slots=1)
    (entry,) = setting.compute.layers
    costly = dataclasses.replace(entry, prompt_transfer_s=0.25e-3, prompt_burst_s=0.5e-3)
    compute = dataclasses.replace(setting.compute, layers=(costly,))
    before = replayed(setting, layout, place, part="fit", prompt_tokens=3)
    found = replayed(
        dataclasses.replace(setting, compute=compute), layout, place, part="fit", prompt_tokens=3
    )
    assert found.ttft_s == pytest.approx((13 + 13 + 1) * 1e-3)
    assert found.tpot_s == before.tpot_s


def test_each_transfer_costs_a_token_what_was_measured_of_its_kind() -> None:
    """Of both experts of a layer one is guessed, and so is one that nobody needs."""
    setting, layout, place = by_hand(slots=0, prefetch=2)
    (entry,) = setting.compute.layers
    entry = dataclasses.replace(entry, attention=Curve((1,), (9e-3,)))  # time for both guesses

    def longer_s(oracle: Oracle, **costs_s: float) -> float:
        free: dict[str, Any] = {"ahead_transfer_s": 0.0, "ahead_burst_s": 0.0}
        tpots_s = []
        for costs in (free, free | costs_s):
            layers = (dataclasses.replace(entry, **costs),)
            compute = dataclasses.replace(setting.compute, layers=layers)
            costly = dataclasses.replace(setting, compute=compute)
            tpots_s.append(replayed(costly, layout, place, part="fit", oracle=oracle).tpot_s)
        return tpots_s[1] - tpots_s[0]

    demands: dict[str, float] = {"transfer_s": 1e-4, "burst_s": 2e-4}
    ahead: dict[str, float] = {"ahead_transfer_s": 1e-5, "ahead_burst_s": 1e-6}
    assert longer_s("none", **demands) == pytest.approx(2 * (1e-4 + 2e-4))
    assert longer_s("none", **ahead) == pytest.approx(0.0, abs=1e-12), "it waits for the demand"
    assert longer_s("prediction", **demands) == 0.0, "nothing is demanded"
    assert longer_s("prediction", **ahead) == pytest.approx(2 * (2 * 1e-5 + 1e-6))


def test_a_prompt_finds_what_was_fetched_ahead_of_its_second_layer() -> None:
    """The first layer ends at 12, as without; from 10 on the guesses for the second layer come.

    Of those, 0 has come at 13; 2 is in flight when the routing is known at 16, and comes then; 3 is
    dropped. With the shared expert until 17, experts 0, 1 and 2 take until 22.
    """
    setting, layout, place = by_hand(slots=1, prefetch=2)
    found = replayed(setting, layout, place, part="fit", prompt_tokens=3)
    assert found.ttft_s == pytest.approx((22 + 1) * 1e-3)


def test_a_prompt_leaves_one_frame_for_what_nobody_guessed() -> None:
    """With two frames one guess is fetched, 0; the last expert is demanded at 16, and comes at 19.

    In the first layer nothing waits for a frame; the second ends at 20.
    """
    setting, layout, place = by_hand(slots=1, prefetch=2)
    place = dataclasses.replace(place, staging_experts=2)
    found = replayed(setting, layout, place, part="fit", prompt_tokens=3)
    # Expert 0 until 19, expert 1 until 21 and 2, which has come meanwhile, until 22.
    assert found.ttft_s == pytest.approx((22 + 1) * 1e-3)


def test_the_link_asks_for_no_more_ahead_than_there_are_frames() -> None:
    setting, layout, place = by_hand(slots=0, prefetch=2)
    both = replayed(setting, layout, place, part="fit")
    one = replayed(setting, layout, dataclasses.replace(place, staging_experts=1), part="fit")
    asked = both.ahead_used_bytes + both.ahead_wasted_bytes
    assert 0 < one.ahead_used_bytes + one.ahead_wasted_bytes < asked


def test_a_part_without_tokens_is_replayed_as_the_whole_trace() -> None:
    setting, layout, place = by_hand(slots=1)
    whole = replayed(setting, layout, place, part="fit", prompt_tokens=2)
    assert replayed(setting, layout, place, part="test", prompt_tokens=2).tpot_s == whole.tpot_s


@given(data=st.data())
def test_a_clairvoyant_cache_hits_what_belady_hits(data: st.DataObject) -> None:
    setting = drawn_setting(data, alike=False, one_part=True)
    layers = [
        LayerPlacement(
            shape.layer, 0, data.draw(st.integers(0, shape.num_experts)), 0, "lru", hot, "all", 4
        )
        for shape, hot in zip(setting.tables.layers, setting.tables.hot, strict=True)
    ]
    layout = layout_of(setting.spec, [1.0] * len(layers))
    found = replayed(setting, layout, placed(layout, layers, staging=8), oracle="future")
    trace, drawn, hot = setting.tables.trace, setting.tables.layers, setting.tables.hot
    hits = belady_hits(trace, drawn, hot, [layer.top_slots for layer in layers])
    activated = len(trace.ids) * sum(shape.top_k for shape in drawn)
    assert found.hit_rate == pytest.approx(hits.sum() / activated)
    assert found.ahead_wasted_bytes == 0, "it predicts rightly"


@given(seed=st.integers(0, 2**32 - 1), lanes=st.integers(2, 60), data=st.data())
def test_many_lanes_end_where_one_lane_ends(seed: int, lanes: int, data: st.DataObject) -> None:
    drawn = (LayerShape(0, 8, 2), LayerShape(1, 8, 2))
    rng = np.random.default_rng(seed)
    spec = model_of(drawn)
    trace = random_trace(drawn, 60, rng)
    rate = 10 ** rng.uniform(6.5, 8.5)
    setting = Setting(
        spec,
        drawn_compute(spec, rng),
        RoutingTables(profile_of(spec, trace, drawn)),
        lambda size: size / rate,
    )
    layout, place = drawn_placement(data, setting, pooled=False)
    as_ready = data.draw(st.booleans())
    if not as_ready:
        place = dataclasses.replace(place, staging_experts=16)
    found = activations(setting.tables, np.arange(60))
    segments = segments_of(spec, setting.compute, layout, setting.link)
    passes = decode_passes(setting.tables, found, place, segments, "none")
    before_s, guess_s, after_s = 1e-3 * rng.random((3, 2))
    fixed = FixedTimes(before_s, guess_s, after_s, float(rng.random() * 1e-3))
    one, many = (
        Decoding(
            passes,
            found,
            fixed,
            segments,
            as_ready=as_ready,
            frames=place.staging_experts,
            lanes=count,
        ).replayed(0.0)
        for count in (1, lanes)
    )
    for name in Replayed._fields:
        assert getattr(many, name) == pytest.approx(getattr(one, name), rel=1e-9, abs=1e-12), name
