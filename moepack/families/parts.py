"""What outlines are made of: attention and experts, as most families describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from moepack.families.config import MAX_LAYERS, Config
from moepack.families.rope import yarn_mscale
from moepack.model_spec import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlaSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
)

#: Routed experts are numbered in 16 bits in the routing profile.
MAX_EXPERTS = 65_535


def attention(
    config: Config,
    *,
    window: int | None = None,
    rotary: float = 1.0,
    qk_norm: Literal["none", "head", "full"] = "none",
    qkv_bias: bool = False,
    output_bias: bool = False,
    sinks: bool = False,
) -> AttentionSpec:
    """Grouped-query attention, whose keys are the same everywhere."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.damaged(
            f"num_attention_heads = {heads}, num_key_value_heads = {kv_heads}", "a multiple"
        )
    head_dim = config.optional_integer("head_dim") or config.integer("hidden_size") // heads
    rotary_dim = int(head_dim * rotary)
    if head_dim == 0 or rotary_dim % 2:
        raise config.damaged(f"{rotary_dim} rotated dimensions a head", "an even number")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        rotary_dim=rotary_dim,
        scale=head_dim**-0.5,
        window=window,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        sinks=sinks,
    )


def latent_attention(config: Config, rope: RopeSpec) -> AttentionSpec:
    """Multi-head latent attention (DeepSeek)."""
    heads = config.integer("num_attention_heads")
    if (config.optional_integer("num_key_value_heads") or heads) != heads:
        raise config.damaged(
            f"num_key_value_heads = {config.value('num_key_value_heads')}", f"{heads}, as the heads"
        )
    mla = MlaSpec(
        q_rank=config.optional_integer("q_lora_rank"),
        kv_rank=config.integer("kv_lora_rank"),
        nope_dim=config.integer("qk_nope_head_dim"),
        rope_dim=config.integer("qk_rope_head_dim"),
    )
    if mla.rope_dim % 2:
        raise config.damaged(f"qk_rope_head_dim = {mla.rope_dim}", "an even number")
    head_dim = mla.nope_dim + mla.rope_dim
    scale = head_dim**-0.5
    if rope.mscale_all_dim and rope.factor is not None:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        value_dim=config.integer("v_head_dim"),
        rotary_dim=mla.rope_dim,
        scale=scale,
        qkv_bias=config.flag("attention_bias"),
        output_bias=config.flag("attention_bias"),
        mla=mla,
    )


def windows(
    config: Config, window: int | None, *, before: int = MAX_LAYERS
) -> tuple[int | None, ...]:
    """Each layer's window: as ``layer_types`` says, else in every other layer ``before`` one."""
    count = num_layers(config)
    types = config.texts("layer_types")
    if types is None:
        return tuple(window if i % 2 == 0 and i < before else None for i in range(count))
    if len(types) < count:
        raise config.damaged(f"{len(types)} layer_types", f"{count}, one a layer")
    made: list[int | None] = []
    for kind in types[:count]:
        if kind == "full_attention":
            made.append(None)
        elif kind == "sliding_attention" and window is not None:
            made.append(window)
        else:
            expected = "'full_attention', or 'sliding_attention' with a sliding_window in use"
            raise config.unsupported("layer_types", kind, expected)
    return tuple(made)


def activation(config: Config) -> Activation:
    """The activation of the gated FFNs; ``gelu`` is the exact one."""
    config.expect("hidden_act", "silu", "swish", "gelu")
    return "gelu" if config.value("hidden_act") == "gelu" else "silu"


def experts(config: Config, experts_key: str, width_key: str, router: RouterSpec) -> MoeSpec:
    """Routed experts, without what only some families have."""
    num_experts = config.integer(experts_key, high=MAX_EXPERTS)
    top_k = config.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise config.damaged(f"num_experts_per_tok = {top_k}", f"at most the {num_experts} experts")
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=config.integer(width_key),
        router=router,
        activation=activation(config),
    )


def groups(config: Config, experts_key: str, smallest: int) -> tuple[int, int]:
    """(num_groups, top_groups); (1, 1) where every group may be chosen."""
    num_groups = config.optional_integer("n_group") or 1
    top_groups = config.optional_integer("topk_group") or 1
    num_experts = config.integer(experts_key)
    size = num_experts // num_groups
    if num_experts % num_groups or top_groups > num_groups or size < smallest:
        raise config.damaged(
            f"{num_experts} experts, n_group = {num_groups}, topk_group = {top_groups}",
            f"equal groups of at least {smallest}, and no more chosen than there are",
        )
    if size * top_groups < config.integer("num_experts_per_tok"):
        raise config.damaged(
            f"topk_group = {top_groups} groups of {size} experts",
            f"room for the {config.integer('num_experts_per_tok')} experts of a token",
        )
    return (1, 1) if num_groups == top_groups else (num_groups, top_groups)


def shared(config: Config, moe: MoeSpec) -> MoeSpec:
    """With DeepSeek's shared experts, which act as one of their joint width."""
    count = config.optional_integer("n_shared_experts", low=0) or 0
    return dataclasses.replace(moe, shared_intermediate_size=count * moe.intermediate_size)


def layers(
    config: Config,
    attention: AttentionSpec,
    moe: MoeSpec,
    *,
    windows: Sequence[int | None] | None = None,
    sparse: Callable[[int], bool] | None = None,
) -> tuple[LayerSpec, ...]:
    """The layers: dense where not ``sparse``, with their own ``windows`` where there are any."""
    made = []
    for i in range(num_layers(config)):
        kind = attention if windows is None else dataclasses.replace(attention, window=windows[i])
        if sparse is None or sparse(i):
            made.append(LayerSpec(kind, moe, None))
        else:
            width = config.integer("intermediate_size")
            made.append(LayerSpec(kind, None, width, activation(config)))
    return tuple(made)


def num_layers(config: Config) -> int:
    """How many decoder layers there are."""
    return config.integer("num_hidden_layers", high=MAX_LAYERS)
