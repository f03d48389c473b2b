"""The experts of a layer, trained fast on a CPU.

The tokens of a batch are sorted by expert, so that each expert is one matrix product; the weights
of a layer are two stacked tensors.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Context = Any  # torch.autograd.Function's context has no public type.


class _Slots(NamedTuple):
    """Where each (token, chosen expert) pair goes when sorted by expert.

    Every expert's rows are padded to a multiple of ``ROW_MULTIPLE``; padding rows hold token 0
    with weight 0, so they add nothing to the output nor to any gradient.
    """

    rows: list[tuple[int, int]]  # of each expert: start, end
    token: Tensor  # [rows]
    weight: Tensor  # [rows, 1]
    pair: Tensor  # [tokens * top_k], in sorted order
    row: Tensor  # [tokens * top_k], in sorted order


# The CPU library compiles a kernel for every new matrix shape: keep the number of shapes small.
ROW_MULTIPLE = 128


def _sort_by_expert(ids: Tensor, weights: Tensor, experts: int) -> _Slots:
    pair = ids.flatten().argsort(stable=True)
    expert = ids.flatten()[pair]
    counts = torch.bincount(expert, minlength=experts)
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    ends = padded.cumsum(0)
    first_pair = counts.cumsum(0) - counts
    row = (ends - padded - first_pair)[expert] + torch.arange(len(pair))
    token = pair.new_zeros(int(ends[-1])).index_copy_(0, row, pair // ids.shape[1])
    weight = weights.new_zeros(len(token)).index_copy_(0, row, weights.flatten()[pair])
    bounds = [0, *ends.tolist()]
    rows = list(pairwise(bounds))
    return _Slots(rows, token, weight[:, None], pair, row)


class _SortedExperts(torch.autograd.Function):
    """SwiGLU experts over tokens sorted by expert, with a hand-written backward.

    Autograd over a loop of slices would allocate a full-size gradient for every slice; here each
    product writes into its rows of one buffer.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        width = down.shape[2]
        slots = _sort_by_expert(ids, weights, len(gate_up))
        inputs = x[slots.token]  # [rows, hidden]
        hidden = x.new_empty(len(inputs), 2 * width)
        for expert, (start, end) in enumerate(slots.rows):
            torch.mm(inputs[start:end], gate_up[expert].T, out=hidden[start:end])
        weight = slots.weight.to(x.dtype)
        weighted = F.silu(hidden[:, :width]) * hidden[:, width:] * weight
        outputs = torch.empty_like(inputs)
        for expert, (start, end) in enumerate(slots.rows):
            torch.mm(weighted[start:end], down[expert].T, out=outputs[start:end])
        ctx.save_for_backward(inputs, hidden, weighted, weight, gate_up, down)
        ctx.slots, ctx.shapes = slots, (x.shape, weights.shape)
        out = x.new_zeros(x.shape, dtype=torch.float32)
        return out.index_add_(0, slots.token, outputs.float())

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, hidden, weighted, weight, gate_up, down = ctx.saved_tensors
        slots, (x_shape, weights_shape) = ctx.slots, ctx.shapes
        d_outputs = gradients[0].to(inputs.dtype)[slots.token]
        d_weighted, d_down = torch.empty_like(weighted), torch.empty_like(down)
        for expert, (start, end) in enumerate(slots.rows):
            torch.mm(d_outputs[start:end], down[expert], out=d_weighted[start:end])
            torch.mm(d_outputs[start:end].T, weighted[start:end], out=d_down[expert])
        d_hidden, d_weight = _swiglu_backward(hidden, d_weighted, weight)
        d_inputs, d_gate_up = torch.empty_like(inputs), torch.empty_like(gate_up)
        for expert, (start, end) in enumerate(slots.rows):
            torch.mm(d_hidden[start:end], gate_up[expert], out=d_inputs[start:end])
            torch.mm(d_hidden[start:end].T, inputs[start:end], out=d_gate_up[expert])
        d_x = inputs.new_zeros(x_shape, dtype=torch.float32)
        d_x.index_add_(0, slots.token, d_inputs.float())
        d_weights = d_weight.new_empty(weights_shape.numel())
        d_weights.index_copy_(0, slots.pair, d_weight[slots.row])
        return d_x.to(inputs.dtype), None, d_weights.view(weights_shape), d_gate_up, d_down


def _swiglu_backward(hidden: Tensor, d_weighted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``silu(gate) * up * weight`` for hidden and for weight (summed)."""
    width = d_weighted.shape[1]
    gate, up = hidden[:, :width], hidden[:, width:]
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_weight = (d_weighted * silu * up).sum(1, dtype=torch.float32)
    d_product = d_weighted * weight
    d_hidden = torch.empty_like(hidden)
    torch.mul(d_product, silu, out=d_hidden[:, width:])
    # silu'(g) = s + silu(g) (1 - s)
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    torch.mul(d_product * up, slope, out=d_hidden[:, :width])
    return d_hidden, d_weight


def sorted_experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Return the weighted sum of each token's experts, [tokens, hidden] in float32.

    Parameters
    ----------
    x
        Normed hidden states, [tokens, hidden]; its dtype is that of the products.
    ids, weights
        Chosen experts and their weights, [tokens, top_k].
    gate_up, down
        Weights, [experts, 2 * width, hidden] and [experts, hidden, width].
    """
    out: Tensor = _SortedExperts.apply(  # type: ignore[no-untyped-call]
        x, ids, weights, gate_up, down
    )
    return out
