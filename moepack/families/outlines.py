"""How each family's config describes its layers.

An *outline* holds what differs between families and cannot be the default of a key: there is one
function a family, and nothing else knows a family's habits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moepack.families import parts
from moepack.families.config import Config
from moepack.families.rope import read_rope, rotary_fraction
from moepack.model_spec import LayerSpec, Norm, RopeSpec, RouterSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Outline:
    """What a config says of a model's layers."""

    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    norm: Norm = "rms"
    head_bias: bool = False


def mixtral(config: Config) -> Outline:
    """Mixtral."""
    attention = parts.attention(config, window=config.optional_integer("sliding_window"))
    experts = config.alias("num_local_experts", "num_experts")
    moe = parts.experts(config, experts, "intermediate_size", RouterSpec(normalise=True))
    return Outline(read_rope(config), parts.layers(config, attention, moe))


def phimoe(config: Config) -> Outline:
    """PhiMoE: layer norms, longrope, and the sparse mixer, which takes two experts."""
    rope = read_rope(config)
    if rope.kind != "default" and (rope.kind != "longrope" or rope.short_mscale is None):
        raise config.unsupported("rope_type", rope.kind, "longrope with short_ and long_mscale")
    bias = config.flag("attention_bias")
    window = config.optional_integer("sliding_window")
    attention = parts.attention(config, window=window, qkv_bias=bias, output_bias=bias)
    config.expect("num_experts_per_tok", 2)  # the sparse mixer chooses two, whatever is asked
    router = RouterSpec(scoring="sparsemixer", jitter=config.number("router_jitter_noise"))
    experts = config.alias("num_local_experts", "num_experts")
    moe = parts.experts(config, experts, "intermediate_size", router)
    layers = parts.layers(config, attention, moe)
    return Outline(rope, layers, norm="layer", head_bias=config.flag("lm_head_bias"))


def olmoe(config: Config) -> Outline:
    """OLMoE: queries and keys are normed over all heads, and may be clipped."""
    bias = config.flag("attention_bias")
    attention = parts.attention(config, qk_norm="full", qkv_bias=bias, output_bias=bias)
    attention = dataclasses.replace(attention, clip=config.optional_number("clip_qkv"))
    router = RouterSpec(normalise=config.flag("norm_topk_prob"))
    experts = config.alias("num_experts", "num_local_experts")
    moe = parts.experts(config, experts, "intermediate_size", router)
    return Outline(read_rope(config), parts.layers(config, attention, moe))


def _qwen_window(config: Config) -> int | None:
    window = config.optional_integer("sliding_window", low=0)
    return window if window and config.flag("use_sliding_window") else None


def _qwen_is_sparse(config: Config) -> Callable[[int], bool]:
    dense = set(config.integers("mlp_only_layers"))
    step = config.integer("decoder_sparse_step")
    return lambda layer: layer not in dense and (layer + 1) % step == 0


def qwen2_moe(config: Config) -> Outline:
    """Qwen2-MoE: a gated shared expert; windows in every other of the first layers."""
    window = _qwen_window(config)
    windows = parts.windows(config, window, before=config.integer("max_window_layers", low=0))
    attention = parts.attention(config, qkv_bias=config.flag("qkv_bias"))
    router = RouterSpec(normalise=config.flag("norm_topk_prob"))
    experts = config.alias("num_experts", "num_local_experts")
    moe = dataclasses.replace(
        parts.experts(config, experts, "moe_intermediate_size", router),
        shared_intermediate_size=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = parts.layers(config, attention, moe, windows=windows, sparse=_qwen_is_sparse(config))
    return Outline(read_rope(config), layers)


def qwen3_moe(config: Config) -> Outline:
    """Qwen3-MoE: queries and keys are normed per head."""
    window = _qwen_window(config)
    bias = config.flag("attention_bias")
    attention = parts.attention(
        config, window=window, qk_norm="head", qkv_bias=bias, output_bias=bias
    )
    router = RouterSpec(normalise=config.flag("norm_topk_prob"))
    experts = config.alias("num_experts", "num_local_experts")
    moe = parts.experts(config, experts, "moe_intermediate_size", router)
    layers = parts.layers(config, attention, moe, sparse=_qwen_is_sparse(config))
    return Outline(read_rope(config), layers)


def _deepseek_is_sparse(config: Config) -> Callable[[int], bool]:
    first = config.integer("first_k_dense_replace", low=0)
    every = config.integer("moe_layer_freq")
    return lambda layer: layer >= first and layer % every == 0


def deepseek_v2(config: Config) -> Outline:
    """DeepSeek-V2."""
    config.expect("scoring_func", None, "softmax")
    config.expect("topk_method", "greedy", "group_limited_greedy")
    config.expect("norm_topk_prob", False, None)
    config.expect("mlp_bias", False)
    experts = config.alias("n_routed_experts", "num_experts", "num_local_experts")
    grouped = config.value("topk_method") == "group_limited_greedy"
    num_groups, top_groups = parts.groups(config, experts, 1) if grouped else (1, 1)
    router = RouterSpec(
        num_groups=num_groups,
        top_groups=top_groups,
        scaling=config.number("routed_scaling_factor"),
        float32=True,
    )
    rope = read_rope(config, interleaved=True)
    attention = parts.latent_attention(config, rope)
    moe = parts.shared(config, parts.experts(config, experts, "moe_intermediate_size", router))
    return Outline(rope, parts.layers(config, attention, moe, sparse=_deepseek_is_sparse(config)))


def _sigmoid_router(config: Config, experts_key: str) -> RouterSpec:
    """DeepSeek-V3's router, which GLM-4 shares."""
    config.expect("scoring_func", None, "sigmoid")
    config.expect("topk_method", None, "noaux_tc")
    num_groups, top_groups = parts.groups(config, experts_key, 2)
    return RouterSpec(
        scoring="sigmoid",
        normalise=config.flag("norm_topk_prob"),
        correction_bias=True,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score="top2_sum",
        masked_score="minus_inf",
        scaling=config.number("routed_scaling_factor"),
        float32=True,
    )


def deepseek_v3(config: Config) -> Outline:
    """DeepSeek-V3, and Kimi-K2."""
    experts = config.alias("n_routed_experts", "num_local_experts", "num_experts")
    rope = read_rope(config, interleaved=config.flag("rope_interleave"))
    attention = parts.latent_attention(config, rope)
    router = _sigmoid_router(config, experts)
    moe = parts.shared(config, parts.experts(config, experts, "moe_intermediate_size", router))
    return Outline(rope, parts.layers(config, attention, moe, sparse=_deepseek_is_sparse(config)))


def glm4_moe(config: Config) -> Outline:
    """GLM-4-MoE: DeepSeek-V3's experts behind grouped-query attention, partly rotated."""
    attention = parts.attention(
        config,
        rotary=rotary_fraction(config),
        qk_norm="head" if config.flag("use_qk_norm") else "none",
        qkv_bias=config.flag("attention_bias"),
    )
    experts = config.alias("n_routed_experts", "num_local_experts", "num_experts")
    router = _sigmoid_router(config, experts)
    moe = parts.shared(config, parts.experts(config, experts, "moe_intermediate_size", router))
    sparse = _deepseek_is_sparse(config)
    return Outline(read_rope(config), parts.layers(config, attention, moe, sparse=sparse))


def gpt_oss(config: Config) -> Outline:
    """GPT-OSS: sinks, biases everywhere, windows in every other layer."""
    window = config.optional_integer("sliding_window")
    windows = parts.windows(config, window)
    bias = config.flag("attention_bias")
    attention = parts.attention(config, qkv_bias=bias, output_bias=bias, sinks=True)
    config.expect("hidden_act", "silu")
    router = RouterSpec(scoring="topk_softmax", bias=True)
    experts = config.alias("num_local_experts", "num_experts")
    moe = dataclasses.replace(
        parts.experts(config, experts, "intermediate_size", router),
        activation="clamped_swiglu",
        activation_alpha=config.number("swiglu_alpha"),
        activation_limit=config.positive("swiglu_limit"),
        expert_bias=True,
    )
    return Outline(read_rope(config), parts.layers(config, attention, moe, windows=windows))
