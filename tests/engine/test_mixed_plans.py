"""Plans whose experts differ in precision: they fit, cannot lose, and are executed as planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from moepack_runtime.capabilities import CAPABILITIES, require_fit
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.store import PackStore

from moepack.budget import placement_memory, slow_bytes, stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.damage import DamageProfile, LayerDamage
from moepack.errors import BudgetTooSmallError, CapabilityError
from moepack.layouts import uniform_layout
from moepack.mixed_precision import at_mean_bits, uniform_precision
from moepack.pack import pack
from moepack.plan import Plan
from moepack.plan_request import PlanRequest, require_budget
from moepack.planner import Planner, rungs_below
from moepack.predicted_quality import predicted_quality
from moepack.ram_tier import ram_tier
from moepack.roofline import derive_compute
from moepack.routing import RoutingProfile
from moepack.strategies import FULL_ENGINE, Strategies
from moepack.units import KIB
from moepack.variants import contender_of
from tests.conftest import TinyFolder
from tests.engine.test_mixed_layers import (
    FOLLOWING,
    PROMPT,
    DequantisedByExpert,
    everything,
    held_bytes,
    resident,
)
from tests.planning.test_tier_plans import card, with_room
from tests.support.damages import damage_profile
from tests.support.engines import all_logits, open_engine
from tests.support.mixed import encodings_drawn
from tests.support.plan_requests import drawn_routing, plan_request

NAMES = (("F32", "INT8", "INT4_G32"), ("INT8", "INT4_G32"), ("INT8",))


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    """8 experts, of which a token uses 2, in each of 3 layers."""
    return Checkpoint.open(tiny_folder("mixtral", "plain"))


@pytest.fixture(scope="module")
def routing(checkpoint: Checkpoint) -> RoutingProfile:
    return drawn_routing(checkpoint.spec)


@pytest.fixture(scope="module")
def asked(checkpoint: Checkpoint, routing: RoutingProfile) -> PlanRequest:
    """Two layers whose experts differ, and one whose experts are all INT8."""
    random = Random(4)
    return plan_request(
        checkpoint.spec,
        routing,
        engine=CAPABILITIES,
        by_expert=tuple(tuple(encodings_drawn(8, names, random)) for names in NAMES),
    )


@pytest.fixture(scope="module")
def planner(asked: PlanRequest) -> Planner:
    return Planner(asked)


def budget_of(asked: PlanRequest, slots_bytes: int) -> int:
    """The least that works, and so much beside it."""
    with pytest.raises(BudgetTooSmallError) as caught:
        require_budget(dataclasses.replace(asked, fast_budget_bytes=1))
    return 1 + caught.value.missing_bytes + slots_bytes


@pytest.fixture(scope="module", params=[0, 60 * KIB, 300 * KIB, 800 * KIB])
def made(request: pytest.FixtureRequest, asked: PlanRequest, planner: Planner) -> Plan:
    return planner.plan(budget_of(asked, request.param))


def test_a_plan_fits_its_budget_to_the_byte(checkpoint: Checkpoint, made: Plan) -> None:
    spec, place = checkpoint.spec, made.placement
    require_fit(spec, made.layout, place)
    assert place.memory.total_bytes <= place.fast_budget_bytes
    assert place.memory == placement_memory(spec, made.layout, place)
    by_hand = 0
    for cut, layer in zip(made.layout.layers, place.layers, strict=True):
        if not cut.encodings:
            assert layer.class_slots == ()
            by_hand += layer.top_slots * stored_bytes(spec, cut, "top")
            by_hand += layer.bottom_slots * stored_bytes(spec, cut, "bottom")
            continue
        assert sum(layer.class_slots) == layer.top_slots + layer.bottom_slots
        for name, count in zip(cut.classes, layer.class_slots, strict=True):
            assert count <= cut.encodings.count(name)
            by_hand += count * stored_bytes(spec, cut, "top", name)
    assert by_hand == place.memory.slots_bytes


def test_experts_are_stored_as_asked_and_layers_of_one_encoding_may_be_cut(
    asked: PlanRequest, planner: Planner
) -> None:
    slow = dataclasses.replace(asked, link=(2e7, 0.0))
    layout = Planner(slow, planner.tables).plan(budget_of(asked, 100 * KIB)).layout
    for cut, names in zip(layout.layers, asked.by_expert, strict=True):
        assert tuple(map(cut.encoding_of, range(8))) == names
    *mixed, last = layout.layers
    assert last.encodings == ()
    assert 0 < last.split < last.width
    assert all(cut.encodings and cut.split == cut.width for cut in mixed)


def test_a_plan_cannot_lose_on_what_it_was_chosen_by(made: Plan, planner: Planner) -> None:
    """Against every strategy at its budget, as far as this engine runs them."""
    budget_bytes = made.placement.fast_budget_bytes
    request = dataclasses.replace(planner.request, fast_budget_bytes=budget_bytes)
    mine = planner.total_s(planner.price(contender_of(request, made), "select"))
    rivals = [each for each in Strategies(request, planner.tables).all() if not each.why_not]
    assert len(rivals) >= 4
    for each in rivals:
        assert mine <= planner.total_s(planner.price(each, "select")) * (1 + 1e-12), each.name
        assert each.placement.memory.total_bytes <= budget_bytes or each.name == "resident"


def test_more_memory_never_makes_a_plan_slower(asked: PlanRequest, planner: Planner) -> None:
    least = budget_of(asked, 0)
    rungs = [rung for rung in rungs_below(2 * least) if rung >= least]
    times = []
    for rung in sorted(rungs):
        plan = planner.plan(rung)
        request = dataclasses.replace(asked, fast_budget_bytes=rung)
        times.append(planner.total_s(planner.price(contender_of(request, plan), "select")))
    assert len(times) > 1
    assert times == sorted(times, reverse=True)


def test_what_a_plan_computes_is_what_every_expert_in_its_encoding_computes(
    checkpoint: Checkpoint, made: Plan, tmp_path: Path
) -> None:
    """From a pack, to the bit as with everything resident; and the dequantised model's numbers."""
    spec = checkpoint.spec
    layout = dataclasses.replace(made.layout, prefill_block_tokens=8)
    pack(checkpoint, dataclasses.replace(made, layout=layout), tmp_path / "pack")
    place = made.placement
    place = dataclasses.replace(place, memory=placement_memory(spec, layout, place))
    with open_engine(checkpoint, layout, place, store=PackStore.open(tmp_path / "pack")) as engine:
        found = all_logits(engine, PROMPT, FOLLOWING)
        assert held_bytes(engine) <= place.memory.slots_bytes + place.memory.staging_bytes
    whole = everything(spec, layout)
    with open_engine(checkpoint, layout, whole) as engine:
        assert torch.equal(found, all_logits(engine, PROMPT, FOLLOWING))
    plain = dataclasses.replace(uniform_layout(spec, 1.0), prefill_block_tokens=8)
    source = DequantisedByExpert(checkpoint, layout)
    expected = resident(checkpoint, plain, CheckpointStore(source, spec, plain))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_pack_of_a_mixed_plan_can_be_kept(
    checkpoint: Checkpoint, asked: PlanRequest, made: Plan
) -> None:
    budget_bytes = made.placement.fast_budget_bytes + 50 * KIB
    kept = dataclasses.replace(asked, by_expert=(), keep_layout=made.layout)
    again = Planner(kept).plan(budget_bytes)
    assert again.layout == made.layout
    assert again.placement.memory.total_bytes <= budget_bytes
    require_fit(checkpoint.spec, again.layout, again.placement)
    mixed = [
        place
        for cut, place in zip(again.layout.layers, again.placement.layers, strict=True)
        if cut.encodings
    ]
    assert all(len(place.class_slots) > 1 for place in mixed)


def test_engines_that_want_layers_alike_are_not_planned_for(asked: PlanRequest) -> None:
    engine = dataclasses.replace(CAPABILITIES, mixed_layers=False)
    with pytest.raises(CapabilityError, match="experts of one layer in several encodings"):
        Planner(dataclasses.replace(asked, engine=engine))


def test_a_shared_pool_and_one_cut_for_all_are_not_considered(
    asked: PlanRequest, made: Plan
) -> None:
    assert asked.is_mixed
    assert made.placement.pool is None
    assert {"pooled", "uniform_half", "moepic", "belady"}.isdisjoint(made.baselines)
    assert {"on_demand", "lru", "resident"} <= made.baselines.keys()


def test_ram_that_is_too_small_is_planned_for_with_every_experts_own_bytes(
    asked: PlanRequest, planner: Planner
) -> None:
    """Behind a card with a slow bus and a slower disk, experts fetched ahead as well."""
    hardware = card()
    made = dataclasses.replace(
        asked,
        hardware=hardware,
        device=hardware.device,
        compute=derive_compute(asked.spec, hardware),
        engine=FULL_ENGINE,
    )
    layout = made.whole_layout
    everything_bytes = slow_bytes(made.spec, layout)
    largest = max(stored_bytes(made.spec, cut, "top") for cut in layout.layers)
    room = everything_bytes // 2 + hardware.disk.readers_for(largest) * largest
    made = with_room(made, room)
    budget_bytes = budget_of(made, everything_bytes // 4)
    plan = Planner(made, planner.tables).plan(budget_bytes)
    host = plan.placement.host
    assert host is not None
    assert host.bounces
    assert hardware.process_base_bytes + host.total_bytes <= (made.ram_budget_bytes or 0)
    tier = ram_tier(
        made.spec,
        plan.layout,
        plan.placement.layers,
        host.pinned_bytes,
        readers=plan.placement.readers,
    )
    assert sum(tier.held.values()) == host.held_bytes
    assert 0 < plan.prediction.disk_bytes_per_token < plan.prediction.link_bytes_per_token
    assert plan.placement.memory.total_bytes <= budget_bytes


def damage_of(checkpoint: Checkpoint) -> DamageProfile:
    """Experts that differ; in F32 nothing is lost."""
    rng, spec = np.random.default_rng(2), checkpoint.spec
    layers = []
    for number in spec.moe_layers:
        coarse = rng.lognormal(0, 1, spec.moe(number).num_experts)
        rows = tuple(tuple((coarse * share).tolist()) for share in (0.01, 1.0))
        layers.append(LayerDamage(number, ("INT8", "INT4_G32"), rows, 0.1, 0.001, 0.01))
    return damage_profile(
        spec,
        layers,
        fine_divergence=0.0015,
        coarse_divergence=0.03,
    )


def test_what_is_predicted_of_a_layout_is_what_it_was_chosen_by(
    checkpoint: Checkpoint, asked: PlanRequest
) -> None:
    """Less than had the bits been drawn, and more than uniform precision of more bytes."""
    spec, damage = checkpoint.spec, damage_of(checkpoint)
    chosen = at_mean_bits(spec, damage, 6.5)
    layout = dataclasses.replace(asked, by_expert=chosen.encodings).whole_layout
    found = predicted_quality(spec, damage, layout)
    assert found is not None
    assert found.divergence == pytest.approx(chosen.divergence)
    assert found.perplexity_ratio == pytest.approx(chosen.perplexity_ratio)
    assert found.mean_bits == pytest.approx(chosen.mean_bits)
    bits = [each.mean_bits for each in found.uniform]
    assert bits == sorted(bits)
    assert [each.encoding for each in found.uniform] == ["INT4_G32", "INT8", "F32"]
    coarse, fine, exact = found.uniform
    assert exact.divergence == 0
    assert fine.divergence < found.divergence < found.at_random_divergence < coarse.divergence
    share = (found.mean_bits - coarse.mean_bits) / (fine.mean_bits - coarse.mean_bits)
    drawn = coarse.divergence + share * (fine.divergence - coarse.divergence)
    assert found.at_random_divergence == pytest.approx(drawn)
    uniform = dataclasses.replace(asked, by_expert=(), encoding="INT8").whole_layout
    alike = predicted_quality(spec, damage, uniform)
    assert alike is not None
    expected = uniform_precision(spec, damage, "INT8").divergence
    assert alike.divergence == alike.at_random_divergence == pytest.approx(expected)
