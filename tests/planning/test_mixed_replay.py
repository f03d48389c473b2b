"""Replays of layers whose experts are stored in several encodings, against the plain walk."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.compute import ComputeProfile, Curve, QuantisedExpert
from moepack.cost import LinkSeconds
from moepack.errors import PlanMismatchError
from moepack.layout import LayerLayout, Layout
from moepack.layouts import layer_layout, mixed_layout
from moepack.plan import LayerPlacement, Placement
from moepack.trace import ROUTING_PARTS
from tests.planning.test_replay import (
    by_hand,
    check,
    drawn_placement,
    drawn_setting,
    replayed,
)
from tests.planning.test_tier_replay import disks, replayer, with_ram
from tests.support.mixed import with_slots
from tests.support.routed import Setting
from tests.support.tier_walk import TierWalk
from tests.support.walk import first_token_s, walk

NAMES = ("BF16", "INT8", "INT4_G32", "INT4_G64")


def with_quantised(compute: ComputeProfile, random: Random) -> ComputeProfile:
    """Times of experts in every encoding, in the order of milliseconds."""

    def curve() -> Curve:
        one, slope = 1e-3 * random.random(), 1e-3 * random.random()
        return Curve((1, 4, 16), (one, one + slope, one + 3 * slope))

    layers = tuple(
        dataclasses.replace(
            entry,
            quantised=tuple(QuantisedExpert(name, curve(), curve()) for name in NAMES[1:]),
        )
        for entry in compute.layers
    )
    return dataclasses.replace(compute, layers=layers)


def drawn(data: st.DataObject, *, one_part: bool = False) -> tuple[Setting, Layout, Placement]:
    """Like those of layers that are not mixed, of which some are then."""
    setting = drawn_setting(data, alike=False, one_part=one_part)
    layout, placement = drawn_placement(data, setting, pooled=False)
    random = Random(data.draw(st.integers(0, 2**32 - 1)))
    setting = dataclasses.replace(setting, compute=with_quantised(setting.compute, random))
    pairs = [
        re_encoded(setting, cut, place, random)
        for cut, place in zip(layout.layers, placement.layers, strict=True)
    ]
    cuts, layers = (tuple(each) for each in zip(*pairs, strict=True))
    layout = dataclasses.replace(layout, layers=cuts)
    return setting, layout, dataclasses.replace(placement, layers=layers)


def re_encoded(
    setting: Setting, cut: LayerLayout, place: LayerPlacement, random: Random
) -> tuple[LayerLayout, LayerPlacement]:
    """Most layers of whole experts mixed, and of the others some in one quantised encoding."""
    spec, experts = setting.spec, len(place.hot)
    if cut.split in (0, cut.width) and random.random() < 0.8:
        names = random.choices(NAMES, k=experts)
        mixed = mixed_layout(spec, cut.layer, names, split=cut.split)
        sizes = mixed.class_sizes(experts).values()
        return mixed, with_slots(mixed, place, [random.randint(0, size) for size in sizes])
    if random.random() < 0.5:
        return layer_layout(spec, cut.layer, cut.split_ratio, "INT8"), place
    return cut, place


@pytest.mark.parametrize("perfect", [False, True])
@given(data=st.data())
def test_decoding_takes_what_a_walk_over_every_token_takes(
    perfect: bool, data: st.DataObject
) -> None:
    """Every expert fetched and computed in its own encoding, and held by its own."""
    setting, layout, placement = drawn(data)
    part = data.draw(st.sampled_from(ROUTING_PARTS))
    if not len(setting.tables.tokens(part)):
        return
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


@pytest.mark.parametrize("perfect", [False, True])
@given(data=st.data())
def test_a_prompt_takes_what_a_walk_through_its_layers_takes(
    perfect: bool, data: st.DataObject
) -> None:
    setting, layout, placement = drawn(data, one_part=True)
    tokens = range(len(setting.tables.trace.ids))
    found = replayed(
        setting,
        layout,
        placement,
        oracle="prediction" if perfect else "none",
        prompt_tokens=len(tokens),
    )
    expected_s = first_token_s(setting, layout, placement, tokens, perfect=perfect)
    assert found.ttft_s == pytest.approx(expected_s)


@given(data=st.data(), disk=disks(), share=st.sampled_from([0.0, 0.4, 0.8]))
def test_over_three_tiers_it_takes_what_a_walk_takes(
    data: st.DataObject, disk: LinkSeconds, share: float
) -> None:
    """RAM holds the hottest experts, each as large as its encoding makes it."""
    setting, layout, placement = drawn(data)
    layers = tuple(
        dataclasses.replace(place, prefetch="off", prefetch_depth=0) for place in placement.layers
    )
    placement = dataclasses.replace(placement, layers=layers)
    part = data.draw(st.sampled_from(ROUTING_PARTS))
    if not len(setting.tables.tokens(part)):
        return
    placement = with_ram(setting, layout, placement, share)
    found = replayer(setting, disk, part).replay(layout, placement, as_ready=True)
    walked = TierWalk(setting, layout, placement, disk).decode(part, as_ready=True)
    each = walked.tokens
    assert found.tpot_s == pytest.approx(walked.seconds / each)
    for name in ("demand_bytes", "disk_bytes", "disk_s"):
        assert getattr(found, name) == pytest.approx(getattr(walked, name) / each), name


def test_what_knows_the_future_is_not_asked_of_mixed_layers() -> None:
    setting, layout, placement = by_hand(slots=2)
    shape = setting.tables.layers[0]
    names = ["INT8"] + ["BF16"] * (shape.num_experts - 1)
    mixed = mixed_layout(setting.spec, shape.layer, names)
    layout = dataclasses.replace(layout, layers=(mixed, *layout.layers[1:]))
    first = with_slots(mixed, placement.layers[0], [2, 0])
    placement = dataclasses.replace(placement, layers=(first, *placement.layers[1:]))
    compute = with_quantised(setting.compute, Random(0))
    setting = dataclasses.replace(setting, compute=compute)
    with pytest.raises(PlanMismatchError, match="expected layers of one encoding"):
        replayed(setting, layout, placement, oracle="future")
