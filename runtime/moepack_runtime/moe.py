"""The mixture-of-experts half of a layer: route, stream the experts, add the partial sums.

Every partial sum (expert x part) is weighted and added in float32, ascending by expert and top
before bottom, and the sum is rounded once. What was resident plays no role in any of it, so the
result does not depend on the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moepack.budget import ROW_MULTIPLE
from moepack.model_spec import MoeSpec
from moepack_runtime.experts import Arrival
from moepack_runtime.ffn import gated_ffn
from moepack_runtime.router import Routing


class Block(NamedTuple):
    """One block of tokens on its way through a layer.

    Attributes
    ----------
    inputs : Tensor
        [tokens, hidden], normed: what the experts see.
    routing : Routing
        Expert ids and weights, [tokens, top_k].
    total : Tensor
        [tokens, hidden] float32: the sum over experts, added to in place.
    """

    inputs: torch.Tensor
    routing: Routing
    total: torch.Tensor


def add_experts(moe: MoeSpec, blocks: Sequence[Block], arrivals: Iterable[Arrival]) -> None:
    """Add every expert's weighted output to the blocks' totals.

    Parameters
    ----------
    arrivals
        The segments of all needed experts, in the order of summation.
    """
    if len(blocks) == 1 and blocks[0].inputs.shape[0] == 1:
        _add_one_token(moe, blocks[0], arrivals)
        return
    chosen: dict[int, list[_Rows]] = {}
    for block in blocks:
        for expert, rows in _rows_by_expert(block, moe.num_experts):
            chosen.setdefault(expert, []).append(rows)
    activation = moe.activation_spec
    for expert, segment in arrivals:
        for block, tokens, weights in chosen[expert]:
            # The rows that fill up are of token 0, and are dropped.
            padded = F.pad(tokens, (0, -len(tokens) % ROW_MULTIPLE))
            partial = gated_ffn(block.inputs[padded], segment, activation)[: len(tokens)]
            block.total.index_add_(0, tokens, partial.float() * weights)


class _Rows(NamedTuple):
    """The tokens of a block that chose an expert, and its weight for each, [chosen, 1]."""

    block: Block
    tokens: torch.Tensor
    weights: torch.Tensor


def _rows_by_expert(block: Block, num_experts: int) -> Iterator[tuple[int, _Rows]]:
    """Every expert that the block uses, with its tokens in ascending order."""
    ids = block.routing.ids
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    weights = block.routing.weights.flatten()[order].unsqueeze(1)
    begin = 0
    for expert, count in enumerate(ids.flatten().bincount(minlength=num_experts).tolist()):
        if count:
            end = begin + count
            yield expert, _Rows(block, tokens[begin:end], weights[begin:end])
            begin = end


def _add_one_token(moe: MoeSpec, block: Block, arrivals: Iterable[Arrival]) -> None:
    routing, activation = block.routing, moe.activation_spec
    weights = dict(zip(routing.ids[0].tolist(), routing.weights[0].tolist(), strict=True))
    for expert, segment in arrivals:
        partial = gated_ffn(block.inputs, segment, activation)
        block.total.add_(partial, alpha=weights[expert])
