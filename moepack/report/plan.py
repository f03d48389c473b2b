"""A plan: what it decides, what it expects, and what else would have cost."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from moepack.plan import MemoryBreakdown, Plan
from moepack.report.tables import by_layer, columns, facts, figure
from moepack.units import format_duration, format_size


def plan_view(plan: Plan) -> RenderableType:
    """What a plan decides and what it expects."""
    placement = plan.placement
    forecast = plan.prediction
    overview = facts(
        [
            ("model", plan.model_name),
            ("hardware", plan.provenance.hardware),
            ("device", placement.device),
            (
                "fast memory",
                (
                    f"{format_size(placement.memory.total_bytes)} of "
                    f"{format_size(placement.fast_budget_bytes)}"
                ),
            ),
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
            ("over the link", f"{format_size(forecast.link_bytes_per_token)} a token"),
            ("band", f"within a factor of {forecast.band:.3g}"),
        ]
    )
    parts: list[RenderableType] = [
        overview,
        "",
        memory_view(placement.memory),
        "",
        _layers(plan),
        "",
        expected,
    ]
    if plan.baselines:
        parts += ["", _baselines(plan)]
    if plan.provenance.assumptions:
        parts.append("")
        parts += [f"assumed: {sentence}" for sentence in plan.provenance.assumptions]
    return Group(*parts)


def memory_view(memory: MemoryBreakdown) -> Table:
    """Fast memory by purpose."""
    rows = [
        ("trunk", memory.trunk_bytes),
        ("KV cache", memory.kv_bytes),
        ("hidden states", memory.hidden_bytes),
        ("workspace", memory.workspace_bytes),
        ("staging", memory.staging_bytes),
        ("expert slots", memory.slots_bytes),
    ]
    return columns(
        ("fast memory", "bytes", "share"),
        (
            (name, format_size(size_bytes), f"{size_bytes / memory.total_bytes:.0%}")
            for name, size_bytes in rows
        ),
    )


def _layers(plan: Plan) -> Table:
    return columns(
        ("layer", "split", "tops", "bottoms", "slots", "policy", "prefetch"),
        by_layer(
            (
                place.layer,
                (
                    f"{cut.split_ratio:.2f}",
                    f"{place.top_slots}/{len(place.hot)}",
                    f"{place.bottom_slots}/{len(place.hot)}",
                    format_size(place.budget_bytes),
                    place.policy,
                    str(place.prefetch_depth or "off"),
                ),
            )
            for cut, place in zip(plan.layout.layers, plan.placement.layers, strict=True)
        ),
    )


def _baselines(plan: Plan) -> Table:
    return columns(
        ("strategy", "first token", "each token", ""),
        (
            (
                name,
                format_duration(baseline.ttft_s),
                format_duration(baseline.tpot_s),
                "" if baseline.eligible else "bound",
            )
            for name, baseline in plan.baselines.items()
        ),
    )
