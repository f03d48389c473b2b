"""A plan beside the strategies that it was chosen from."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from moepack.forecast import Baseline, Prediction
from moepack.margin import BOUNDS, best_baseline, generation_s, margin
from moepack.plan import Plan
from moepack.report.tables import columns
from moepack.units import format_duration, format_size

#: Head of the table, in the terminal and on the page.
HEAD = ("strategy", "TTFT", "TPOT", "hit rate", "link a token", "note")

#: How a plan calls itself beside its baselines.
PLAN = "plan"


class StrategyRow(NamedTuple):
    """One line of the table.

    Attributes
    ----------
    kind : {"plan", "baseline", "barred", "bound"}
        The plan itself, what this engine could run, what it could not, and what nothing can.
    note : str
        A word on it; why a strategy cannot be run is told apart (:func:`reasons`).
    """

    name: str
    kind: str
    figures: Prediction | Baseline
    note: str

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands under :data:`HEAD`."""
        return (
            self.name,
            format_duration(self.figures.ttft_s),
            format_duration(self.figures.tpot_s),
            f"{self.figures.hit_rate:.1%}",
            format_size(self.figures.link_bytes_per_token),
            self.note,
        )


def strategy_rows(plan: Plan) -> list[StrategyRow]:
    """The plan, the strategies that could be run, fastest first, the others, the bounds."""
    fastest = best_baseline(plan)
    rows = [StrategyRow(PLAN, "plan", plan.prediction, f"is {plan.planner.chosen}")]
    for name, baseline in plan.baselines.items():
        if name in BOUNDS:
            kind, note = "bound", "bound"
        elif not baseline.eligible:
            kind, note = "barred", "not here"
        else:
            kind, note = "baseline", "fastest of these" if name == fastest else ""
            if _is_the_plan(plan, name, baseline):
                note = "the plan"
        rows.append(StrategyRow(name, kind, baseline, note))
    order = ("plan", "baseline", "barred", "bound")
    new_tokens = plan.placement.new_tokens
    return sorted(
        rows, key=lambda row: (order.index(row.kind), generation_s(row.figures, new_tokens))
    )


def strategies_view(plan: Plan) -> RenderableType:
    """The table, and what the plan gains on the part that nothing was chosen by."""
    styles = {"plan": "bold", "baseline": ""}
    table = columns(
        HEAD,
        (
            tuple(Text(cell, style=styles.get(row.kind, "dim")) for cell in row.cells)
            for row in strategy_rows(plan)
        ),
        texts=(HEAD[-1],),
    )
    return Group(table, *reasons(plan), *standing_sentences(plan))


def reasons(plan: Plan) -> list[str]:
    """Why strategies cannot be run, one line for each reason."""
    names: dict[str, list[str]] = {}
    for row in strategy_rows(plan):
        if isinstance(row.figures, Baseline) and row.figures.why_not:
            names.setdefault(row.figures.why_not, []).append(row.name)
    return [f"not to be run: {', '.join(of)}: {reason}" for reason, of in names.items()]


def standing_sentences(plan: Plan) -> list[str]:
    """What was chosen, on what, and by how much it wins or loses where it was not chosen."""
    sentences = ["figures are of the test part of the routing; the plan was chosen on another"]
    found = margin(plan)
    if found is not None and not _is_the_plan(plan, found.baseline, plan.baselines[found.baseline]):
        share = f"{abs(found.speedup - 1):.1%}"
        does = f"{'wins' if found.speedup > 1 else 'loses'} {share} against"
        if share == f"{0:.1%}":
            does = "is as fast as"
        sentences.append(
            f"over a whole generation the plan {does} {found.baseline}, the fastest strategy on "
            "test"
        )
    return sentences


def _is_the_plan(plan: Plan, name: str, baseline: Baseline) -> bool:
    """Whether a strategy was chosen as it stands, not one of the same name for less memory."""
    forecast = plan.prediction
    same = (forecast.ttft_s, forecast.tpot_s) == (baseline.ttft_s, baseline.tpot_s)
    return same and name == plan.planner.chosen
