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

    gate_up, gate_up_bias = random(2 * NEURONS, HIDDEN), random(2 * NEURONS)
    return FfnWeights(
        *gate_up.chunk(2),
        random(HIDDEN, NEURONS),
        *(gate_up_bias.chunk(2) if bias else (None, None)),
        random(HIDDEN) if bias else None,
        gate_up,
        gate_up_bias if bias else None,
    )


def in_float64(x: torch.Tensor, given: FfnWeights) -> torch.Tensor:
    wide = FfnWeights(*(None if each is None else each.double() for each in given))
    x = x.double()

    def with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return y if bias is None else y + bias

    gate = with_bias(x @ wide.gate.T, wide.gate_bias)
    up = with_bias(x @ wide.up.T, wide.up_bias)
    return with_bias((gate * gate.sigmoid() * up) @ wide.down.T, wide.down_bias)


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
