"""The trunk's tensors: our names and shapes, and the names they have in checkpoints.

Across the families a module goes by a handful of names, so one map of alternatives serves them
all; a checkpoint has exactly one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Protocol

from moepack.errors import LeftoverTensorError, MissingTensorError
from moepack.model_spec import AttentionSpec, LayerSpec, Norm

Shape = tuple[int, ...]

_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}

#: Canonical module of a layer -> its possible names within ``model.layers.{i}``.
_MODULES: dict[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "attn": ("self_attn",),
    **{f"attn.{p}": (f"self_attn.{p}_proj",) for p in ("q", "k", "v", "o", "q_a", "q_b", "kv_b")},
    "attn.kv_a": ("self_attn.kv_a_proj_with_mqa",),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.q_a_norm": ("self_attn.q_a_layernorm",),
    "attn.kv_a_norm": ("self_attn.kv_a_layernorm",),
    **{f"mlp.{p}": (f"mlp.{p}_proj",) for p in ("gate", "up", "down")},
    "router": ("mlp.gate", "mlp.router", "block_sparse_moe.gate"),
    **{
        f"shared.{p}": (f"mlp.shared_experts.{p}_proj", f"mlp.shared_expert.{p}_proj")
        for p in ("gate", "up", "down")
    },
    "shared_gate": ("mlp.shared_expert_gate",),
}
_LEAVES = {"correction_bias": "e_score_correction_bias"}

#: Buffers that old exports carry, recomputed from the config.
_BUFFERS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_LAYER = re.compile(r"model\.layers\.(\d+)\..+")


class Header(Protocol):
    """What is asked of a source tensor's header."""

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""

    @property
    def shape(self) -> Shape:
        """Sizes of the dimensions."""


def trunk_shapes(
    layers: tuple[LayerSpec, ...],
    *,
    vocab_size: int,
    hidden_size: int,
    norm: Norm,
    tied: bool,
    head_bias: bool,
) -> Iterator[tuple[str, Shape]]:
    """Every trunk tensor of a model under its canonical name, in the order of the trunk shard."""
    yield "embed.weight", (vocab_size, hidden_size)
    for i, layer in enumerate(layers):
        for name, shape in _layer_shapes(layer, hidden_size, norm):
            yield f"layers.{i}.{name}", shape
    yield from _norm("norm", hidden_size, norm)
    if not tied:
        yield "head.weight", (vocab_size, hidden_size)
    if head_bias:
        yield "head.bias", (vocab_size,)


def _layer_shapes(layer: LayerSpec, hidden: int, norm: Norm) -> Iterator[tuple[str, Shape]]:
    yield from _norm("attn_norm", hidden, norm)
    yield from _attention_shapes(layer.attention, hidden)
    yield from _norm("mlp_norm", hidden, norm)
    if layer.dense_intermediate_size is not None:
        yield from _gated("mlp", layer.dense_intermediate_size, hidden)
    if layer.moe is None:
        return
    moe = layer.moe
    yield from _linear("router", moe.num_experts, hidden, moe.router.bias)
    if moe.router.correction_bias:
        yield "router.correction_bias", (moe.num_experts,)
    if moe.shared_intermediate_size:
        yield from _gated("shared", moe.shared_intermediate_size, hidden)
    if moe.shared_gate:
        yield "shared_gate.weight", (1, hidden)


def _attention_shapes(kind: AttentionSpec, hidden: int) -> Iterator[tuple[str, Shape]]:
    queries = kind.num_heads * kind.head_dim
    keys = kind.num_kv_heads * kind.head_dim
    if kind.mla is None:
        yield from _linear("attn.q", queries, hidden, kind.qkv_bias)
        yield from _linear("attn.k", keys, hidden, kind.qkv_bias)
        yield from _linear("attn.v", kind.num_kv_heads * kind.value_dim, hidden, kind.qkv_bias)
    else:
        mla = kind.mla
        if mla.q_rank is None:
            yield "attn.q.weight", (queries, hidden)
        else:
            yield from _linear("attn.q_a", mla.q_rank, hidden, kind.qkv_bias)
            yield "attn.q_a_norm.weight", (mla.q_rank,)
            yield "attn.q_b.weight", (queries, mla.q_rank)
        yield from _linear("attn.kv_a", mla.kv_rank + mla.rope_dim, hidden, kind.qkv_bias)
        yield "attn.kv_a_norm.weight", (mla.kv_rank,)
        expanded = kind.num_heads * (mla.nope_dim + kind.value_dim)
        yield "attn.kv_b.weight", (expanded, mla.kv_rank)
    if kind.qk_norm != "none":
        per_head = kind.qk_norm == "head"
        yield "attn.q_norm.weight", (kind.head_dim if per_head else queries,)
        yield "attn.k_norm.weight", (kind.head_dim if per_head else keys,)
    if kind.sinks:
        yield "attn.sinks", (kind.num_heads,)
    yield from _linear("attn.o", hidden, kind.num_heads * kind.value_dim, kind.output_bias)


def _linear(name: str, out: int, inner: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, hidden: int, norm: Norm) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (hidden,)
    if norm == "layer":
        yield f"{name}.bias", (hidden,)


def _gated(name: str, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.gate.weight", (width, hidden)
    yield f"{name}.up.weight", (width, hidden)
    yield f"{name}.down.weight", (hidden, width)


def find_trunk_tensor(canonical: str, headers: Mapping[str, Header], what: str) -> str:
    """Source name of a trunk tensor.

    Raises
    ------
    MissingTensorError
        When the checkpoint has it under none of its names.
    """
    names = _source_names(canonical)
    for name in names:
        if name in headers:
            return name
    raise missing_tensor(names, what)


def find_unused(
    headers: Mapping[str, Header],
    used: set[str],
    *,
    num_layers: int,
    extra_layers: bool,
    tied: bool,
    what: str,
) -> tuple[str, ...]:
    """Tensors that are known and not needed, sorted.

    Raises
    ------
    LeftoverTensorError
        When the checkpoint has any other tensor that nothing uses.
    """
    unused: list[str] = []
    leftover: list[str] = []
    for name in sorted(headers.keys() - used):
        layer = _LAYER.fullmatch(name)
        beyond = layer is not None and int(layer[1]) >= num_layers
        known = (extra_layers and beyond) or (tied and name == f"{_TOP['head']}.weight")
        (unused if known or _BUFFERS.fullmatch(name) else leftover).append(name)
    if leftover:
        more = f" and {len(leftover) - 1} more" if len(leftover) > 1 else ""
        raise LeftoverTensorError(
            f"{what}: nothing uses tensor {leftover[0]}{more}; expected only tensors that its"
            " config.json implies; the config may be another model's"
        )
    return tuple(unused)


def _source_names(canonical: str) -> tuple[str, ...]:
    module, leaf = canonical.rsplit(".", 1)
    leaf = _LEAVES.get(leaf, leaf)
    if module in _TOP:
        return (f"{_TOP[module]}.{leaf}",)
    _, layer, inner = module.split(".", 2)
    return tuple(f"model.layers.{layer}.{name}.{leaf}" for name in _MODULES[inner])


def missing_tensor(names: tuple[str, ...], what: str) -> MissingTensorError:
    """The error for a tensor that is there under none of its names."""
    others = f" (nor {', nor '.join(names[1:])})" if len(names) > 1 else ""
    return MissingTensorError(
        f"{what}: no tensor {names[0]}{others}; its config.json implies it; download the model"
        " again, or use the config that belongs to it"
    )
