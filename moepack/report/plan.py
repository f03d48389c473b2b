"""A plan: what it decides, what it expects, and what else would have cost."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from moepack.footprint import MemoryBreakdown
from moepack.forecast import PlannerReport, Prediction
from moepack.plan import Plan
from moepack.precision import Precision
from moepack.predicted_quality import PredictedQuality
from moepack.report.classes import classes_view, quality_rows
from moepack.report.layers import layers_view
from moepack.report.strategies import strategies_view
from moepack.report.tables import columns, facts, figure
from moepack.trunk import trunk_name
from moepack.units import format_duration, format_size


def plan_view(
    plan: Plan, precision: Precision, quality: PredictedQuality | None = None
) -> RenderableType:
    """What a plan decides and what it expects; ``quality``: of what is rounded, if known."""
    placement = plan.placement
    forecast = plan.prediction
    overview = facts(
        [
            ("model", plan.model_name),
            ("experts", experts_words(plan, precision) + _rounding_words(plan)),
            *trunk_rows(plan, quality),
            *(() if quality is None else quality_rows(quality, mixed=precision.quality == "mixed")),
            ("hardware", plan.provenance.hardware),
            ("device", placement.device),
            (
                "fast memory",
                (
                    f"{format_size(placement.memory.total_bytes)} of "
                    f"{format_size(placement.fast_budget_bytes)}"
                ),
            ),
            *(() if placement.host is None else [("host memory", host_sentence(plan))]),
            *(() if not plan.layout.low else [("misses", misses_sentence(plan))]),
            ("context", f"{placement.context_tokens} tokens (at most {plan.max_context_tokens})"),
        ]
    )
    expected = facts(
        [
            (
                "first token",
                f"{format_duration(forecast.ttft_s)} after {placement.prompt_tokens} tokens",
            ),
            (
                "each token",
                f"{format_duration(forecast.tpot_s)} ({figure(forecast.tokens_per_s)} tokens/s)",
            ),
            ("hit rate", f"{forecast.hit_rate:.1%}"),
            ("over the link", _over_the_link(forecast)),
            ("band", f"within a factor of {forecast.band:.3g}"),
        ]
    )
    parts: list[RenderableType] = [
        overview,
        "",
        memory_view(placement.memory),
        "",
        layers_view(plan),
        *(["", classes_view(plan)] if any(cut.encodings for cut in plan.layout.layers) else []),
        "",
        expected,
    ]
    if plan.baselines:
        parts += ["", strategies_view(plan)]
    parts += ["", planner_sentence(plan.planner)]
    parts += [f"assumed: {sentence}" for sentence in plan.provenance.assumptions]
    return Group(*parts)


def precision_words(precision: Precision) -> str:
    """What experts are stored in."""
    return f"{precision.quality}, {precision.mean_bits:.3g} bits a weight"


def experts_words(plan: Plan, precision: Precision) -> str:
    """The same of a plan, which may take something else for what is missing."""
    if plan.placement.on_miss is None or precision.quality != "exact":
        return precision_words(precision)
    return f"{precision.mean_bits:.3g} bits a weight, of missing ones fewer or none"


def trunk_rows(plan: Plan, quality: PredictedQuality | None = None) -> list[tuple[str, str]]:
    """That the trunk is rounded, where it is, and whether what that does is known."""
    if not plan.layout.trunk:
        return []
    words = f"{trunk_name(plan.layout.trunk)}: rounded, but for routers, norms and what is small"
    alone = None if quality is None else quality.trunk_divergence
    if alone is not None:
        words += f"; alone KL {figure(alone)} nats, which is in the prediction"
    elif quality is not None:
        words += "; what that does is not in the prediction (measured by moepack profile --bits)"
    return [("trunk", words)]


def _rounding_words(plan: Plan) -> str:
    return ", rounded by calibration" if plan.layout.calibration else ""


def misses_sentence(plan: Plan) -> str:
    """What is fetched for a missing expert, where there are low copies."""
    rule = plan.placement.on_miss
    if rule is None:
        return f"fetched exact; low copies in {plan.layout.low} are not used"
    exact = f"exact up to {rule.exact_up_to:g} of a token's weights, "
    if rule.low_up_to >= 1:
        return f"{exact}low copies in {plan.layout.low} beyond"
    return f"{exact}up to {rule.low_up_to:g} low copies in {plan.layout.low}, left out beyond"


def host_sentence(plan: Plan) -> str:
    """What is pinned of a device's host, and what it holds of the experts."""
    host = plan.placement.host
    assert host is not None, "the processor computes"
    pinned = f"{format_size(host.total_bytes)} pinned"
    if not host.bounces:
        return f"{pinned}: RAM holds all experts"
    share = host.held_bytes / plan.prediction.slow_bytes
    return f"{pinned}: RAM holds {share:.0%} of the experts, the disk the rest"


def _over_the_link(forecast: Prediction) -> str:
    text = f"{format_size(forecast.link_bytes_per_token)} a token"
    if not forecast.disk_bytes_per_token:
        return text
    return f"{text}, {format_size(forecast.disk_bytes_per_token)} of it from the disk"


def planner_sentence(report: PlannerReport) -> str:
    """How long planning took, what it replayed, and how near to the exact optimum it came."""
    text = (
        f"planned in {format_duration(report.seconds)}: {report.replayed_events:,} passes of a "
        "layer replayed"
    )
    if report.gap_to_exact is not None:
        text += f", exchanged budgets {report.gap_to_exact:.2%} from the exact optimum"
    return text


def memory_view(memory: MemoryBreakdown) -> Table:
    """Fast memory by purpose."""
    return columns(("fast memory", "bytes", "share"), memory_rows(memory))


def memory_rows(memory: MemoryBreakdown) -> list[tuple[str, str, str]]:
    """Each purpose, its bytes and its share."""
    rows = [
        ("trunk", memory.trunk_bytes),
        ("KV cache", memory.kv_bytes),
        ("hidden states", memory.hidden_bytes),
        ("workspace", memory.workspace_bytes),
        ("staging", memory.staging_bytes),
        ("expert slots", memory.slots_bytes),
    ]
    return [
        (name, format_size(size_bytes), f"{size_bytes / memory.total_bytes:.0%}")
        for name, size_bytes in rows
    ]
