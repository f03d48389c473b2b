"""Plans fit, cannot lose, refuse by name, and survive their file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepack_runtime.capabilities import CAPABILITIES

from moepack import records
from moepack.budget import placement_memory
from moepack.checkpoint import Checkpoint
from moepack.errors import BudgetTooSmallError, PlanError, PlanMismatchError, ProfileError
from moepack.hardware import find_hardware
from moepack.layouts import uniform_layout
from moepack.model_spec import ModelSpec
from moepack.optimised import Optimised
from moepack.plan import EngineCapabilities, Plan, load_plan
from moepack.plan_request import PlanRequest
from moepack.planner import Planner, make_plan, rungs_below
from moepack.roofline import derive_compute
from moepack.routing import RoutingProfile, load_routing
from moepack.routing_tables import RoutingTables
from moepack.strategies import FULL_ENGINE, Contender, Strategies
from moepack.units import GIB, KIB, MIB, parse_size
from tests.conftest import TinyFolder
from tests.support.plan_requests import drawn_routing, plan_request

STRATEGIES = (
    "on_demand",
    "lru",
    "lfu",
    "lcp",
    "prefetch_only",
    "lru_prefetch",
    "lcp_prefetch",
    "uniform_half",
    "mixtral_offloading",
    "pregated",
    "adapmoe",
    "moe_infinity",
    "pooled",
    "moepic",
    "belady",
    "resident",
)


@pytest.fixture(scope="module")
def spec(tiny_folder: TinyFolder) -> ModelSpec:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec


@pytest.fixture(scope="module")
def routing(spec: ModelSpec) -> RoutingProfile:
    return drawn_routing(spec)


def request(spec: ModelSpec, routing: RoutingProfile, **changes: object) -> PlanRequest:
    """For the engine that is here."""
    return plan_request(spec, routing, **{"engine": CAPABILITIES, **changes})


def full(spec: ModelSpec, routing: RoutingProfile, **changes: object) -> PlanRequest:
    """For an engine that also fetches ahead."""
    return request(spec, routing, engine=FULL_ENGINE, assumed_engine=True, **changes)


def select_s(planner: Planner, plan: Plan) -> float:
    """What the plan was chosen by: its time on the part that decides."""
    contender = Contender(
        "plan", plan.layout, plan.placement, as_ready=planner.request.engine.as_ready
    )
    return planner.total_s(planner.price(contender, "select"))


def least_bytes(spec: ModelSpec, routing: RoutingProfile) -> int:
    with pytest.raises(BudgetTooSmallError) as caught:
        make_plan(request(spec, routing, fast_budget_bytes=1))
    return 1 + caught.value.missing_bytes


@given(spare_bytes=st.integers(0, 2 * MIB))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_plan_fits_its_budget_to_the_byte(
    spec: ModelSpec, routing: RoutingProfile, spare_bytes: int
) -> None:
    budget = least_bytes(spec, routing) + spare_bytes
    plan = make_plan(request(spec, routing, fast_budget_bytes=budget))
    place = plan.placement
    assert place.memory.total_bytes <= budget == place.fast_budget_bytes
    assert plan.prediction.fast_bytes == place.memory.total_bytes
    assert place.memory == placement_memory(spec, plan.layout, place)
    for cut, layer in zip(plan.layout.layers, place.layers, strict=True):
        experts = spec.moe(cut.layer).num_experts
        assert 0 <= layer.top_slots <= experts
        assert 0 <= layer.bottom_slots <= experts
        assert sorted(layer.hot) == list(range(experts))


def test_one_byte_less_than_the_least_is_refused_naming_it(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    least = least_bytes(spec, routing)
    make_plan(request(spec, routing, fast_budget_bytes=least))
    with pytest.raises(BudgetTooSmallError, match=r"\(1 bytes\) are missing") as caught:
        make_plan(request(spec, routing, fast_budget_bytes=least - 1))
    assert caught.value.missing_bytes == 1


def test_the_budget_that_a_refusal_names_is_enough(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        make_plan(request(spec, routing, fast_budget_bytes=1))
    named = re.search(r"set --vram to (\d+M) or more", str(caught.value))
    assert named is not None
    make_plan(request(spec, routing, fast_budget_bytes=parse_size(named[1])))


def test_the_largest_context_is_the_largest(spec: ModelSpec, routing: RoutingProfile) -> None:
    budget = least_bytes(spec, routing) + 40 * KIB
    plan = make_plan(request(spec, routing, fast_budget_bytes=budget))
    longest = plan.max_context_tokens
    assert 256 <= longest < spec.context_length
    make_plan(request(spec, routing, fast_budget_bytes=budget, context_tokens=longest))
    with pytest.raises(BudgetTooSmallError, match=f"--context to at most {longest}"):
        make_plan(request(spec, routing, fast_budget_bytes=budget, context_tokens=longest + 1))


def test_room_for_everything_leaves_nothing_to_fetch(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    plan = make_plan(request(spec, routing))
    assert plan.prediction.hit_rate == 1.0
    assert plan.prediction.ready_rate == 1.0
    assert plan.prediction.link_bytes_per_token == 0.0
    assert plan.baselines["resident"].eligible
    assert plan.prediction.tpot_s == pytest.approx(plan.baselines["resident"].tpot_s)


@pytest.mark.parametrize("make", [request, full])
def test_among_rungs_more_memory_is_never_slower(
    spec: ModelSpec, routing: RoutingProfile, make: Callable[..., PlanRequest]
) -> None:
    planner = Planner(make(spec, routing))
    least = least_bytes(spec, routing)
    rungs = sorted(rung for rung in rungs_below(4 * least) if rung >= least)
    assert len(rungs) > 2
    times_s = [select_s(planner, planner.plan(rung)) for rung in rungs]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(times_s))
    assert times_s[-1] < times_s[0]


def test_the_rungs_are_the_same_below_every_budget() -> None:
    assert list(rungs_below(100)) == [96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2]
    assert list(rungs_below(96)) == list(rungs_below(100))[1:]


@pytest.mark.parametrize("make", [request, full])
def test_a_slower_link_is_never_faster(
    spec: ModelSpec, routing: RoutingProfile, make: Callable[..., PlanRequest]
) -> None:
    budget = least_bytes(spec, routing) + 256 * KIB
    times_s = []
    for rate in (2e9, 2e8, 2e7, 2e6):
        planner = Planner(make(spec, routing, fast_budget_bytes=budget, link=(rate, 1e-4)))
        times_s.append(select_s(planner, planner.plan(budget)))
    assert all(slower >= 0.99 * faster for faster, slower in pairwise(times_s))
    assert times_s[-1] > times_s[0]


@pytest.mark.parametrize("make", [request, full])
@pytest.mark.parametrize("spare", [0, 100 * KIB, 400 * KIB, 900 * KIB])
def test_the_plan_loses_to_no_strategy_on_the_part_that_decides(
    spec: ModelSpec, routing: RoutingProfile, make: Callable[..., PlanRequest], spare: int
) -> None:
    budget = least_bytes(spec, routing) + spare
    planner = Planner(make(spec, routing, fast_budget_bytes=budget))
    made = planner.plan(budget)
    own_s = select_s(planner, made)
    for contender in Strategies(planner.request, planner.tables).all():
        if not contender.why_not:
            assert own_s <= planner.total_s(planner.price(contender, "select")), contender.name


def test_every_strategy_of_the_documentation_is_priced(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    budget = least_bytes(spec, routing) + 800 * KIB
    on_demand = EngineCapabilities(policies=("lru",), devices=("cpu",))
    here = make_plan(request(spec, routing, engine=on_demand, fast_budget_bytes=budget))
    there = make_plan(full(spec, routing, fast_budget_bytes=budget))
    names = set(STRATEGIES)
    assert set(here.baselines) == set(there.baselines) == names
    never = {"pregated", "belady", "resident"}
    assert {name for name, one in there.baselines.items() if not one.eligible} == never
    for name, one in here.baselines.items():
        assert one.eligible == (not one.why_not), name
    assert here.baselines["lru"].eligible
    assert "nothing ahead" in here.baselines["lru_prefetch"].why_not


def test_a_plan_asks_for_nothing_that_the_engine_lacks(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    budget = least_bytes(spec, routing) + 400 * KIB
    only = EngineCapabilities(policies=("lru",), devices=("cpu",))
    plan = make_plan(request(spec, routing, engine=only, fast_budget_bytes=budget))
    assert plan.placement.pool is None
    assert not plan.assumed_engine
    for place in plan.placement.layers:
        assert (place.policy, place.prefetch, place.prefetch_depth) == ("lru", "off", 0)
    assumed = make_plan(full(spec, routing, fast_budget_bytes=budget))
    assert assumed.assumed_engine
    assert any("will refuse" in line for line in assumed.provenance.assumptions)


def test_a_layer_whose_counts_decay_has_the_half_life_that_was_fitted_for_it(
    spec: ModelSpec, routing: RoutingProfile, tmp_path: Path
) -> None:
    only = EngineCapabilities(policies=("lfu_decay",), devices=("cpu",))
    asked = request(spec, routing, engine=only)
    tables = RoutingTables(routing)
    asked = dataclasses.replace(asked, fast_budget_bytes=least_bytes(spec, routing) + 400 * KIB)
    optimised = Optimised(asked, tables, asked.hardware.link_seconds)
    for contender in optimised.contenders(asked)[0]:
        for place, half_life in zip(contender.placement.layers, tables.half_lives, strict=True):
            assert (place.policy, place.half_life_tokens) == ("lfu_decay", half_life)
    plan = make_plan(asked)
    assert plan.planner.chosen == "optimised"
    path = tmp_path / "plan.json"
    path.write_text(records.encode(plan))
    assert load_plan(path) == plan
    data = records.to_data(plan)
    data["version"] = 2
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="version 2, this moepack reads 3; plan again"):
        load_plan(path)


def test_a_kept_layout_is_kept(spec: ModelSpec, routing: RoutingProfile) -> None:
    layout = uniform_layout(spec, 0.5, block_tokens=64)
    plan = make_plan(request(spec, routing, keep_layout=layout))
    assert plan.layout == layout


def test_what_was_assumed_is_said(spec: ModelSpec, routing: RoutingProfile) -> None:
    blind = make_plan(request(spec, routing, routing_is_assumed=True))
    assert any("drawn at random" in line for line in blind.provenance.assumptions)
    assert any("roofline" in line for line in blind.provenance.assumptions)
    seen = make_plan(request(spec, routing))
    assert not any("drawn at random" in line for line in seen.provenance.assumptions)
    assert blind.prediction.band >= seen.prediction.band > 1


def test_a_noisy_measurement_widens_the_band(spec: ModelSpec, routing: RoutingProfile) -> None:
    quiet = request(spec, routing)
    noisy = dataclasses.replace(quiet, compute=dataclasses.replace(quiet.compute, spread=0.5))
    wide, narrow = (make_plan(made).prediction.band for made in (noisy, quiet))
    assert wide == pytest.approx(1.5 * narrow)


def test_another_models_profile_is_refused(spec: ModelSpec, routing: RoutingProfile) -> None:
    other = dataclasses.replace(routing.summary, model_digest="f" * 64, model_name="other")
    with pytest.raises(PlanMismatchError, match="routing profile is of other"):
        make_plan(request(spec, dataclasses.replace(routing, summary=other)))


def test_the_host_must_hold_the_process_too(spec: ModelSpec, routing: RoutingProfile) -> None:
    with pytest.raises(BudgetTooSmallError, match="of host memory and the process itself"):
        make_plan(request(spec, routing, ram_budget_bytes=300 * KIB))


def test_a_preset_that_lacks_host_memory_is_planned_for_and_says_so(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    card = find_hardware("rtx-4090")
    small = dataclasses.replace(card, ram_bytes=card.process_base_bytes)
    changes: dict[str, object] = {
        "hardware": small,
        "compute": derive_compute(spec, small),
        "device": "cuda",
    }
    plan = make_plan(request(spec, routing, **changes))
    assert any("host memory that rtx-4090 lacks" in line for line in plan.provenance.assumptions)
    with pytest.raises(BudgetTooSmallError, match="of host memory and the process itself"):
        make_plan(request(spec, routing, hardware_is_this_machine=True, **changes))


def test_lengths_that_do_not_fit_the_context_are_refused(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    with pytest.raises(PlanMismatchError, match="exceed the context of 80"):
        make_plan(request(spec, routing, context_tokens=80))
    with pytest.raises(PlanMismatchError, match="made for at most"):
        make_plan(request(spec, routing, context_tokens=spec.context_length + 1))


def test_a_plan_survives_its_file(spec: ModelSpec, routing: RoutingProfile, tmp_path: Path) -> None:
    plan = make_plan(request(spec, routing, link=(1e9, 1e-4)))
    path = tmp_path / "plan.json"
    path.write_text(records.encode(plan))
    assert load_plan(path) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid json"),
        ("{", "invalid json"),
        ("[]", "the document: expected a map of version"),
        ('{"version": "one"}', "version"),
    ],
)
def test_garbage_is_no_plan(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        load_plan(path)
    with pytest.raises(PlanError, match="expected a plan made by"):
        load_plan(tmp_path / "absent.json")


def test_a_field_out_of_place_is_named(
    spec: ModelSpec, routing: RoutingProfile, tmp_path: Path
) -> None:
    plan: Plan = make_plan(request(spec, routing))
    data = records.to_data(plan)
    data["placement"]["layers"][1]["policy"] = "guess"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"placement\.layers\.1\.policy"):
        load_plan(path)


def test_a_routing_profile_survives_its_files_and_notices_a_strange_one(
    routing: RoutingProfile, tmp_path: Path
) -> None:
    routing.save(tmp_path)
    again = load_routing(tmp_path)
    assert again.summary == routing.summary
    assert np.array_equal(again.trace.ids, routing.trace.ids)
    blob = bytearray((tmp_path / "routing.npz").read_bytes())
    blob[100] ^= 1
    (tmp_path / "routing.npz").write_bytes(blob)
    with pytest.raises(ProfileError, match="do not belong together"):
        load_routing(tmp_path)
    (tmp_path / "routing.yaml").write_text("layers: [1, 2\n")
    with pytest.raises(ProfileError, match="not YAML"):
        load_routing(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("link",), [0.0, 0.0], "a link of 0.0 bytes/s"),
        (("placement", "staging_experts"), 0, "staging_experts is 0"),
        (("placement", "threads"), 10**9, "1000000000 threads"),
        (("placement", "layers"), [], r"the placement of \[\]"),
        (("placement", "layers", 0, "hot"), [0, 0, 1], "no ranking of all its experts"),
        (("placement", "layers", 0, "top_slots"), -1, "slots for -1 tops"),
        (("placement", "layers", 0, "half_life_tokens"), 0.0, "half-life of 0.0 tokens, expected"),
        (("placement", "layers", 0, "layer"), 2, r"the layout is of layers \[0, 1, 2\]"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused_when_it_is_read(
    spec: ModelSpec,
    routing: RoutingProfile,
    tmp_path: Path,
    path: tuple[str | int, ...],
    value: object,
    message: str,
) -> None:
    data = records.to_data(make_plan(request(spec, routing)))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        load_plan(file)


def test_a_graphics_card_is_not_promised_twice(spec: ModelSpec, routing: RoutingProfile) -> None:
    """What the driver and the libraries take of it is not there for the model."""
    card = find_hardware("rtx-4090")
    assert card.vram_bytes is not None
    large = request(
        spec,
        routing,
        hardware=card,
        compute=derive_compute(spec, card),
        device="cuda",
        fast_budget_bytes=100 * GIB,
    )
    plan = make_plan(large)
    usable = card.vram_bytes - card.device_base_bytes
    assert plan.placement.fast_budget_bytes < usable
    assert any("left for a model" in line for line in plan.provenance.assumptions)
    full = dataclasses.replace(card, vram_bytes=card.device_base_bytes + 32 * MIB)
    with pytest.raises(BudgetTooSmallError, match="are missing"):
        make_plan(dataclasses.replace(large, hardware=full, context_tokens=512))
    modest = make_plan(dataclasses.replace(large, fast_budget_bytes=64 * MIB))
    assert modest.placement.fast_budget_bytes == 64 * MIB
    assert not any("left for a model" in line for line in modest.provenance.assumptions)
