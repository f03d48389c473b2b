"""Models, machines and placements of any shape, without weights: for what only counts and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moepack.compute import ComputeProfile, Curve, LayerCompute
from moepack.cost import LinkSeconds
from moepack.footprint import MemoryBreakdown
from moepack.layout import Layout
from moepack.layouts import layer_layout
from moepack.model_spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec, RouterSpec
from moepack.plan import LayerPlacement, Placement, SharedPool
from moepack.routing import RoutingProfile, make_profile
from moepack.routing_tables import RoutingTables
from moepack.trace import LayerShape, Trace

ATTENTION = AttentionSpec(
    num_heads=2, num_kv_heads=2, head_dim=32, value_dim=32, rotary_dim=32, scale=1.0
)
MEMORY = MemoryBreakdown(0, 0, 0, 0, 0, 0)


def model_of(shapes: Sequence[LayerShape], *, width: int = 64, tail: int = 0) -> ModelSpec:
    """A decoder with these layers; those that no shape names, and ``tail`` more, are dense."""
    known = {shape.layer: shape for shape in shapes}
    layers = []
    for number in range(max(known) + 1 + tail):
        shape = known.get(number)
        moe = shape and MoeSpec(shape.num_experts, shape.top_k, width, RouterSpec())
        layers.append(LayerSpec(ATTENTION, moe, None if shape else 4 * width))
    return ModelSpec(
        name="drawn",
        family="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        dtype="BF16",
        vocab_size=100,
        hidden_size=64,
        context_length=4096,
        norm="rms",
        norm_eps=1e-6,
        tied_embeddings=True,
        rope=RopeSpec(1e4),
        layers=tuple(layers),
        trunk=(),
    )


def compute_of(spec: ModelSpec, layers: Sequence[LayerCompute], *, head_s: float) -> ComputeProfile:
    """A compute profile with these entries."""
    return ComputeProfile(
        version=1,
        model_name=spec.name,
        model_digest=spec.digest,
        device="cpu",
        threads=1,
        source="derived",
        how="drawn",
        recorded_utc="",
        context_tokens=64,
        head_s=head_s,
        spread=0.0,
        layers=tuple(layers),
    )


def flat(seconds: float) -> Curve:
    """The same for any number of tokens."""
    return Curve((1,), (seconds,))


def layer_compute(
    layers: Sequence[int],
    *,
    attention: float,
    expert: float | None,
    ffn: float | None = None,
    transfer: float = 0.0,
) -> LayerCompute:
    """Constant times; an expert takes the same in one segment and in two, the router nothing."""
    curve = None if expert is None else flat(expert)
    return LayerCompute(
        layers=tuple(layers),
        attention=flat(attention),
        router=None if expert is None else flat(0.0),
        expert=curve,
        expert_split=curve,
        ffn=None if ffn is None else flat(ffn),
        transfer_s=transfer,
    )


def drawn_compute(spec: ModelSpec, rng: np.random.Generator) -> ComputeProfile:
    """Every layer with its own times, in the order of milliseconds."""

    def curve(scale: float = 1e-3) -> Curve:
        one, slope = scale * rng.random(2)
        return Curve((1, 4, 16), (one, one + slope, one + 3 * slope))

    entries = []
    for number, layer in enumerate(spec.layers):
        routed = layer.moe is not None
        entries.append(
            LayerCompute(
                layers=(number,),
                attention=curve(),
                router=curve(1e-4) if routed else None,
                expert=curve() if routed else None,
                expert_split=curve() if routed else None,
                ffn=curve() if not routed or rng.random() < 0.5 else None,
                transfer_s=(transfer_s := float(rng.choice([0.0, 1e-4]))),
                burst_s=(burst_s := float(rng.choice([0.0, 2e-4]))),
                ahead_transfer_s=transfer_s / 2,
                ahead_burst_s=burst_s / 4,
                fixed=curve(1e-4) if routed else None,
            )
        )
    return compute_of(spec, entries, head_s=float(rng.random() * 1e-3))


def profile_of(spec: ModelSpec, trace: Trace, shapes: Sequence[LayerShape]) -> RoutingProfile:
    """A trace as a profile of a model."""
    return make_profile(
        trace,
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="",
        how="drawn",
        sources=(),
        layers=tuple(shapes),
    )


def placed(
    layout: Layout,
    layers: Sequence[LayerPlacement],
    *,
    staging: int,
    pool: SharedPool | None = None,
) -> Placement:
    """A placement whose bytes nobody asks for."""
    return Placement(
        device="cpu",
        fast_budget_bytes=0,
        staging_experts=staging,
        context_tokens=64,
        prompt_tokens=16,
        new_tokens=16,
        memory=MEMORY,
        layers=tuple(layers),
        pool=pool,
    )


def layout_of(
    spec: ModelSpec,
    ratios: Sequence[float],
    *,
    block_tokens: int = 8,
    encoding: str | None = None,
) -> Layout:
    """Each layer cut near its own ratio; in the model's dtype, or in one encoding."""
    layers = tuple(
        layer_layout(spec, number, ratio, encoding)
        for number, ratio in zip(spec.moe_layers, ratios, strict=True)
    )
    return Layout(spec.digest, layers, block_tokens)


@dataclass(frozen=True)
class Setting:
    """A model on a machine with its routing: what a replay is given."""

    spec: ModelSpec
    compute: ComputeProfile
    tables: RoutingTables
    link: LinkSeconds
