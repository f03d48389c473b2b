"""The mixture-of-experts half of a layer: route, stream the experts, add the partial sums.

Every partial sum (expert x part) is weighted and added in float32, ascending by expert and top
before bottom, and the sum is rounded once. What was resident plays no role in any of it, so the
result does not depend on the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

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
    rows: dict[int, list[tuple[Block, torch.Tensor, torch.Tensor]]] = {}
    for block in blocks:
        for expert in block.routing.ids.unique().tolist():
            tokens, ranks = (block.routing.ids == expert).nonzero(as_tuple=True)
            weights = block.routing.weights[tokens, ranks].unsqueeze(1)  # [chosen, 1]
            rows.setdefault(expert, []).append((block, tokens, weights))
    for expert, segment in arrivals:
        for block, tokens, weights in rows[expert]:
            partial = gated_ffn(block.inputs[tokens], segment, moe.activation_spec)
            block.total.index_add_(0, tokens, partial.float() * weights)


def _add_one_token(moe: MoeSpec, block: Block, arrivals: Iterable[Arrival]) -> None:
    weights = dict(
        zip(block.routing.ids[0].tolist(), block.routing.weights[0].tolist(), strict=True)
    )
    for expert, segment in arrivals:
        partial = gated_ffn(block.inputs, segment, moe.activation_spec)
        block.total.add_(partial, alpha=weights[expert])
