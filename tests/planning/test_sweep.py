"""Sweeps: budgets, knees, and more memory that never makes a plan slower."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.checkpoint import Checkpoint
from moepack.errors import BudgetTooSmallError
from moepack.hardware import find_hardware
from moepack.model_spec import ModelSpec
from moepack.plan_request import CUBLAS_BYTES
from moepack.planner import Planner, rungs_below
from moepack.routing import RoutingProfile
from moepack.sweep import (
    BUDGETS,
    Sweep,
    SweepPoint,
    knee,
    knee_sentences,
    sweep,
    sweep_budgets,
)
from moepack.units import GIB, MIB
from moepack.variants import contender_of, resident_bytes
from tests.conftest import TinyFolder
from tests.support.plan_requests import drawn_routing, plan_request
from tests.support.shown_plans import shown_plan


def test_budgets_are_even_on_a_log_scale_with_the_rungs_among_them() -> None:
    budgets = sweep_budgets(4 * GIB, 24 * GIB)
    assert budgets[0] == 4 * GIB
    assert budgets[-1] == 24 * GIB
    assert set(budgets) >= {size * GIB for size in (6, 8, 12, 16)}
    assert abs(len(budgets) - BUDGETS) <= 2
    steps = [math.log(b / a) for a, b in itertools.pairwise(budgets)]
    assert max(steps) < 1.6 * min(steps)


@given(st.integers(1, 1 << 44), st.integers(1, 1 << 20))
def test_budgets_ascend_from_one_end_to_the_other(low: int, factor: int) -> None:
    budgets = sweep_budgets(low, low * factor)
    assert (budgets[0], budgets[-1]) == (low, low * factor)
    assert all(a < b for a, b in itertools.pairwise(budgets))
    assert len(budgets) <= 2 * BUDGETS


def points(*figures: tuple[float, float]) -> list[SweepPoint]:
    """Of (GiB, seconds)."""
    return [
        SweepPoint(round(size * GIB), 0, 1.0, seconds, 0.5, "optimised", {})
        for size, seconds in figures
    ]


def test_the_knee_is_where_two_straight_lines_meet() -> None:
    # A doubling halves the time up to 8 GiB, and gains a twentieth from there on.
    bent = points((2, 0.4), (4, 0.2), (8, 0.1), (16, 0.1 / 1.05), (32, 0.1 / 1.05**2))
    found = knee(bent)
    assert found is not None
    assert found.budget_bytes == 8 * GIB
    assert found.before == pytest.approx(2.0)
    assert found.after == pytest.approx(1.05)
    (sentence, *_) = knee_sentences(bent)
    assert sentence == (
        "the knee is at 8G: up to there a doubling of the memory makes a token 2.00 times as fast, "
        "from there on 1.05 times"
    )


def test_a_straight_line_has_no_knee() -> None:
    straight = points((2, 0.4), (4, 0.2), (8, 0.1), (16, 0.05))
    assert knee(straight) is None
    assert knee_sentences(straight)[0].startswith(
        "there is no knee: a doubling of the memory makes a token 2.00 times as fast"
    )


def test_memory_that_gains_nothing_is_said_to() -> None:
    flat = points((2, 0.1), (4, 0.1), (8, 0.0999))
    assert knee_sentences(flat) == ["from 2G to 8G more memory makes no token faster"]
    ends = knee_sentences(points((2, 0.4), (4, 0.1), (8, 0.1), (16, 0.1)))
    assert ends[-1] == "beyond 4G no more than 1% is gained"
    assert knee(points((2, 0.4), (4, 0.1))) is None
    assert knee_sentences(points((2, 0.4))) == []


def test_the_points_of_a_sweep_are_the_figures_of_its_plans() -> None:
    plan = shown_plan(tpot_s=0.07, ttft_s=2.0, hit_rate=0.4, chosen="lcp")
    (point,) = Sweep((plan,)).points
    assert point == SweepPoint(
        budget_bytes=plan.placement.fast_budget_bytes,
        fast_used_bytes=plan.placement.memory.total_bytes,
        ttft_s=2.0,
        tpot_s=0.07,
        hit_rate=0.4,
        chosen="lcp",
        baselines=plan.baselines,
    )


@pytest.fixture(scope="module")
def spec(tiny_folder: TinyFolder) -> ModelSpec:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec


@pytest.fixture(scope="module")
def routing(spec: ModelSpec) -> RoutingProfile:
    return drawn_routing(spec)


def test_more_memory_is_never_slower_on_the_part_that_decides(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    request = plan_request(spec, routing, link=(20 * MIB, 1e-4))
    planner = Planner(request)
    whole = resident_bytes(request)
    found = sweep(planner, whole // 2, whole + MIB)
    times = []
    for plan in found.plans:
        assert plan.prediction.fast_bytes <= plan.placement.fast_budget_bytes
        times.append(planner.total_s(planner.price(contender_of(request, plan), "select")))
    assert all(b <= a for a, b in itertools.pairwise(times))
    assert times[-1] < times[0]
    assert found.plans[-1].prediction.hit_rate == 1.0
    assert found.capacity_bytes is None
    rungs = [rung for rung in rungs_below(whole + MIB) if rung > found.points[0].budget_bytes]
    assert {point.budget_bytes for point in found.points} >= set(rungs)


def test_a_sweep_begins_where_the_model_fits(spec: ModelSpec, routing: RoutingProfile) -> None:
    planner = Planner(plan_request(spec, routing))
    whole = resident_bytes(planner.request)
    found = sweep(planner, 1, whole)
    assert found.asked_low_bytes == 1
    least = found.points[0].budget_bytes
    planner.plan(least)
    with pytest.raises(BudgetTooSmallError):
        planner.plan(least - MIB)
    with pytest.raises(BudgetTooSmallError):
        sweep(planner, 1, 2)


def test_a_sweep_may_go_beyond_the_machine_and_says_so(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    gpu = find_hardware("rtx-3060-12g")
    whole = resident_bytes(plan_request(spec, routing, hardware=gpu))
    # The driver's context, what cuBLAS takes, and room for one MiB more than the model.
    small_bytes = gpu.device_base_bytes + CUBLAS_BYTES + MIB + whole
    small = dataclasses.replace(gpu, vram_bytes=small_bytes)
    request = plan_request(spec, routing, hardware=small)
    found = sweep(Planner(request), whole, whole + 4 * MIB)
    assert found.capacity_bytes == whole + MIB
    assert found.points[-1].budget_bytes == whole + 4 * MIB
