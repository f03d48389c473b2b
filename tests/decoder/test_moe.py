"""What the experts of several tokens add, however many rows each takes, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from moepack_runtime.ffn import FfnWeights, rows_for
from moepack_runtime.layer_pass import Arrival, LayerPass
from moepack_runtime.moe import Block, add_experts
from moepack_runtime.router import Routing

from moepack.model_spec import MoeSpec, RouterSpec

#: So large that experts are dear.
HIDDEN = NEURONS = 1024
#: Of each expert: one, a few, rows that fill up or none, tokens as columns, and tokens as rows.
COUNTS = (1, 2, 7, 48, 70, 128)
TOKENS = sum(COUNTS)


class AllThere:
    """A pass that finds every expert."""

    def __init__(self, experts: list[FfnWeights]) -> None:
        self._experts = experts

    def in_order(self) -> Iterator[Arrival]:
        for number, weights in enumerate(self._experts):
            yield Arrival(number, "top", weights)


def test_the_error_of_what_experts_add_is_that_of_plain_products_whatever_their_rows() -> None:
    chance = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance).mul_(shape[-1] ** -0.5).bfloat16()

    experts = []
    for _ in COUNTS:
        gate_up = drawn(2 * NEURONS, HIDDEN)
        gate, up = gate_up.chunk(2)
        experts.append(FfnWeights(gate, up, drawn(HIDDEN, NEURONS), gate_up=gate_up))
    ids = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS)).unsqueeze(1)
    ids = ids[torch.randperm(TOKENS, generator=chance)]
    weights = torch.rand(TOKENS, 1, generator=chance)
    inputs = drawn(TOKENS, HIDDEN)
    rows = {rows_for(count, inputs, experts[0]) for count in COUNTS}
    assert rows == {1, 2, 8, 48, 72, 128}, "each way to multiply"
    found = torch.zeros(TOKENS, HIDDEN)
    moe = MoeSpec(len(COUNTS), 1, NEURONS, RouterSpec())
    layer_pass = cast(LayerPass, AllThere(experts))
    add_experts(moe, [Block(inputs, Routing(ids, weights))], [found], layer_pass)

    def added(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for number, given in enumerate(experts):
            gate, up, down = (each.to(dtype) for each in (given.gate, given.up, given.down))
            mine = ids[:, 0] == number
            y = F.silu(F.linear(x[mine], gate)) * F.linear(x[mine], up)
            total[mine] = F.linear(y, down).double() * weights[mine]
        return total

    exact = added(inputs.double(), torch.float64)
    usual = added(inputs, torch.bfloat16)
    for number in range(len(COUNTS)):
        mine = ids[:, 0] == number
        error, allowed = ((each[mine] - exact[mine]).abs().mean() for each in (found, usual))
        assert error <= 1.1 * allowed, COUNTS[number]
