"""The mixture-of-experts half of a layer: stream the experts, add the partial sums.

Every partial sum (expert x part) is weighted and added in float32, behind the shared expert, in one
fixed order (of several tokens ascending by expert, of one token as its router has them; top before
bottom), and the sum is rounded once. What was resident or came first plays no role in any of it, so
the result does not depend on the budget.

The experts of one token are computed as they become ready, and their outputs kept until they can be
added. Those of several tokens are computed in the order of summation, since their outputs together
may be larger than the model's hidden states; the link then works ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moepack.model_spec import MoeSpec
from moepack_runtime.ffn import gated_ffn, rows_for
from moepack_runtime.fused import Segment, TokenRows
from moepack_runtime.fused_check import has_kernels
from moepack_runtime.grouped import experts_one_token
from moepack_runtime.layer_pass import LayerPass
from moepack_runtime.router import Routing


class Block(NamedTuple):
    """One block of tokens on its way through a layer.

    Attributes
    ----------
    inputs : Tensor
        [tokens, hidden], normed: what the experts see.
    routing : Routing
        Expert ids and weights, [tokens, top_k].
    """

    inputs: torch.Tensor
    routing: Routing


def join_experts(
    moe: MoeSpec,
    blocks: Sequence[Block],
    residuals: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor | None],
    layer_pass: LayerPass,
) -> None:
    """Add what the second half of a layer gives to the residual stream.

    Parameters
    ----------
    residuals
        Of each block, [tokens, hidden]: added to in place.
    shared
        Of each block the shared expert's output, like it; None where there is none.
    layer_pass
        The pass over the experts that the blocks use.
    """
    if _is_fused(blocks, layer_pass):
        _join_one_token(moe, blocks[0], residuals[0], shared[0], layer_pass)
        return
    pairs = zip(blocks, shared, strict=True)
    totals = [begin_sum(block.inputs, output) for block, output in pairs]
    add_experts(moe, blocks, totals, layer_pass)
    for residual, total in zip(residuals, totals, strict=True):
        residual.add_(total.to(residual.dtype))


def begin_sum(inputs: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """Float32 [tokens, hidden] for the experts' outputs: the shared one's, or zeros."""
    return torch.zeros_like(inputs, dtype=torch.float32) if shared is None else shared.float()


def _is_fused(blocks: Sequence[Block], layer_pass: LayerPass) -> bool:
    """Whether kernels of our own take the one token that there is."""
    inputs = blocks[0].inputs
    one = inputs.is_cuda and len(blocks) == 1 and inputs.shape[0] == 1
    return one and not layer_pass.left_out and has_kernels(inputs.device)


def _join_one_token(
    moe: MoeSpec,
    block: Block,
    residual: torch.Tensor,
    shared: torch.Tensor | None,
    layer_pass: LayerPass,
) -> None:
    """:func:`_add_one_token` in few launches, in the same order."""
    keys = itertools.product(layer_pass.tokens[0], layer_pass.parts)
    place = {key: row for row, key in enumerate(keys)}
    rows = TokenRows(block.inputs, len(place), moe.activation_spec)
    for portion in layer_pass.as_ready():
        rows.compute([Segment(place[expert, part], weights) for expert, part, weights in portion])
    rows.add_to(residual, shared, block.routing.weights[0].contiguous())


def add_experts(
    moe: MoeSpec, blocks: Sequence[Block], totals: Sequence[torch.Tensor], layer_pass: LayerPass
) -> None:
    """Add every expert's weighted output to the blocks' sums.

    Parameters
    ----------
    totals
        Of each block, [tokens, hidden] float32: added to in place.
    layer_pass
        The pass over the experts that the blocks use.
    """
    if len(blocks) == 1 and blocks[0].inputs.shape[0] == 1:
        _add_one_token(moe, blocks[0], totals[0], layer_pass)
        return
    chosen: dict[int, list[_Rows]] = {}
    for block, total in zip(blocks, totals, strict=True):
        for expert, rows in _rows_by_expert(block, total, moe.num_experts):
            chosen.setdefault(expert, []).append(rows)
    activation = moe.activation_spec
    for expert, _, segment in layer_pass.in_order():
        for inputs, total, tokens, weights in chosen[expert]:
            # The rows that fill up are of token 0, and are dropped.
            count = rows_for(len(tokens), inputs, segment)
            padded = F.pad(tokens, (0, count - len(tokens)))
            partial = gated_ffn(inputs.index_select(0, padded), segment, activation)
            # Contiguous, which a product with tokens as columns is not: rows that are not take
            # four times as long to add.
            contiguous = torch.contiguous_format
            outputs = partial[: len(tokens)].to(torch.float32, memory_format=contiguous)
            total.index_add_(0, tokens, outputs.mul_(weights))


class _Rows(NamedTuple):
    """The tokens of a block that chose an expert, and its weight for each, [chosen, 1]."""

    inputs: torch.Tensor
    total: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor


def _rows_by_expert(
    block: Block, total: torch.Tensor, num_experts: int
) -> Iterator[tuple[int, _Rows]]:
    """Every expert that the block uses, with its tokens in ascending order."""
    ids = block.routing.ids
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    weights = block.routing.weights.flatten()[order].unsqueeze(1)
    begin = 0
    for expert, count in enumerate(ids.flatten().bincount(minlength=num_experts).tolist()):
        if count:
            end = begin + count
            yield expert, _Rows(block.inputs, total, tokens[begin:end], weights[begin:end])
            begin = end


def _add_one_token(moe: MoeSpec, block: Block, total: torch.Tensor, layer_pass: LayerPass) -> None:
    """The rows are weighted and added in the router's order, top before bottom, all in float32."""
    parts = layer_pass.parts
    keys = list(itertools.product(layer_pass.tokens[0], parts))
    there = [number for number, key in enumerate(keys) if key not in layer_pass.left_out]
    place = {keys[number]: row for row, number in enumerate(there)}
    rows = [total] * len(place)  # each is replaced by one of [hidden]
    for portion in layer_pass.as_ready():
        segments = [arrival.weights for arrival in portion]
        outputs = experts_one_token(block.inputs, segments, moe.activation_spec)
        for arrival, row in zip(portion, outputs.unbind(), strict=True):
            rows[place[arrival.expert, arrival.part]] = row
    weights = block.routing.weights[0].repeat_interleave(len(parts)).unsqueeze(1)
    if len(there) < len(keys):  # the others keep their weights
        weights = weights[there]
    total.add_(torch.stack(rows).float().mul_(weights).sum(0))
