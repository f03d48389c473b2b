"""Qwen3-MoE in plain torch, written to train fast on a CPU.

Matrix products run in bfloat16, which CPUs with AVX512-BF16 or AMX do two to three times as fast;
the residual stream, the norms, the router and the loss stay in float32. `export.py` maps the
parameters to the names that the transformers library uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shipped_model.attention import causal_attention
from shipped_model.experts import sorted_experts

Context = Any  # torch.autograd.Function's context has no public type.


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the defaults are the shipped one's."""

    vocab_size: int = 4096
    layers: int = 8
    hidden_size: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    top_k: int = 4
    moe_intermediate_size: int = 96
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    compute_dtype: torch.dtype = torch.bfloat16


class Routing(NamedTuple):
    """What one layer's router decided: ``ids`` and ``weights`` are [tokens, top_k]."""

    ids: Tensor
    weights: Tensor
    probabilities: Tensor  # [tokens, experts]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _TiedHeadLoss(torch.autograd.Function):
    """Mean cross-entropy through the output matrix, a block of tokens at a time.

    The logits of a whole batch would be its largest tensor by far; a block's fit in the cache, and
    their gradient is at hand while they are.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, matrix: Tensor, targets: Tensor) -> Tensor:
        block = 512
        d_x, d_matrix = torch.empty_like(x), torch.zeros_like(matrix, dtype=torch.float32)
        total = x.new_zeros((), dtype=torch.float64)
        for start in range(0, len(x), block):
            rows, wanted = x[start : start + block], targets[start : start + block, None]
            logits = (rows @ matrix.T).float()
            log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            d_logits = logits.sub_(log_sum).exp_()
            d_logits.scatter_add_(1, wanted, d_logits.new_full((), -1.0).expand(wanted.shape))
            d_rows = (d_logits / len(x)).to(x.dtype)
            d_x[start : start + block] = d_rows @ matrix
            d_matrix += d_rows.T @ rows
        ctx.save_for_backward(d_x, d_matrix.to(matrix.dtype))
        return (total / len(x)).float()

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_matrix = ctx.saved_tensors
        return d_x * gradients[0], d_matrix * gradients[0], None


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys and rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Parameter(torch.empty(config.heads * head, size))
        self.k_proj = nn.Parameter(torch.empty(config.kv_heads * head, size))
        self.v_proj = nn.Parameter(torch.empty(config.kv_heads * head, size))
        self.o_proj = nn.Parameter(torch.empty(size, config.heads * head))
        self.q_norm = RMSNorm(head, config.rms_norm_eps)
        self.k_norm = RMSNorm(head, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attend within each sequence of [batch, length, hidden]."""
        dtype, head = self.config.compute_dtype, self.config.head_dim
        batch, length, _ = x.shape
        qkv = torch.cat([self.q_proj, self.k_proj, self.v_proj]).to(dtype)
        heads = F.linear(x.to(dtype), qkv).float().view(batch, length, -1, head).transpose(1, 2)
        counts = [self.config.heads, self.config.kv_heads, self.config.kv_heads]
        q, k, v = torch.split(heads, counts, dim=1)
        q = _rotate(self.q_norm(q), rotary).to(dtype)
        k = _rotate(self.k_norm(k), rotary).to(dtype)
        out = causal_attention(q, k, v.to(dtype)).transpose(1, 2).reshape(batch, length, -1)
        return F.linear(out, self.o_proj.to(dtype)).float()


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [length, head_dim / 2] each."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] / config.rope_theta**exponents
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [..., length, head_dim]: element i pairs with element i + head_dim / 2."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SparseMLP(nn.Module):
    """A router and its experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        experts, size, width = config.experts, config.hidden_size, config.moe_intermediate_size
        self.router = nn.Parameter(torch.empty(experts, size))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, size))
        self.down = nn.Parameter(torch.empty(experts, size, width))

    def route(self, x: Tensor) -> Routing:
        """Choose experts for [tokens, hidden]; the chosen weights sum to one."""
        probabilities = F.linear(x, self.router).softmax(dim=-1)
        weights, ids = probabilities.topk(self.config.top_k, dim=-1)
        return Routing(ids, weights / weights.sum(dim=-1, keepdim=True), probabilities)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return the experts' weighted sum for [tokens, hidden], in float32, and the routing."""
        dtype = self.config.compute_dtype
        routing = self.route(x)
        out = sorted_experts(
            x.to(dtype), routing.ids, routing.weights, self.gate_up.to(dtype), self.down.to(dtype)
        )
        return out, routing


class DecoderLayer(nn.Module):
    """Attention, then experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Routing]:
        """Return the new residual stream, the one after attention only, and the routing."""
        residual = x + self.attention(self.input_norm(x), rotary)
        out, routing = self.mlp(self.post_attention_norm(residual).flatten(0, 1))
        return residual + out.view_as(residual), residual, routing


class Trace(NamedTuple):
    """The last hidden states [batch, length, hidden], and what each layer saw and decided."""

    hidden: Tensor
    residuals: list[Tensor]
    routings: list[Routing]


class MoEModel(nn.Module):
    """The whole decoder, input and output embeddings tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            # Each layer starts as the identity, which the orthogonal updates soon leave.
            if name.endswith(("o_proj", "down")):
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5)

    def forward(self, ids: Tensor) -> Trace:
        """Run [batch, length] token ids through all layers."""
        x = F.embedding(ids, self.embedding)
        rotary = rotary_tables(self.config, ids.shape[1])
        residuals, routings = [], []
        for layer in self.layers:
            x, residual, routing = layer(x, rotary)
            residuals.append(residual)
            routings.append(routing)
        return Trace(self.norm(x), residuals, routings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of hidden states."""
        dtype = self.config.compute_dtype
        return F.linear(hidden.to(dtype), self.embedding.to(dtype)).float()

    def loss(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Trace]:
        """Return the mean cross-entropy in nats per token, and the trace."""
        dtype = self.config.compute_dtype
        trace = self(ids)
        hidden = trace.hidden.flatten(0, 1).to(dtype)
        matrix = self.embedding.to(dtype)
        loss: Tensor = _TiedHeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, matrix, targets.flatten()
        )
        return loss, trace


def balance_loss(routing: Routing) -> Tensor:
    """Switch-transformer balance loss of one layer: 1 when usage is uniform (Fedus 2021, eq. 4)."""
    experts = routing.probabilities.shape[1]
    used = torch.bincount(routing.ids.flatten(), minlength=experts) / routing.ids.numel()
    return experts * (used * routing.probabilities.mean(0)).sum()
