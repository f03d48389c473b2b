"""What the engine refuses before it allocates anything, and what it can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from moepack_runtime.capabilities import (
    CAPABILITIES,
    require_capable,
    require_encodings,
    require_fit,
)
from moepack_runtime.loading import open_packed

from moepack.checkpoint import Checkpoint
from moepack.errors import BudgetTooSmallError, CapabilityError, PlanMismatchError
from moepack.formats import PackedModel
from moepack.layout import Layout
from moepack.pack import pack
from moepack.plan import EngineCapabilities, Placement, SharedPool
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement

#: One that can do less than any of ours.
LESSER = EngineCapabilities(policies=("lru",), devices=("cpu",))


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


def place_all(checkpoint: Checkpoint, layout: Layout, **changes: Any) -> Placement:
    options: dict[str, Any] = {"tops": 2, "bottoms": 0, "staging": 2} | changes
    return placement(checkpoint.spec, layout, **options)


def pooled(checkpoint: Checkpoint, layout: Layout, slots: int) -> Placement:
    return place_all(checkpoint, layout, tops=0, pool=SharedPool(slots, "lcp"))


def test_every_policy_and_the_pool_are_there_and_nothing_is_fetched_ahead() -> None:
    assert set(CAPABILITIES.policies) == {"lru", "lfu", "lcp", "lfu_decay", "pinned"}
    assert CAPABILITIES.shared_pool
    assert CAPABILITIES.as_ready
    assert set(CAPABILITIES.prefetch) == {"off", "bottoms", "all"}


def test_a_layout_is_refused_in_an_encoding_that_the_engine_does_not_compute_with(
    checkpoint: Checkpoint,
) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,), encodings=(None, "INT8"))
    require_encodings(layout)
    with pytest.raises(CapabilityError, match=r"layer 1 holds its experts as 'INT8'; .* BF16;"):
        require_encodings(layout, LESSER)
    later = dataclasses.replace(layout.layers[0], encoding="INT2_G16")
    place = place_all(checkpoint, layout)
    with pytest.raises(CapabilityError, match="layer 0 holds its experts as 'INT2_G16'"):
        require_fit(
            checkpoint.spec,
            dataclasses.replace(layout, layers=(later, *layout.layers[1:])),
            place,
        )


def test_a_layer_whose_experts_are_stored_in_several_encodings_may_be_refused(
    checkpoint: Checkpoint,
) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,), encodings=("INT8",))
    first = layout.layers[0]
    mixed = dataclasses.replace(first, encodings=("INT4_G32", *["INT8"] * 15))
    layout = dataclasses.replace(layout, layers=(mixed, *layout.layers[1:]))
    require_encodings(layout)
    lesser = dataclasses.replace(CAPABILITIES, mixed_layers=False)
    with pytest.raises(CapabilityError, match="layer 0 holds its experts as INT8 and INT4_G32"):
        require_encodings(layout, lesser)


def test_a_plan_that_does_not_fit_is_refused_with_the_missing_bytes(
    checkpoint: Checkpoint,
) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = place_all(checkpoint, layout)
    short = dataclasses.replace(place, fast_budget_bytes=place.fast_budget_bytes - 4321)
    with pytest.raises(BudgetTooSmallError, match="4321 bytes are missing") as caught:
        require_fit(checkpoint.spec, layout, short)
    assert caught.value.missing_bytes == 4321


def test_a_plan_for_other_bytes_is_refused(checkpoint: Checkpoint) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = place_all(checkpoint, layout)
    lying = dataclasses.replace(place.memory, kv_bytes=place.memory.kv_bytes - 2)
    with pytest.raises(PlanMismatchError, match="plan again"):
        require_fit(checkpoint.spec, layout, dataclasses.replace(place, memory=lying))


def test_a_plan_that_ranks_other_experts_is_refused(checkpoint: Checkpoint) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = place_all(checkpoint, layout)
    short = dataclasses.replace(place.layers[1], hot=(1, 0, 2))
    layers = (place.layers[0], short, *place.layers[2:])
    with pytest.raises(PlanMismatchError, match="ranks 3 experts of layer 1, the model has 16"):
        require_fit(checkpoint.spec, layout, dataclasses.replace(place, layers=layers))


def test_fetching_ahead_is_refused_where_an_engine_does_not(checkpoint: Checkpoint) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = place_all(checkpoint, layout)
    ahead = tuple(
        dataclasses.replace(layer, prefetch="all", prefetch_depth=4) for layer in place.layers
    )
    require_fit(checkpoint.spec, layout, dataclasses.replace(place, layers=ahead))
    with pytest.raises(CapabilityError, match=r"layer 0 wants 4 experts fetched ahead .*'all'"):
        require_capable(dataclasses.replace(place, layers=ahead), LESSER)
    bottoms = EngineCapabilities(("lru",), ("cpu",), ("off", "bottoms"), max_prefetch_depth=4)
    with pytest.raises(CapabilityError, match="engine has off, bottoms"):
        require_capable(dataclasses.replace(place, layers=ahead), bottoms)
    deeper = dataclasses.replace(ahead[0], prefetch="bottoms", prefetch_depth=5)
    with pytest.raises(CapabilityError, match="5 experts fetched ahead"):
        require_capable(dataclasses.replace(place, layers=(deeper, *place.layers[1:])), bottoms)


def test_policies_and_pools_that_an_engine_lacks_are_refused(checkpoint: Checkpoint) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    with pytest.raises(CapabilityError, match="layer 0 wants the policy 'lfu'"):
        require_capable(place_all(checkpoint, layout, policy="lfu"), LESSER)
    place = pooled(checkpoint, layout, 5)
    with pytest.raises(CapabilityError, match="5 slots that all layers share"):
        require_capable(place, LESSER)
    with pytest.raises(CapabilityError, match="the shared pool wants the policy 'lcp'"):
        require_capable(place, dataclasses.replace(LESSER, shared_pool=True))


def test_a_pool_holds_whole_experts_of_one_size_and_no_more_than_there_are(
    checkpoint: Checkpoint,
) -> None:
    spec = checkpoint.spec
    whole = mixed_layout(spec, (1.0,))
    require_fit(spec, whole, pooled(checkpoint, whole, 5))
    for ratio in (0.5, 0.0):
        cut = mixed_layout(spec, (1.0, ratio))
        with pytest.raises(PlanMismatchError, match="layer 1 is cut at"):
            require_fit(spec, cut, pooled(checkpoint, cut, 5))
    narrow = dataclasses.replace(whole.layers[2], encoding="BF16")
    unlike = dataclasses.replace(whole, layers=(*whole.layers[:2], narrow, *whole.layers[3:]))
    with pytest.raises(PlanMismatchError, match="slots of one size, and an expert of layer 2"):
        require_fit(spec, unlike, pooled(checkpoint, unlike, 5))
    experts = sum(spec.moe(number).num_experts for number in spec.moe_layers)
    require_fit(spec, whole, pooled(checkpoint, whole, experts))
    with pytest.raises(PlanMismatchError, match=f"among {experts} experts"):
        require_fit(spec, whole, pooled(checkpoint, whole, experts + 1))


def test_a_pool_takes_what_was_planned_for_it(checkpoint: Checkpoint) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = pooled(checkpoint, layout, 7)
    with open_engine(checkpoint, layout, place) as engine:
        assert engine.link.reads == 7
        memory = place.memory
        assert engine._experts.allocated_bytes == memory.slots_bytes + memory.staging_bytes
        assert engine.stats().peak_fast_bytes == memory.total_bytes


def test_a_plan_for_another_engine_is_packed_but_not_run(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    plan = plan_for(checkpoint.spec, layout, place_all(checkpoint, layout))
    assumed = dataclasses.replace(plan, assumed_engine=True)
    out = tmp_path / "pack"
    pack(checkpoint, assumed, out)
    packed = PackedModel.open(out)
    assert packed.plan().assumed_engine
    with pytest.raises(CapabilityError, match="plan again without --assume-engine"):
        open_packed(packed, assumed)
    with open_packed(packed, plan) as engine:
        assert engine.length == 0
