"""A token's experts at once give what each of them gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moepack_runtime.ffn import FfnWeights, gated_ffn
from moepack_runtime.grouped import experts_one_token, issued_by_step, one_by_one

from moepack.model_spec import ActivationSpec

HIDDEN = 48
SILU = ActivationSpec("silu")
GPT_OSS = ActivationSpec("clamped_swiglu", alpha=1.7, limit=0.8)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def segment(seed: int, neurons: int, *, bias: bool, dtype: torch.dtype, device: str) -> FfnWeights:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    gate_up, down = drawn(2 * neurons, HIDDEN), drawn(HIDDEN, neurons)
    gate, up = gate_up.chunk(2)
    if not bias:
        return FfnWeights(gate, up, down, gate_up=gate_up)
    both = drawn(2 * neurons)
    return FfnWeights(gate, up, down, both[:neurons], both[neurons:], drawn(HIDDEN), gate_up, both)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [SILU, GPT_OSS])
@pytest.mark.parametrize("compute", [experts_one_token, one_by_one, issued_by_step])
@torch.inference_mode()
def test_each_row_is_what_its_segment_gives_alone_in_whatever_company(
    compute: Callable[..., torch.Tensor],
    activation: ActivationSpec,
    dtype: torch.dtype,
    device: str,
) -> None:
    bias = activation is GPT_OSS
    segments = [segment(seed, 32, bias=bias, dtype=dtype, device=device) for seed in range(5)]
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    found = compute(x, segments, activation)
    assert found.dtype is dtype
    for row, weights in zip(found, segments, strict=True):
        expected = gated_ffn(x, weights, activation)[0]
        torch.testing.assert_close(row, expected, atol=0.05, rtol=0.02)
    portions = [
        compute(x, part, activation) for part in (segments[:1], segments[1:4], segments[4:])
    ]
    assert torch.equal(torch.cat(portions), found)
    assert torch.equal(compute(x, segments[::-1], activation), found.flip(0))


@torch.inference_mode()
def test_segments_may_differ_in_width() -> None:
    widths = (32, 16, 48)
    segments = [
        segment(width, width, bias=False, dtype=torch.bfloat16, device="cpu") for width in widths
    ]
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(9)).bfloat16()
    found = experts_one_token(x, segments, SILU)
    for row, weights in zip(found, segments, strict=True):
        assert torch.equal(row, gated_ffn(x, weights, SILU)[0])
