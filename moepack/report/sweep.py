"""A sweep: time per token over fast memory, as a plot and as a table."""

from __future__ import annotations

from rich.console import Group, RenderableType

from moepack.margin import WHOLE_EXPERT_CACHES, best_baseline
from moepack.plan import Plan
from moepack.precision import Precision
from moepack.report.plan import precision_words, trunk_rows
from moepack.report.plot import Plot, Series
from moepack.report.scale import axis
from moepack.report.tables import columns, facts
from moepack.sweep import Sweep, knee_sentences
from moepack.units import format_duration, format_size, short_size

#: Head of the table, in the terminal and on the page; the last two: TPOT, and who won.
SWEEP_HEAD = ("budget", "used", "TTFT", "TPOT", "hit rate", "best cache", "chosen")

_Points = list[tuple[float, float]]


def sweep_view(swept: Sweep, precision: Precision, marked: Plan | None = None) -> RenderableType:
    """The plot, what it says in words, and its figures.

    Parameters
    ----------
    marked
        A plan of its own, shown among those of the sweep.
    """
    return Group(
        facts(
            [
                ("model", swept.plans[0].model_name),
                ("experts", precision_words(precision)),
                *trunk_rows(swept.plans[0]),
                ("hardware", swept.plans[0].provenance.hardware),
            ]
        ),
        "",
        sweep_plot(swept, marked),
        "",
        *sweep_sentences(swept),
        "",
        columns(SWEEP_HEAD, map(sweep_cells, swept.plans), texts=SWEEP_HEAD[-1:]),
    )


def sweep_plot(swept: Sweep, marked: Plan | None = None) -> Plot:
    """TPOT over the budget: the plan, the best whole-expert cache, on demand, and the bounds."""
    series = []
    if marked is not None:
        at = (float(marked.placement.fast_budget_bytes), marked.prediction.tpot_s)
        name = f"the plan for {short_size(at[0])}"
        series.append(Series(name, "◆", [at], style="bold magenta"))
    points = [(float(p.budget_bytes), p.tpot_s) for p in swept.points]
    series.append(Series("plan", "●", points, joint="─", style="bold cyan"))
    others = (
        ("best whole-expert cache", "○", _best_cache(swept), "yellow"),
        ("on demand", "△", _baseline(swept, "on_demand"), ""),
        ("belady (bound)", "▽", _baseline(swept, "belady"), "dim"),
        ("resident (bound)", "▫", _baseline(swept, "resident"), "dim"),
    )
    series += [Series(name, mark, points, style=style) for name, mark, points, style in others]
    series = [one for one in series if one.points]
    every = [point for one in series for point in one.points]
    return Plot(
        series,
        axis([across for across, _ in every], short_size, most_ticks=9, binary=True),
        axis([up for _, up in every], format_duration, most_ticks=9, margin=1.05),
        title="  time per token over the budget of fast memory (both axes logarithmic)",
    )


def sweep_sentences(swept: Sweep) -> list[str]:
    """The knee, the limits of the range, and what the figures are of."""
    sentences = knee_sentences(swept.points)
    if swept.asked_low_bytes is not None:
        sentences.append(
            f"{short_size(swept.asked_low_bytes)} is too little for the model: it begins at "
            f"{short_size(swept.points[0].budget_bytes)}"
        )
    if swept.capacity_bytes is not None:
        sentences.append(
            f"this machine has {format_size(swept.capacity_bytes)} left for a model: what lies "
            "beyond is another machine"
        )
    sentences.append(
        "figures are of the test part of the routing; plans were chosen on another part, where "
        "more memory is never slower"
    )
    return sentences


def _baseline(swept: Sweep, name: str) -> _Points:
    return [
        (float(point.budget_bytes), point.baselines[name].tpot_s)
        for point in swept.points
        if name in point.baselines
    ]


def _best_cache(swept: Sweep) -> _Points:
    """At each budget the fastest of the whole-expert caches that could be run."""
    found = []
    for plan in swept.plans:
        name = best_baseline(plan, WHOLE_EXPERT_CACHES)
        if name is not None:
            budget_bytes = float(plan.placement.fast_budget_bytes)
            found.append((budget_bytes, plan.baselines[name].tpot_s))
    return found


def sweep_cells(plan: Plan) -> tuple[str, ...]:
    """The figures of one budget, under :data:`SWEEP_HEAD`."""
    forecast = plan.prediction
    rival = best_baseline(plan, WHOLE_EXPERT_CACHES)
    return (
        short_size(plan.placement.fast_budget_bytes),
        format_size(plan.placement.memory.total_bytes),
        format_duration(forecast.ttft_s),
        format_duration(forecast.tpot_s),
        f"{forecast.hit_rate:.1%}",
        "-" if rival is None else format_duration(plan.baselines[rival].tpot_s),
        plan.planner.chosen,
    )
