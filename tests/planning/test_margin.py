"""Margins are over whole generations, against what could really be run."""

from __future__ import annotations

import pytest

from moepack.margin import WHOLE_EXPERT_CACHES, best_baseline, margin
from tests.support.shown_plans import baseline, shown_plan


def test_the_best_baseline_is_the_one_whose_generation_ends_first() -> None:
    plan = shown_plan(
        baselines={
            "slow start": baseline(0.050, ttft_s=3.0),  # 3 + 127 * 0.050 = 9.35
            "lru": baseline(0.060, ttft_s=1.0),  # 1 + 127 * 0.060 = 8.62
            "cannot": baseline(0.001, why_not="it knows the future"),
            "resident": baseline(0.002),
        }
    )
    assert best_baseline(plan) == "lru"
    assert best_baseline(plan, ("slow start",)) == "slow start"
    assert best_baseline(plan, ("cannot",)) is None


def test_a_margin_is_the_ratio_of_two_generations_and_may_be_lost() -> None:
    won = margin(shown_plan(tpot_s=0.05, baselines={"lru": baseline(0.06)}))
    lost = margin(shown_plan(tpot_s=0.06, baselines={"lru": baseline(0.05)}))
    assert won is not None
    assert lost is not None
    assert won.speedup == pytest.approx((1 + 127 * 0.06) / (1 + 127 * 0.05))
    assert won.speedup * lost.speedup == pytest.approx(1)


def test_without_a_baseline_there_is_no_margin() -> None:
    assert margin(shown_plan(baselines={})) is None


def test_the_bounds_are_no_caches() -> None:
    assert not {"belady", "resident", "on_demand", "prefetch_only"} & set(WHOLE_EXPERT_CACHES)
