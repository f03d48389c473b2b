"""What a step allocates for a while fits into the workspace that the planner reserves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from moepack_runtime.ffn import FfnWeights, gated_ffn
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.model import Decoder
from moepack_runtime.weights import TORCH_DTYPE

from moepack.model_spec import (
    AttentionSpec,
    LayerSpec,
    MlaSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
    TensorInfo,
)
from moepack.quantise import stored_tensors
from moepack.trunk import trunk_parts
from moepack.working_memory import hidden_bytes, workspace_bytes
from tests.support.memory import peak_bytes

HIDDEN, CONTEXT, BLOCK = 256, 512, 128
# Numpy knows no bfloat16.
BITS = {"F32": torch.int32, "BF16": torch.int16}
MOE = MoeSpec(16, 4, 256, RouterSpec())

GROUPED = AttentionSpec(8, 2, 64, 64, 64, 0.125)
ATTENTIONS = {
    "grouped": GROUPED,
    "heads alone": AttentionSpec(8, 8, 64, 64, 64, 0.125),
    "window": AttentionSpec(8, 2, 64, 64, 64, 0.125, window=200),
    "sinks": AttentionSpec(8, 2, 64, 64, 64, 0.125, sinks=True),
    "window and sinks": AttentionSpec(8, 2, 64, 64, 64, 0.125, window=100, sinks=True),
    "latent": AttentionSpec(8, 8, 48, 32, 16, 0.14, mla=MlaSpec(None, 64, 32, 16)),
}


def trunk_shapes(attention: AttentionSpec) -> dict[str, tuple[int, ...]]:
    queries = attention.num_heads * attention.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q.weight": (queries, HIDDEN),
        "o.weight": (HIDDEN, attention.num_heads * attention.value_dim),
    }
    if attention.mla is not None:
        mla = attention.mla
        expanded = attention.num_heads * (mla.nope_dim + attention.value_dim)
        shapes["kv_a.weight"] = (mla.kv_rank + mla.rope_dim, HIDDEN)
        shapes["kv_a_norm.weight"] = (mla.kv_rank,)
        shapes["kv_b.weight"] = (expanded, mla.kv_rank)
        return shapes
    for name in "kv":
        shapes[f"{name}.weight"] = (attention.num_kv_heads * attention.head_dim, HIDDEN)
    if attention.sinks:
        shapes["sinks"] = (attention.num_heads,)
    return shapes


def rounded(spec: ModelSpec, trunk: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same trunk in 8 bits, as an engine has it."""
    found = {}
    for part in trunk_parts(spec, "INT8"):
        bits = trunk[part.source.name].view(BITS[spec.dtype]).numpy()
        for tensor, stored in zip(part.tensors, stored_tensors(bits, part), strict=True):
            flat = torch.from_numpy(stored.copy()).view(TORCH_DTYPE[tensor.dtype])
            found[tensor.name] = flat.view(tensor.shape)
    return found


@pytest.mark.parametrize("stored", ["", "INT8"])
@pytest.mark.parametrize("block", [BLOCK, 1])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", ATTENTIONS)
@torch.inference_mode()
def test_a_step_stays_within_the_planned_workspace(
    name: str, dtype: str, block: int, stored: str
) -> None:
    attention = ATTENTIONS[name]
    spec = ModelSpec(
        name=name,
        family="any",
        architecture="any",
        dtype=dtype,
        vocab_size=512,
        hidden_size=HIDDEN,
        context_length=CONTEXT,
        norm="rms",
        norm_eps=1e-6,
        tied_embeddings=True,
        rope=RopeSpec(1e4, interleaved=attention.mla is not None),
        layers=(LayerSpec(attention, MOE, None),),
        trunk=(),
    )
    shapes = {f"layers.0.attn.{key}": shape for key, shape in trunk_shapes(attention).items()}
    shapes |= {"embed.weight": (512, HIDDEN), "norm.weight": (HIDDEN,)}
    shapes |= {f"layers.0.{norm}_norm.weight": (HIDDEN,) for norm in ("attn", "mlp")}
    shapes["layers.0.router.weight"] = (MOE.num_experts, HIDDEN)
    storage = torch.float32 if dtype == "F32" else torch.bfloat16
    trunk = {key: torch.randn(shape).to(storage) for key, shape in shapes.items()}
    kv = KvCache.allocate(
        spec, context_tokens=CONTEXT, block_tokens=block, device=torch.device("cpu")
    )
    infos = tuple(TensorInfo(key, dtype, shape) for key, shape in shapes.items())
    spec = dataclasses.replace(spec, trunk=infos)
    decoder = Decoder(spec, rounded(spec, trunk) if stored else trunk, kv)
    layer = decoder.layers[0]
    planned = workspace_bytes(spec, CONTEXT, block, trunk=stored)

    x = torch.randn(block, HIDDEN).to(storage)

    def attend_block_by_block() -> None:
        for start in range(0, CONTEXT - block, block):
            layer.attend(x, start)

    assert peak_bytes(attend_block_by_block) <= planned
    assert peak_bytes(lambda: layer.attend(x[:1], CONTEXT - block)) <= planned
    assert peak_bytes(lambda: layer.route(layer.mlp_norm(x))) <= planned
    gate, up, down = (torch.randn(256, 256).to(storage) for _ in range(3))
    expert = FfnWeights(gate, up, down)
    assert peak_bytes(lambda: gated_ffn(x, expert, MOE.activation_spec)) <= planned
    assert peak_bytes(lambda: decoder.logits(x[:1])) <= planned
    ids = torch.arange(CONTEXT) % 512
    assert peak_bytes(lambda: decoder.embed(ids)) <= hidden_bytes(spec, CONTEXT)
