"""Replays over three tiers against a plain walk over every token, and beside those of two."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.budget import slow_bytes
from moepack.cost import LinkSeconds
from moepack.errors import ProfileError
from moepack.layout import Layout
from moepack.plan import Placement
from moepack.ram_tier import host_tier
from moepack.replay import Replayer
from moepack.trace import ROUTING_PARTS, RoutingPart
from tests.planning.test_replay import by_hand, drawn_placement, drawn_setting
from tests.support.routed import Setting
from tests.support.tier_walk import TierWalk


def with_ram(setting: Setting, layout: Layout, placement: Placement, share: float) -> Placement:
    """RAM that holds about so much of the experts, beside the bounces."""
    none = host_tier(setting.spec, layout, placement.layers, 0, placement.readers)
    bounces = none.bounces * none.bounce_bytes
    pinned_bytes = bounces + int(share * slow_bytes(setting.spec, layout))
    host = host_tier(setting.spec, layout, placement.layers, pinned_bytes, placement.readers)
    return dataclasses.replace(placement, host=host)


def replayer(
    setting: Setting, disk: LinkSeconds | None, part: RoutingPart, prompt_tokens: int = 1
) -> Replayer:
    return Replayer(
        setting.spec,
        setting.compute,
        setting.tables,
        setting.link,
        prompt_tokens=prompt_tokens,
        part=part,
        disk=disk,
    )


@st.composite
def disks(draw: st.DrawFn) -> LinkSeconds:
    latency_s = draw(st.floats(0.0, 1e-3))
    rate = 10 ** draw(st.floats(6.5, 9.0))
    return lambda size: latency_s + size / rate


@given(data=st.data(), disk=disks(), share=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
def test_decoding_takes_what_a_walk_over_every_token_takes(
    data: st.DataObject, disk: LinkSeconds, share: float
) -> None:
    setting = drawn_setting(data, alike=False)
    part = data.draw(st.sampled_from(ROUTING_PARTS))
    if not len(setting.tables.tokens(part)):
        return
    layout, placement = drawn_placement(data, setting, pooled=False)
    placement = with_ram(setting, layout, placement, share)
    as_ready = data.draw(st.booleans())
    if not as_ready:  # in order, frames have to be left for what nobody guessed
        placement = dataclasses.replace(placement, staging_experts=16)
    found = replayer(setting, disk, part).replay(layout, placement, as_ready=as_ready)
    walked = TierWalk(setting, layout, placement, disk).decode(part, as_ready=as_ready)
    assert found.tpot_s == pytest.approx(walked.seconds / walked.tokens)
    for name in ("demand_bytes", "ahead_used_bytes", "ahead_wasted_bytes", "disk_bytes", "disk_s"):
        assert getattr(found, name) == pytest.approx(getattr(walked, name) / walked.tokens), name


@given(data=st.data(), disk=disks(), share=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
def test_a_prompt_takes_what_a_walk_through_its_layers_takes(
    data: st.DataObject, disk: LinkSeconds, share: float
) -> None:
    setting = drawn_setting(data, alike=False, one_part=True)
    tokens = range(len(setting.tables.trace.ids))
    layout, placement = drawn_placement(data, setting, pooled=False)
    placement = with_ram(setting, layout, placement, share)
    found = replayer(setting, disk, "test", len(tokens)).replay(layout, placement, as_ready=True)
    expected_s = TierWalk(setting, layout, placement, disk).first_token_s(tokens)
    assert found.ttft_s == pytest.approx(expected_s)


@given(data=st.data(), as_ready=st.booleans())
def test_ram_that_holds_everything_is_two_tiers_to_the_last_digit(
    data: st.DataObject, as_ready: bool
) -> None:
    setting = drawn_setting(data, alike=False, one_part=True)
    layout, placement = drawn_placement(data, setting, pooled=False)
    two = replayer(setting, None, "test").replay(layout, placement, as_ready=as_ready)
    ample = with_ram(setting, layout, placement, 1.0)
    assert ample.host is not None
    assert set(ample.host.shares) == {1.0}
    three = replayer(setting, lambda _: 1.0, "test").replay(layout, ample, as_ready=as_ready)
    for name in two._fields:
        assert np.array_equal(getattr(three, name), getattr(two, name)), name


def test_a_disk_that_was_not_measured_is_named() -> None:
    setting, layout, placement = by_hand(slots=1)
    little = with_ram(setting, layout, placement, 0.3)
    with pytest.raises(ProfileError, match="run moepack profile --hardware-only"):
        replayer(setting, None, "fit").replay(layout, little, as_ready=True)
