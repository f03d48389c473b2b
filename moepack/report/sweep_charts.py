"""Times over the budget of fast memory, for a plan and everything beside it, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from moepack.forecast import Baseline, Prediction
from moepack.margin import BOUNDS, generation_s
from moepack.plan import Plan
from moepack.report.charts import Frame, Line, line_chart
from moepack.report.markup import Element
from moepack.report.scale import axis
from moepack.sweep import Sweep
from moepack.units import format_duration, short_size

_Figures = Prediction | Baseline


def sweep_charts(swept: Sweep, marked: Plan | None = None) -> Iterator[tuple[Element, str]]:
    """The time of a token and to the first token, each with its caption."""
    rival = _rival(swept)
    caption = (
        "Both axes are logarithmic. Dashed: bounds that nothing can run. Dotted: strategies that "
        "this engine cannot run."
    )
    if rival is not None:
        caption += f" {rival} has the least mean of the others that can be run."
    yield (
        _chart(swept, marked, rival, "time per token (TPOT)", lambda figures: figures.tpot_s),
        caption,
    )
    yield (
        _chart(
            swept, marked, rival, "time to the first token (TTFT)", lambda figures: figures.ttft_s
        ),
        f"After a prompt of {swept.plans[0].placement.prompt_tokens} tokens.",
    )


def _chart(
    swept: Sweep,
    marked: Plan | None,
    rival: str | None,
    label: str,
    value: Callable[[_Figures], float],
) -> Element:
    lines = []
    if marked is not None:
        at = marked.placement.fast_budget_bytes
        name = f"the plan for {short_size(at)}"
        lines.append(Line(name, "marked", (_point(name, at, marked.prediction, value),)))
    plan_points = tuple(
        _point(
            f"plan ({plan.planner.chosen})",
            plan.placement.fast_budget_bytes,
            plan.prediction,
            value,
        )
        for plan in swept.plans
    )
    lines.append(Line("plan", "plan", plan_points))
    names = list(dict.fromkeys(name for plan in swept.plans for name in plan.baselines))
    for name in sorted(names, key=lambda name: (name != rival, name not in BOUNDS)):
        points = tuple(
            _point(name, plan.placement.fast_budget_bytes, plan.baselines[name], value)
            for plan in swept.plans
            if name in plan.baselines
        )
        lines.append(Line(name, _kind(swept, name, rival), points))
    every = [point for line in lines for point in line.points]
    marker = None
    if swept.capacity_bytes is not None and swept.capacity_bytes > swept.points[0].budget_bytes:
        marker = float(swept.capacity_bytes), "what this machine has"
    return line_chart(
        lines,
        axis([across for across, _, _ in every], short_size, most_ticks=12, binary=True),
        axis([up for _, up, _ in every], format_duration, most_ticks=9, margin=1.06),
        frame=Frame(900, 400),
        x_label="budget of fast memory",
        y_label=label,
        marker=marker,
    )


def _point(
    name: str, budget_bytes: int, figures: _Figures, value: Callable[[_Figures], float]
) -> tuple[float, float, str]:
    told = f"{name} at {short_size(budget_bytes)}: {format_duration(value(figures))}"
    return float(budget_bytes), value(figures), f"{told}, hit rate {figures.hit_rate:.1%}"


def _rival(swept: Sweep) -> str | None:
    """The strategy that is the fastest over all budgets, of those that can be run at each."""
    found = {}
    for name, first in swept.plans[0].baselines.items():
        others = [plan.baselines.get(name, first) for plan in swept.plans]
        if name not in BOUNDS and all(other.eligible for other in others):
            times = (
                generation_s(other, plan.placement.new_tokens)
                for other, plan in zip(others, swept.plans, strict=True)
            )
            found[name] = sum(map(math.log, times))
    return min(found, key=lambda name: found[name], default=None)


def _kind(swept: Sweep, name: str, rival: str | None) -> str:
    if name in BOUNDS:
        return "bound"
    if name == rival:
        return "rival"
    runs = any(plan.baselines[name].eligible for plan in swept.plans if name in plan.baselines)
    return "other" if runs else "barred"
