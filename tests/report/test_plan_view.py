"""A plan in a terminal: every layer and every strategy, within eighty columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType

from moepack.plan import Plan, Policy, SharedPool
from moepack.precision import Precision
from moepack.report.layers import MOST_ROWS, bar, layer_rows, layers_view
from moepack.report.plan import plan_view
from moepack.report.strategies import standing_sentences, strategies_view, strategy_rows
from tests.support.shown_plans import baseline, shown_plan


def printed(view: RenderableType, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False).print(view)
    return out.getvalue().splitlines()


def test_neighbours_that_are_placed_alike_share_a_row() -> None:
    rows = layer_rows(shown_plan(tops=(4, 4, 8, 4)))
    assert [row.name for row in rows] == ["0 to 1", "2", "3"]
    assert [row.top_share for row in rows] == [4 / 16, 8 / 16, 4 / 16]


def test_many_different_layers_become_bands_that_hold_every_layer_once() -> None:
    plan = shown_plan(tops=tuple(1 + layer % 7 for layer in range(94)))
    rows = layer_rows(plan)
    assert len(rows) <= MOST_ROWS
    assert [layer for row in rows for layer in row.layers] == list(range(94))
    lines = printed(layers_view(plan))
    assert len(lines) <= MOST_ROWS + 2
    assert "1-4" in lines[1]  # tops of layers 0 to 3


def test_a_bottom_counts_by_its_share_of_the_expert() -> None:
    (row,) = layer_rows(shown_plan(tops=(16,), bottoms=(8,), splits=(0.25,)))
    assert (row.top_share, row.bottom_share) == (0.25, 0.75 / 2)


@pytest.mark.parametrize(
    ("tops", "bottoms", "text"),
    [
        (0.0, 0.0, "········"),
        (0.5, 0.0, "████····"),
        (0.25, 0.5, "██▒▒▒▒··"),
        (1.0, 0.0, "████████"),
        (0.01, 0.01, "█▒······"),
        (1.0, 1e-9, "████████"),
    ],
)
def test_bars_show_whatever_is_there(tops: float, bottoms: float, text: str) -> None:
    assert bar(tops, bottoms, 8) == text


def test_layers_that_share_a_pool_are_told_as_one() -> None:
    view = printed(layers_view(shown_plan(pool=SharedPool(12, "lru"))))
    assert view[0].startswith("12 slots for whole experts that all 3 layers share (25% of 48")


DECAYING: list[Policy] = ["lfu_decay"] * 6
LEAST_PRIORITY: list[Policy] = ["lcp"] * 88

PLAN = shown_plan(
    baselines={
        "on_demand": baseline(0.200),
        "lru": baseline(0.060),
        "lru_prefetch": baseline(0.040, why_not="this engine fetches nothing ahead"),
        "belady": baseline(0.030, why_not="it knows the future"),
    },
    assumptions=("compute times are derived from the hardware profile by a roofline",),
)


def test_strategies_are_in_order_and_each_says_whether_it_can_be_run() -> None:
    rows = strategy_rows(PLAN)
    assert [(row.name, row.note) for row in rows] == [
        ("plan", "is optimised"),
        ("lru", "fastest of these"),
        ("on_demand", ""),
        ("lru_prefetch", "not here"),
        ("belady", "bound"),
    ]
    text = "\n".join(printed(strategies_view(PLAN)))
    assert "not to be run: lru_prefetch: this engine fetches nothing ahead" in text
    assert "not to be run: belady: it knows the future" in text


@pytest.mark.parametrize(("tpot_s", "verb"), [(0.05, "wins"), (0.07, "loses")])
def test_what_is_won_or_lost_on_test_is_said(tpot_s: float, verb: str) -> None:
    plan = shown_plan(tpot_s=tpot_s)
    share = abs((1 + 127 * 0.06) / (1 + 127 * tpot_s) - 1)
    assert f"the plan {verb} {share:.1%} against lru" in standing_sentences(plan)[-1]


def test_a_margin_that_is_none_is_no_loss() -> None:
    plan = shown_plan(tpot_s=0.060001)
    assert "the plan is as fast as lru" in standing_sentences(plan)[-1]


def test_a_strategy_that_is_the_plan_is_marked() -> None:
    same = shown_plan(chosen="lru", tpot_s=0.06, baselines={"lru": baseline(0.06)})
    smaller = shown_plan(chosen="lru", tpot_s=0.05, baselines={"lru": baseline(0.06)})
    assert strategy_rows(same)[1].note == "the plan"
    assert strategy_rows(smaller)[1].note == "fastest of these"
    assert len(standing_sentences(same)) == 1


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        shown_plan(tops=tuple(1 + layer % 7 for layer in range(94))),
        shown_plan(pool=SharedPool(12, "lru")),
        shown_plan(tops=(16, 16), bottoms=(3, 4), splits=(0.25, 0.5), policies=("lru", "lfu")),
        shown_plan(tops=(16,) * 7, splits=(0.5,) * 7, policies=("lcp", *DECAYING)),
        shown_plan(tops=(9, 7) * 47, policies=(*DECAYING, *LEAST_PRIORITY)),
    ],
)
def test_a_plan_fits_eighty_columns(plan: Plan) -> None:
    lines = printed(plan_view(plan, Precision("int8", 8.13)))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    assert "int8, 8.13 bits a weight" in text
    for name in plan.baselines:
        assert re.search(rf"^{name} ", text, re.MULTILINE)
    assert "planned in 2.5 s: 1,000 passes of a layer replayed" in text
    assert "exchanged budgets 0.10% from the exact optimum" in " ".join(lines)
