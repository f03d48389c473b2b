"""The plainest way to run a decoder: every expert in memory, one token's experts one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from moepack_runtime.ffn import FfnWeights, gated_ffn
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.model import Decoder
from moepack_runtime.router import Routing
from moepack_runtime.weights import TORCH_DTYPE

from moepack.checkpoint import Checkpoint
from moepack.model_spec import ModelSpec
from moepack.segments import Bits


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same checkpoint in the transformers library."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def to_torch(bits: Bits, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(TORCH_DTYPE[dtype])


class Weights(NamedTuple):
    spec: ModelSpec
    trunk: Mapping[str, torch.Tensor]
    experts: Mapping[tuple[int, int], FfnWeights]


def load(folder: Path) -> Weights:
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.spec
    trunk = {
        info.name: to_torch(checkpoint.trunk_tensor(info.name), info.dtype) for info in spec.trunk
    }
    experts = {}
    for layer in spec.moe_layers:
        for expert in range(spec.moe(layer).num_experts):
            tensors = checkpoint.expert(layer, expert)
            parts: dict[str, Any] = {
                name.replace(".weight", "").replace(".", "_"): to_torch(bits, spec.dtype)
                for name, bits in tensors.items()
            }
            experts[layer, expert] = FfnWeights(**parts)
    return Weights(spec, trunk, experts)


class Runner:
    """Runs tokens behind what is in the cache, layer by layer, in blocks."""

    def __init__(
        self, weights: Weights, *, context_tokens: int = 96, block_tokens: int = 8
    ) -> None:
        self.spec = weights.spec
        self.experts = weights.experts
        self.block_tokens = block_tokens
        self.kv = KvCache.allocate(
            self.spec,
            context_tokens=context_tokens,
            block_tokens=block_tokens,
            device=torch.device("cpu"),
        )
        self.decoder = Decoder(self.spec, weights.trunk, self.kv)

    @torch.inference_mode()
    def run(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits at every position, float32 [tokens, vocab]."""
        blocks = list(torch.split(self.decoder.embed(torch.tensor(ids)), self.block_tokens))
        for number in range(len(self.spec.layers)):
            start = self.kv.length
            for index, block in enumerate(blocks):
                blocks[index] = self._layer(number, block, start)
                start += len(block)
        self.kv.advance(len(ids))
        return self.decoder.logits(torch.cat(blocks))

    def _layer(self, number: int, block: torch.Tensor, start: int) -> torch.Tensor:
        layer = self.decoder.layers[number]
        residual = layer.attend(block, start)
        inputs = layer.mlp_norm(residual)
        if not layer.has_experts:
            return residual + layer.dense(inputs)
        return self.add_experts(number, residual, inputs, layer.route(inputs))

    def add_experts(
        self, number: int, residual: torch.Tensor, inputs: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        """The second half of a layer with experts."""
        layer, moe = self.decoder.layers[number], self.spec.moe(number)
        total = torch.zeros(inputs.shape)
        for token, (ids, shares) in enumerate(zip(routing.ids, routing.weights, strict=True)):
            for expert, share in zip(ids.tolist(), shares, strict=True):
                output = gated_ffn(
                    inputs[token : token + 1], self.experts[number, expert], moe.activation_spec
                )
                total[token] += share * output[0].float()
        shared = layer.shared(inputs)
        if shared is not None:
            total += shared
        return residual + total.to(residual.dtype)
