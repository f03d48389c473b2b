"""The placement of a model that only passes through: nothing of its experts stays."""

from __future__ import annotations

from moepack.budget import memory_breakdown
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import DeviceKind, LayerPlacement, Placement


def most_experts_of_a_token(spec: ModelSpec) -> int:
    """Routed experts that a token uses in the layer where it uses most."""
    return max(spec.moe(number).top_k for number in spec.moe_layers)


def streaming_placement(
    spec: ModelSpec,
    layout: Layout,
    device: DeviceKind,
    threads: int,
    *,
    context_tokens: int,
    staging_experts: int,
) -> Placement:
    """No slots: so many experts in flight, and a budget of what that takes."""
    layers = tuple(
        LayerPlacement(number, 0, 0, 0, "lru", tuple(range(spec.moe(number).num_experts)))
        for number in spec.moe_layers
    )
    memory = memory_breakdown(
        spec,
        layout,
        layers,
        staging_experts=staging_experts,
        context_tokens=context_tokens,
        threads=threads,
    )
    return Placement(
        device=device,
        fast_budget_bytes=memory.total_bytes,
        staging_experts=staging_experts,
        context_tokens=context_tokens,
        prompt_tokens=context_tokens - 1,
        new_tokens=1,
        memory=memory,
        layers=layers,
        threads=threads,
    )
