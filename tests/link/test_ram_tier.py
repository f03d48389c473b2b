"""What RAM holds of a device's slow tier, by hand on a model whose experts are all alike."""

from __future__ import annotations

import dataclasses

import pytest
from moepack_runtime import loading

from moepack import machine
from moepack.budget import slow_bytes, stored_bytes
from moepack.errors import BudgetTooSmallError
from moepack.layout import Layout
from moepack.plan import LayerPlacement, Placement
from moepack.ram_tier import RamTier, ram_tier
from tests.pack.fake_models import make_plan, make_spec

SPEC = make_spec(experts=4, moe_layers=2)
PLAN = make_plan(SPEC, [48, 48])  # all top: one segment an expert
HOT = [(2, 0, 1, 3), (1, 3, 2, 0)]
LAYERS = tuple(
    dataclasses.replace(placed, hot=hot)
    for placed, hot in zip(PLAN.placement.layers, HOT, strict=True)
)
SIZE_BYTES = stored_bytes(SPEC, PLAN.layout.layers[0], "top")
BOUNCES = 2
ALL_BYTES = slow_bytes(SPEC, PLAN.layout)


def named(tier: RamTier) -> list[tuple[int, int]]:
    return [(segment.layer, segment.expert) for segment in tier.held]


def held(count: int, layers: tuple[LayerPlacement, ...] = LAYERS) -> list[tuple[int, int]]:
    """With room for so many beside the bounces."""
    tier = ram_tier(SPEC, PLAN.layout, layers, (BOUNCES + count) * SIZE_BYTES)
    assert tier.bounce_bytes == SIZE_BYTES
    assert tier.total_bytes == (BOUNCES + count) * SIZE_BYTES
    return named(tier)


def test_everything_is_held_where_there_is_room_and_then_nothing_bounces() -> None:
    tier = ram_tier(SPEC, PLAN.layout, LAYERS, ALL_BYTES)
    assert len(tier.held) == 8
    assert tier.total_bytes == ALL_BYTES
    assert tier.bounce_bytes == 0


def test_one_byte_less_costs_the_bounces() -> None:
    tier = ram_tier(SPEC, PLAN.layout, LAYERS, ALL_BYTES - 1)
    assert len(tier.held) == 8 - 1 - BOUNCES
    assert tier.total_bytes <= ALL_BYTES - 1


def test_the_hottest_of_each_layer_in_turn() -> None:
    assert held(0) == []
    assert held(3) == [(1, 2), (2, 1), (1, 0)]
    assert held(5) == [(1, 2), (2, 1), (1, 0), (2, 3), (1, 1)]


def test_more_ram_never_holds_less() -> None:
    before: set[tuple[int, int]] = set()
    for ram_bytes in range(0, ALL_BYTES + SIZE_BYTES, SIZE_BYTES // 2):
        now = set(named(ram_tier(SPEC, PLAN.layout, LAYERS, ram_bytes)))
        assert now >= before
        before = now


def test_what_never_leaves_the_device_is_held_last() -> None:
    pinned = dataclasses.replace(LAYERS[0], policy="pinned", top_slots=2)
    assert held(4, (pinned, LAYERS[1])) == [(2, 1), (2, 3), (1, 1), (2, 2)]
    tier = ram_tier(SPEC, PLAN.layout, (pinned, LAYERS[1]), ALL_BYTES)
    assert named(tier)[-2:] == [(1, 2), (1, 0)]


def test_both_parts_of_a_hot_expert_are_held() -> None:
    plan = make_plan(SPEC, [16, 16])
    top, bottom = (stored_bytes(SPEC, plan.layout.layers[0], part) for part in ("top", "bottom"))
    room_bytes = BOUNCES * max(top, bottom) + 2 * (top + bottom)
    tier = ram_tier(SPEC, plan.layout, LAYERS, room_bytes)
    assert [(s.layer, s.expert, s.part) for s in tier.held] == [
        (1, 2, "top"),
        (1, 2, "bottom"),
        (2, 1, "top"),
        (2, 1, "bottom"),
    ]


def test_there_are_as_many_bounces_as_the_disk_likes_readers() -> None:
    tier = ram_tier(SPEC, PLAN.layout, LAYERS, 6 * SIZE_BYTES, readers=4)
    assert tier.bounces == 4
    assert len(tier.held) == 2
    assert ram_tier(SPEC, PLAN.layout, LAYERS, ALL_BYTES, readers=4).bounces == 0


def on_device(ram_budget_bytes: int) -> tuple[Layout, Placement]:
    placement = dataclasses.replace(
        PLAN.placement,
        device="cuda",
        layers=LAYERS,
        ram_budget_bytes=ram_budget_bytes,
        readers=1,
    )
    return PLAN.layout, placement


def test_loading_holds_what_the_ram_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ram_bytes", lambda: 1 << 40)
    base_bytes = 1 << 20
    layout, placement = on_device(base_bytes + 5 * SIZE_BYTES)
    tier = loading.require_host_memory(SPEC, layout, placement, base_bytes)
    assert tier is not None
    assert named(tier) == [(1, 2), (2, 1), (1, 0)]
    monkeypatch.setattr(machine, "ram_bytes", lambda: base_bytes + 4 * SIZE_BYTES)
    tier = loading.require_host_memory(SPEC, layout, placement, base_bytes)
    assert tier is not None
    assert named(tier) == [(1, 2), (2, 1)]


def test_loading_refuses_what_cannot_even_bounce() -> None:
    base_bytes = 1 << 20
    layout, placement = on_device(base_bytes + BOUNCES * SIZE_BYTES - 1)
    with pytest.raises(BudgetTooSmallError, match="1 bytes are missing") as caught:
        loading.require_host_memory(SPEC, layout, placement, base_bytes)
    assert caught.value.missing_bytes == 1
