"""What a model would take of the fast tier, before anything is planned."""

from __future__ import annotations

from typing import NamedTuple

from moepack.budget import memory_breakdown
from moepack.layout import LayerLayout, Layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement
from moepack.working_memory import kv_bytes


class Needs(NamedTuple):
    """What a model takes of the fast tier, uncut, at one context length.

    Attributes
    ----------
    kv_bytes : int
        The KV cache alone.
    least_bytes : int
        With no expert cached and one in flight: no plan takes less.
    resident_bytes : int
        With every expert cached: no plan gains from more.
    """

    kv_bytes: int
    least_bytes: int
    resident_bytes: int


def needs(spec: ModelSpec, context_tokens: int) -> Needs:
    """What a model would take at the least, and at the most."""
    uncut = Layout(
        spec.digest,
        tuple(
            LayerLayout(layer, moe.intermediate_size, moe.intermediate_size, 1, spec.dtype)
            for layer in spec.moe_layers
            for moe in (spec.moe(layer),)
        ),
    )

    def total_bytes(cached: bool) -> int:
        layers = [
            LayerPlacement(
                layer=layer,
                budget_bytes=0,
                top_slots=spec.moe(layer).num_experts if cached else 0,
                bottom_slots=0,
                policy="lru",
                hot=tuple(range(spec.moe(layer).num_experts)),
            )
            for layer in spec.moe_layers
        ]
        return memory_breakdown(
            spec, uncut, layers, staging_experts=1, context_tokens=context_tokens
        ).total_bytes

    return Needs(
        kv_bytes=kv_bytes(spec, context_tokens, uncut.prefill_block_tokens),
        least_bytes=total_bytes(cached=False),
        resident_bytes=total_bytes(cached=True),
    )
