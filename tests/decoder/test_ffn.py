"""The gated FFN by every formulation, against float64."""

from __future__ import annotations

import pytest
import torch
from moepack_runtime.ffn import FfnWeights, gated_ffn
from moepack_runtime.products import is_one_row, is_weight_first

from moepack.model_spec import ActivationSpec

SILU = ActivationSpec("silu")
HIDDEN, NEURONS = 96, 64


def weights(dtype: torch.dtype, *, bias: bool) -> FfnWeights:
    chance = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance).mul_(shape[-1] ** -0.5).to(dtype)

    gate_up = random(2 * NEURONS, HIDDEN)
    gate, up = gate_up.chunk(2)
    given = FfnWeights(gate, up, random(HIDDEN, NEURONS), gate_up=gate_up)
    if not bias:
        return given
    gate_up_bias = random(2 * NEURONS)
    gate_bias, up_bias = gate_up_bias.chunk(2)
    return given._replace(
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=random(HIDDEN),
        gate_up_bias=gate_up_bias,
    )


def in_float64(x: torch.Tensor, given: FfnWeights) -> torch.Tensor:
    def linear(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product = y @ weight.double().T
        return product if bias is None else product + bias.double()

    gate = linear(x.double(), given.gate, given.gate_bias)
    up = linear(x.double(), given.up, given.up_bias)
    return linear(gate * gate.sigmoid() * up, given.down, given.down_bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16, 32, 48, 64, 80, 112, 128, 256, 272])
def test_every_number_of_tokens_is_as_near_to_float64_as_one_formulation(
    tokens: int, bias: bool
) -> None:
    given = weights(torch.bfloat16, bias=bias)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    found = gated_ffn(x, given, SILU)
    assert found.shape == x.shape
    assert found.dtype is torch.bfloat16
    exact = in_float64(x, given)
    # Without a joint matrix of gate and up there are three products of tokens times weights.
    apart = gated_ffn(x, given._replace(gate_up=None, gate_up_bias=None), SILU)
    error, usual = ((each.double() - exact).abs().mean() for each in (found, apart))
    assert error <= 1.1 * usual + 1e-9


def test_the_formulations_are_chosen_by_shape_and_dtype() -> None:
    def chosen(tokens: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> str:
        x = torch.empty(tokens, hidden, dtype=dtype)
        return "one" if is_one_row(x) else "weight first" if is_weight_first(x) else "token first"

    assert chosen(1) == "one"
    assert [chosen(n) for n in (16, 80, 144, 272)] == ["token first"] * 4
    assert [chosen(n) for n in (32, 48, 64, 96, 112, 128, 256)] == ["weight first"] * 7
    assert chosen(64, hidden=4096) == "token first"
    assert chosen(64, dtype=torch.float32) == "token first"
