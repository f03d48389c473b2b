"""What ``moepack plan`` answers with: a plan, plans over a range of budgets, an explanation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moepack import records
from moepack.cli.progress import TerminalProgress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moepack.damage import DamageProfile
    from moepack.explain import Explanation
    from moepack.plan import Plan
    from moepack.planner import Planner
    from moepack.precision import Precision
    from moepack.predicted_quality import PredictedQuality
    from moepack.sweep import Sweep


class Asked(NamedTuple):
    """What a plan is asked for.

    Attributes
    ----------
    fast_budget_bytes : int or None
        Of a plan of its own; None where only a sweep was asked for.
    swept_bytes : tuple of int or None
        Ends of a sweep.
    """

    fast_budget_bytes: int | None
    swept_bytes: tuple[int, int] | None
    explain: bool
    page: Path | None

    @property
    def most_bytes(self) -> int:
        """The largest budget that is asked about."""
        return max(self.fast_budget_bytes or 0, *(self.swept_bytes or (0,)))


class Answer(NamedTuple):
    """What was found.

    Attributes
    ----------
    shown : Plan
        The plan that was asked for, or one of the sweep's: what is explained.
    precision : Precision
        Of that plan's experts.
    quality : PredictedQuality or None
        What that is predicted to do; None where nothing is rounded, or it has not been measured.
    """

    plan: Plan | None
    swept: Sweep | None
    explanation: Explanation | None
    shown: Plan
    precision: Precision
    quality: PredictedQuality | None = None


def find_answer(planner: Planner, asked: Asked, damage: DamageProfile | None = None) -> Answer:
    """Plan, sweep and explain; writes the page.

    ``damage``: what was measured of the model's experts, to say what rounding them will do.
    """
    from moepack.explain import explain
    from moepack.precision import precision_of
    from moepack.predicted_quality import predicted_quality
    from moepack.sweep import shown_plan, sweep

    progress = TerminalProgress()
    plan = (
        None if asked.fast_budget_bytes is None else planner.plan(asked.fast_budget_bytes, progress)
    )
    swept = None
    if asked.swept_bytes is not None:
        swept = sweep(planner, *asked.swept_bytes, progress)
    shown = plan
    if shown is None:
        assert swept is not None, "neither a budget nor a range of them"
        shown = shown_plan(swept)
    explanation = None
    if asked.explain or asked.page is not None:
        explanation = explain(planner, shown, progress)
    spec = planner.request.spec
    precision = precision_of(spec, shown.layout)
    quality = None
    if damage is not None and (precision.quality != "exact" or shown.layout.trunk):
        quality = predicted_quality(spec, damage, shown.layout)
    answer = Answer(plan, swept, explanation, shown, precision, quality)
    if asked.page is not None:
        _write_page(planner, answer, asked.page)
    return answer


def answer_document(answer: Answer) -> dict[str, Any]:
    """The keys that an explanation, a sweep and either's precision add to a plan's document."""
    found: dict[str, Any] = answer.precision._asdict()
    if answer.quality is not None:
        found["predicted_quality"] = records.to_data(answer.quality)
    if answer.explanation is not None:
        found["explanation"] = records.to_data(answer.explanation)
        if answer.plan is None:
            found["explained_budget_bytes"] = answer.shown.placement.fast_budget_bytes
    if answer.swept is not None:
        found["model"] = answer.swept.plans[0].model_name
        found["model_digest"] = answer.swept.plans[0].model_digest
        found["sweep"] = [records.to_data(point) for point in answer.swept.points]
    return found


def answer_view(answer: Answer) -> RenderableType:
    """All of it for people."""
    from rich.console import Group

    from moepack.report.explain import explanation_view
    from moepack.report.plan import plan_view
    from moepack.report.sweep import sweep_view
    from moepack.units import short_size

    parts: list[RenderableType] = []
    if answer.plan is not None:
        parts.append(plan_view(answer.plan, answer.precision, answer.quality))
    if answer.swept is not None:
        parts += [""] * bool(parts) + [sweep_view(answer.swept, answer.precision, answer.plan)]
    if answer.explanation is not None:
        parts += [""] * bool(parts)
        if answer.plan is None:
            parts.append(f"with {short_size(answer.shown.placement.fast_budget_bytes)}:")
        parts.append(explanation_view(answer.explanation))
    return Group(*parts)


def _write_page(planner: Planner, answer: Answer, path: Path) -> None:
    from moepack.atomic import write_atomically
    from moepack.cli.output import note
    from moepack.hit_panels import hit_panels
    from moepack.report.page import PageContents, plan_page
    from moepack.report.routing import layer_bands

    assert answer.explanation is not None, "a page tells what limits"
    bands = layer_bands(planner.request.routing.summary.layers)
    page = plan_page(
        PageContents(
            plan=answer.shown,
            asked_for=answer.plan is not None,
            explanation=answer.explanation,
            panels=hit_panels(answer.shown, planner.tables, bands),
            precision=answer.precision,
            swept=answer.swept,
        )
    )
    write_atomically(path, page)
    note(f"page written to {path}")
