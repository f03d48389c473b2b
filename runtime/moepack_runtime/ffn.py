"""The gated feed-forward network, the same for dense layers, shared experts and segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moepack.model_spec import ActivationSpec
from moepack.segments import align_up
from moepack.working_memory import ROW_MULTIPLE
from moepack_runtime.places import Place
from moepack_runtime.products import (
    dear_rows,
    is_dear,
    is_one_row,
    is_weight_first,
    without_onednn,
)
from moepack_runtime.quantised import QuantisedMatrix, product, takes_kernel


class FfnWeights(NamedTuple):
    """Weights of a gated FFN, or of a slice of its neurons.

    Attributes
    ----------
    gate, up : Tensor
        [neurons, hidden].
    down : Tensor
        [hidden, neurons].
    gate_bias, up_bias : Tensor or None
        [neurons].
    down_bias : Tensor or None
        [hidden]; of an expert's slices only one has it.
    gate_up, gate_up_bias : Tensor or None
        The rows of gate, then those of up, as one tensor: [2 neurons, hidden] and [2 neurons].
        Given where the format makes them neighbours (always in a segment), never where they only
        happen to be: one product instead of two is faster and may round differently.
    place : Place or None
        Where a kernel finds all of them, where they lie as in a pack.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    place: Place | None = None


class QuantisedFfn(NamedTuple):
    """The same of a segment in a quantised encoding.

    Attributes
    ----------
    gate_up : QuantisedMatrix
        The rows of gate, then those of up: [2 neurons, hidden].
    down : QuantisedMatrix
        [hidden, neurons].
    gate_up_bias, down_bias : Tensor or None
        [2 neurons] and [hidden], in the model's dtype.
    place : Place or None
        Where a kernel finds all of them.
    """

    gate_up: QuantisedMatrix
    down: QuantisedMatrix
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    place: Place | None = None


def gated_ffn(
    x: torch.Tensor, weights: FfnWeights | QuantisedFfn, activation: ActivationSpec
) -> torch.Tensor:
    """``down(activate(gate(x)) * up(x))``.

    Parameters
    ----------
    x
        [tokens, hidden].

    Returns
    -------
    Tensor
        [tokens, hidden] in the dtype of ``x``: for a slice of the neurons a partial sum.
    """
    if isinstance(weights, QuantisedFfn):
        return _quantised_ffn(x, weights, activation)
    if is_one_row(x):
        with without_onednn:
            return _gated_ffn(x, weights, activation)
    return _gated_ffn(x, weights, activation)


def _gated_ffn(x: torch.Tensor, weights: FfnWeights, activation: ActivationSpec) -> torch.Tensor:
    if weights.gate_up is not None:
        # A bias joins a product before that is rounded, which only tokens times weights does.
        if weights.gate_up_bias is None and weights.down_bias is None and is_weight_first(x):
            return _weight_first(x, weights.gate_up, weights.down, activation)
        both = F.linear(x, weights.gate_up, weights.gate_up_bias)
        gate, up = both.chunk(2, -1)
    else:
        gate = F.linear(x, weights.gate, weights.gate_bias)
        up = F.linear(x, weights.up, weights.up_bias)
    return F.linear(activate(gate, up, activation), weights.down, weights.down_bias)


def _quantised_ffn(
    x: torch.Tensor, weights: QuantisedFfn, activation: ActivationSpec
) -> torch.Tensor:
    both = product(x, weights.gate_up, weights.gate_up_bias)
    gate, up = both.chunk(2, -1)
    return product(activate(gate, up, activation), weights.down, weights.down_bias)


def rows_for(tokens: int, x: torch.Tensor, weights: FfnWeights | QuantisedFfn) -> int:
    """With how many rows some tokens of ``x`` are multiplied fastest.

    In numbers that the matrix library has seen before (:mod:`moepack_runtime.products`); torch's
    kernels for quantised weights take every row by itself. Never more than the plan has room for,
    a whole block in the multiples of all.
    """
    if isinstance(weights, QuantisedFfn):
        by_kernel = all(
            takes_kernel(x, matrix, tokens) for matrix in (weights.gate_up, weights.down)
        )
        return tokens if by_kernel else align_up(tokens, ROW_MULTIPLE)
    if is_dear(x, weights.down):
        return min(dear_rows(tokens), align_up(x.shape[0], ROW_MULTIPLE))
    return align_up(tokens, ROW_MULTIPLE)


def activate(gate: torch.Tensor, up: torch.Tensor, activation: ActivationSpec) -> torch.Tensor:
    """[tokens, neurons] twice to [tokens, neurons]."""
    if activation.kind == "silu":
        return F.silu(gate).mul_(up)
    if activation.kind == "gelu":
        return F.gelu(gate).mul_(up)
    # GPT-OSS: both clamped, the gate from above only, and up shifted by one.
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))


def _weight_first(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, activation: ActivationSpec
) -> torch.Tensor:
    """The same with tokens as columns from end to end: ``W X^T``."""
    gate, up = torch.mm(gate_up, x.t()).chunk(2)  # [neurons, tokens]
    return torch.mm(down, activate(gate, up, activation)).t()
