"""Explanations: every figure is that of a replay or of a plan, and every sentence follows."""

from __future__ import annotations

import dataclasses

import pytest
from moepack_runtime.capabilities import CAPABILITIES

from moepack.checkpoint import Checkpoint
from moepack.explain import Explanation, explain
from moepack.hardware import HardwareProfile, find_hardware
from moepack.model_spec import ModelSpec
from moepack.plan import Plan, SharedPool
from moepack.plan_request import PlanRequest
from moepack.planner import Planner, make_plan
from moepack.progress import Unit
from moepack.report.explain import limit_sentence
from moepack.routing import RoutingProfile
from moepack.units import GIB, MIB, short_size
from moepack.variants import is_resident, resident_bytes, with_compute, with_link, with_memory
from moepack.what_if import FASTER_LINK, MORE_MEMORY, WhatIf
from tests.conftest import TinyFolder
from tests.support.plan_requests import drawn_routing, plan_request
from tests.support.shown_plans import EXPERTS, shown_plan


@pytest.fixture(scope="module")
def spec(tiny_folder: TinyFolder) -> ModelSpec:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec


@pytest.fixture(scope="module")
def routing(spec: ModelSpec) -> RoutingProfile:
    return drawn_routing(spec)


def explained(request: PlanRequest) -> tuple[Plan, Explanation]:
    planner = Planner(request)
    plan = planner.plan(request.fast_budget_bytes)
    return plan, explain(planner, plan)


def about(explanation: Explanation, topic: str) -> str:
    return next(finding.text for finding in explanation.findings if finding.about == topic)


def rows(explanation: Explanation, change: str) -> list[WhatIf]:
    return [row for row in explanation.what_if if row.change == change]


def least(spec: ModelSpec, routing: RoutingProfile) -> int:
    """A budget that holds about a quarter of the experts."""
    request = plan_request(spec, routing)
    whole = resident_bytes(request)
    slots = sum(spec.moe(n).num_experts * spec.expert_bytes(n) for n in spec.moe_layers)
    return whole - 3 * slots // 4


@pytest.fixture(scope="module")
def slow_link(spec: ModelSpec, routing: RoutingProfile) -> tuple[Plan, Explanation]:
    return explained(
        plan_request(
            spec,
            routing,
            fast_budget_bytes=least(spec, routing),
            link=(20 * MIB, 1e-3),
        )
    )


def test_a_token_is_computing_and_waiting_and_nothing_else(
    slow_link: tuple[Plan, Explanation],
) -> None:
    plan, explanation = slow_link
    token = explanation.token
    assert token.tpot_s == pytest.approx(plan.prediction.tpot_s)
    assert token.compute_s + token.wait_s == pytest.approx(token.tpot_s)
    assert token.link_bytes == pytest.approx(plan.prediction.link_bytes_per_token)
    assert token.wait_s <= token.link_s <= token.tpot_s * 1.001
    # Whole experts compute as they do when all are resident; cut ones take no less.
    assert token.compute_s >= plan.baselines["resident"].tpot_s * 0.999


def test_a_slow_link_limits_and_a_faster_one_gains(slow_link: tuple[Plan, Explanation]) -> None:
    plan, explanation = slow_link
    token = explanation.token
    assert explanation.limit == "link"
    assert limit_sentence(explanation).startswith(
        f"waiting for the link takes {token.wait_s / token.tpot_s:.0%} of a token"
    )
    assert f"busy for {token.link_s / token.tpot_s:.0%} of a token" in about(explanation, "link")
    faster = rows(explanation, "link")
    assert [row.factor for row in faster] == list(FASTER_LINK)
    gains = [row.gain for row in faster]
    assert gains == sorted(gains)
    for row in faster:
        assert row.gain == pytest.approx(plan.prediction.tpot_s / row.tpot_s)
        assert 1 < row.gain <= row.factor * 1.01
        assert row.fast_budget_bytes == plan.placement.fast_budget_bytes
        assert row.text.endswith(f", {row.gain:.2f} times")


def test_other_machines_are_planned_anew(spec: ModelSpec, routing: RoutingProfile) -> None:
    budget = least(spec, routing)
    request = plan_request(spec, routing, fast_budget_bytes=budget, link=(20 * MIB, 1e-3))
    _, explanation = explained(request)
    more = round(1.5 * budget)
    expected = [
        ("link", 2.0, make_plan(with_link(request, 2.0))),
        ("compute", 2.0, make_plan(with_compute(request, 2.0))),
        ("memory", 1.5, make_plan(with_memory(request, more))),
    ]
    for change, factor, plan in expected:
        (row,) = (row for row in rows(explanation, change) if abs(row.factor - factor) < 1e-3)
        assert (row.ttft_s, row.tpot_s, row.hit_rate) == (
            plan.prediction.ttft_s,
            plan.prediction.tpot_s,
            plan.prediction.hit_rate,
        )


def test_a_throttle_that_is_twice_as_fast_is_a_link_that_is(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    request = plan_request(spec, routing, link=(20 * MIB, 1e-3))
    slow, fast = Planner(request), Planner(with_link(request, 4.0))
    for size in (1, 4096, 3 * MIB):
        assert fast.link(size) == pytest.approx(slow.link(size) / 4)


def test_with_everything_resident_only_the_processor_counts(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    plan, explanation = explained(plan_request(spec, routing))
    assert explanation.limit == "compute"
    assert explanation.token.wait_s == pytest.approx(0)
    assert about(explanation, "link").startswith("nothing crosses the link")
    assert "every expert is resident" in about(explanation, "capacity")
    (row,) = explanation.what_if
    assert row.change == "compute"
    assert row.gain == pytest.approx(2.0)
    assert row.tpot_s == pytest.approx(plan.prediction.tpot_s / 2)


def test_more_memory_ends_where_everything_is_resident(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    whole = resident_bytes(plan_request(spec, routing))
    _, explanation = explained(
        plan_request(spec, routing, fast_budget_bytes=round(whole / 1.3), link=(20 * MIB, 0.0))
    )
    more = rows(explanation, "memory")
    assert [row.fast_budget_bytes for row in more] == [
        round(round(whole / 1.3) * MORE_MEMORY[0]),
        whole,
    ]
    assert more[-1].hit_rate == 1.0
    assert ", all resident: " in more[-1].text
    size = short_size(more[0].fast_budget_bytes)
    assert f"with a budget of {size} {more[0].hit_rate:.1%}" in about(explanation, "capacity")


def test_memory_that_the_machine_does_not_have_can_be_thought_of(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    small = dataclasses.replace(find_hardware("cpu-nvme4"), ram_bytes=GIB)
    request = plan_request(spec, routing, hardware=small, ram_budget_bytes=GIB)
    more = with_memory(request, 4 * GIB)
    assert make_plan(more).placement.fast_budget_bytes == 4 * GIB
    gpu = plan_request(spec, routing, hardware=find_hardware("rtx-3060-12g"))
    assert make_plan(with_memory(gpu, 40 * GIB)).placement.fast_budget_bytes == 40 * GIB


def flat(hardware: HardwareProfile) -> HardwareProfile:
    """A link on which a byte costs the same in transfers of every size."""
    point = dataclasses.replace(hardware.disk.points[-1], size_bytes=4096)
    larger = dataclasses.replace(point, size_bytes=GIB)
    disk = dataclasses.replace(hardware.disk, points=(point, larger))
    return dataclasses.replace(hardware, disk=disk)


def test_where_only_bytes_cost_nothing_is_lost_to_transfers(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    plan, explanation = explained(
        plan_request(
            spec,
            routing,
            hardware=flat(find_hardware("cpu-sata")),
            fast_budget_bytes=least(spec, routing),
        )
    )
    assert plan.prediction.link_bytes_per_token
    assert not about(explanation, "transfers").endswith(" times")


def test_an_engine_that_fetches_nothing_ahead_uses_no_prediction(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    _, explanation = explained(
        plan_request(
            spec,
            routing,
            engine=dataclasses.replace(CAPABILITIES, prefetch=("off",), max_prefetch_depth=0),
            fast_budget_bytes=least(spec, routing),
        )
    )
    assert about(explanation, "prediction") == "not used: this engine fetches nothing ahead"


@pytest.mark.parametrize(
    ("plan", "resident"),
    [
        (shown_plan(tops=(EXPERTS,) * 2), True),
        (shown_plan(tops=(EXPERTS, EXPERTS - 1)), False),
        (shown_plan(tops=(EXPERTS,), bottoms=(EXPERTS,), splits=(0.5,)), True),
        (shown_plan(tops=(EXPERTS,), bottoms=(EXPERTS - 1,), splits=(0.5,)), False),
        (shown_plan(tops=(0,), bottoms=(EXPERTS,), splits=(0.0,)), True),
        (shown_plan(tops=(1, 1), pool=SharedPool(2 * EXPERTS, "lru")), True),
        (shown_plan(tops=(1, 1), pool=SharedPool(2 * EXPERTS - 1, "lru")), False),
    ],
)
def test_resident_is_every_part_of_every_expert(plan: Plan, *, resident: bool) -> None:
    assert is_resident(plan) is resident


class Counting:
    """A progress that keeps count."""

    def __init__(self) -> None:
        self.works: list[tuple[str, int | None, str]] = []
        self.amount = 0
        self.ended = False

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        self.works.append((what, total, unit))

    def advance(self, amount: int) -> None:
        self.amount += amount

    def done(self) -> None:
        self.ended = True


def test_progress_tells_of_every_plan(spec: ModelSpec, routing: RoutingProfile) -> None:
    planner = Planner(plan_request(spec, routing, link=(20 * MIB, 0.0)))
    progress = Counting()
    explanation = explain(planner, planner.plan(least(spec, routing)), progress)
    assert progress.works == [("plan for other machines", len(explanation.what_if), "items")]
    assert progress.amount == len(explanation.what_if)
    assert progress.ended
