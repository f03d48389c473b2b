"""Plans for a device whose host's RAM does not hold all experts."""

from __future__ import annotations

import dataclasses
import io
import itertools

import pytest
from moepack_runtime import loading
from rich.console import Console

from moepack import machine, records
from moepack.budget import slow_bytes
from moepack.checkpoint import Checkpoint
from moepack.cli import generation
from moepack.cli.plan import plan_document
from moepack.errors import BudgetTooSmallError, PlanError
from moepack.explain import explain
from moepack.hardware import HardwareProfile, find_hardware
from moepack.model_spec import ModelSpec
from moepack.plan import Plan
from moepack.plan_request import PlanRequest
from moepack.planner import Planner, make_plan
from moepack.precision import Precision
from moepack.ram_tier import ram_tier
from moepack.rates import LinkCurve
from moepack.report.explain import limit_sentence
from moepack.report.plan import plan_view
from moepack.routing import RoutingProfile
from moepack.units import KIB
from moepack.variants import contender_of, resident_bytes
from tests.conftest import TinyFolder
from tests.support.plan_requests import drawn_routing, plan_request


@pytest.fixture(scope="module")
def spec(tiny_folder: TinyFolder) -> ModelSpec:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec


@pytest.fixture(scope="module")
def routing(spec: ModelSpec) -> RoutingProfile:
    return drawn_routing(spec)


def slower(link: LinkCurve, factor: float) -> LinkCurve:
    points = tuple(
        dataclasses.replace(point, bytes_per_s=point.bytes_per_s / factor) for point in link.points
    )
    return dataclasses.replace(link, points=points)


def card() -> HardwareProfile:
    """A card whose bus, and still more its disk, are so slow that tiny experts take a while."""
    found = find_hardware("rtx-4090")
    assert found.bus is not None
    return dataclasses.replace(found, disk=slower(found.disk, 1000), bus=slower(found.bus, 200))


def request(spec: ModelSpec, routing: RoutingProfile, **changes: object) -> PlanRequest:
    """A quarter of the experts fits the device."""
    made = plan_request(spec, routing, hardware=card(), **changes)
    slots = sum(spec.moe(n).num_experts * spec.expert_bytes(n) for n in spec.moe_layers)
    return dataclasses.replace(made, fast_budget_bytes=resident_bytes(made) - 3 * slots // 4)


def with_room(made: PlanRequest, room_bytes: int) -> PlanRequest:
    """So much host memory beside the process."""
    return dataclasses.replace(made, ram_budget_bytes=made.hardware.process_base_bytes + room_bytes)


def half(spec: ModelSpec, routing: RoutingProfile) -> PlanRequest:
    made = request(spec, routing)
    whole = max(spec.expert_bytes(n) for n in spec.moe_layers)
    everything = sum(spec.moe(n).num_experts * spec.expert_bytes(n) for n in spec.moe_layers)
    return with_room(made, everything // 2 + 2 * whole)


@pytest.fixture(scope="module")
def tiers(spec: ModelSpec, routing: RoutingProfile) -> Plan:
    return make_plan(half(spec, routing))


def test_ram_that_is_too_small_is_planned_for_to_the_byte(
    tiers: Plan, spec: ModelSpec, routing: RoutingProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record says is what the runtime pins, and fits beside the process."""
    asked, host = half(spec, routing), tiers.placement.host
    assert asked.ram_budget_bytes is not None
    assert host is not None
    base_bytes = asked.hardware.process_base_bytes
    assert base_bytes + host.total_bytes <= asked.ram_budget_bytes
    assert tiers.placement.ram_budget_bytes == asked.ram_budget_bytes
    assert 0 < host.held_bytes < tiers.prediction.slow_bytes
    assert all(0 < share < 1 for share in host.shares)
    for there in (asked.ram_budget_bytes, 10 * asked.ram_budget_bytes):
        monkeypatch.setattr(machine, "ram_bytes", lambda there=there: there)
        tier = loading.require_host_memory(spec, tiers.layout, tiers.placement, base_bytes)
        assert tier is not None
        assert tier.total_bytes == host.total_bytes
        assert sum(tier.held.values()) == host.held_bytes
        assert (tier.bounces, tier.bounce_bytes) == (host.bounces, host.bounce_bytes)


def test_a_plan_says_what_ram_holds(tiers: Plan) -> None:
    host, forecast = tiers.placement.host, tiers.prediction
    assert host is not None
    share = host.held_bytes / forecast.slow_bytes
    out = io.StringIO()
    Console(file=out, width=200, no_color=True, highlight=False).print(
        plan_view(tiers, Precision("exact", 32.0))
    )
    text = out.getvalue()
    assert f"RAM holds {share:.0%} of the experts, the disk the rest" in text
    assert "of it from the disk" in text
    document = plan_document(tiers)
    assert document["host"] == records.to_data(host)
    assert 0 < forecast.disk_bytes_per_token < forecast.link_bytes_per_token
    again = records.decode(Plan, records.encode(tiers), what="plan", error=PlanError)
    assert again == tiers


def test_ram_that_holds_everything_gives_the_plan_of_two_tiers(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    made = request(spec, routing)
    ample = make_plan(made)
    assert ample.placement.host is not None
    assert ample.placement.host.bounces == 0
    assert not ample.prediction.disk_bytes_per_token
    just = make_plan(with_room(made, slow_bytes(spec, ample.layout)))
    for name in ("layout", "prediction", "baselines", "max_context_tokens"):
        assert getattr(just, name) == getattr(ample, name), name
    assert just.placement.layers == ample.placement.layers


def test_more_ram_is_never_dearer(spec: ModelSpec, routing: RoutingProfile) -> None:
    """But for what a replay is allowed: a queue in another order may be slower by a hundredth."""
    made = half(spec, routing)
    everything = sum(spec.moe(n).num_experts * spec.expert_bytes(n) for n in spec.moe_layers)
    times = []
    for eighths in (2, 3, 4, 6, 7, 9):
        room_bytes = everything * eighths // 8
        planner = Planner(with_room(made, room_bytes))
        plan = planner.plan(made.fast_budget_bytes)
        assert plan.placement.host is not None
        assert plan.placement.host.total_bytes <= room_bytes
        price = planner.price(contender_of(planner.request, plan), "select")
        times.append(planner.total_s(price))
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(times))
    assert times[-1] < times[0]


def test_a_disk_that_limits_is_named(spec: ModelSpec, routing: RoutingProfile) -> None:
    planner = Planner(half(spec, routing))
    plan = planner.plan(planner.request.fast_budget_bytes)
    told = explain(planner, plan)
    assert told.limit == "disk"
    assert limit_sentence(told).startswith("waiting for the disk takes ")
    text = next(finding.text for finding in told.findings if finding.about == "disk")
    assert text.startswith("RAM holds ")
    assert {"ram", "disk"} <= {row.change for row in told.what_if}
    assert all(row.gain > 1 for row in told.what_if if row.change in ("ram", "disk"))


def test_a_presets_ram_is_an_assumption(spec: ModelSpec, routing: RoutingProfile) -> None:
    made = half(spec, routing)
    assert made.ram_budget_bytes is not None
    small = dataclasses.replace(made.hardware, ram_bytes=round(made.ram_budget_bytes / 0.9))
    plan = make_plan(dataclasses.replace(made, hardware=small, ram_budget_bytes=None))
    assert plan.placement.host is not None
    assert plan.placement.host.bounces
    assert any("say with --ram what yours has" in line for line in plan.provenance.assumptions)


def test_ram_that_passes_nothing_on_is_refused(spec: ModelSpec, routing: RoutingProfile) -> None:
    with pytest.raises(BudgetTooSmallError, match="what is pinned of the slow tier takes"):
        make_plan(with_room(request(spec, routing), 8 * KIB))


def test_what_is_held_is_what_the_runtime_would_hold(tiers: Plan, spec: ModelSpec) -> None:
    placement = tiers.placement
    assert placement.host is not None
    tier = ram_tier(
        spec,
        tiers.layout,
        placement.layers,
        placement.host.pinned_bytes,
        readers=placement.readers,
    )
    for cut, share in zip(tiers.layout.layers, placement.host.shares, strict=True):
        held = sum(size for segment, size in tier.held.items() if segment.layer == cut.layer)
        whole = slow_bytes(spec, dataclasses.replace(tiers.layout, layers=(cut,)))
        assert share == held / whole


@pytest.mark.parametrize(("more", "said"), [(0, "as planned"), (1, "were planned: the process")])
def test_a_session_says_what_comes_from_the_disk(
    tiers: Plan,
    spec: ModelSpec,
    routing: RoutingProfile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: int,
    said: str,
) -> None:
    """A process that takes more than it did when it was profiled leaves less to be pinned."""
    asked = half(spec, routing)
    assert asked.ram_budget_bytes is not None
    monkeypatch.setattr(machine, "ram_bytes", lambda: asked.ram_budget_bytes)
    most = max(spec.expert_bytes(n) for n in spec.moe_layers)
    base_bytes = asked.hardware.process_base_bytes + more * most
    generation.note_what_ram_holds(spec, tiers, base_bytes)
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("RAM holds ")
    assert said in told
