"""One feed-forward function for dense layers, shared experts and slices of routed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from moepack_runtime.ffn import FfnWeights, gated_ffn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moepack.model_spec import ActivationSpec

HIDDEN, NEURONS = 24, 40
SILU = ActivationSpec("silu")
GPT_OSS = ActivationSpec("clamped_swiglu", alpha=1.7, limit=0.8)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights(*, bias: bool) -> FfnWeights:
    matrices = drawn(NEURONS, HIDDEN), drawn(HIDDEN, NEURONS).T.contiguous(), drawn(HIDDEN, NEURONS)
    if not bias:
        return FfnWeights(*matrices)
    return FfnWeights(*matrices, drawn(NEURONS), drawn(NEURONS, 1)[:, 0], drawn(HIDDEN))


def fused(whole: FfnWeights) -> FfnWeights:
    bias = None
    if whole.gate_bias is not None and whole.up_bias is not None:
        bias = torch.cat((whole.gate_bias, whole.up_bias))
    return whole._replace(gate_up=torch.cat((whole.gate, whole.up)), gate_up_bias=bias)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_output_is_that_of_transformers(tokens: int, activation: Any) -> None:
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=NEURONS, num_local_experts=1, hidden_act=activation
    )
    theirs = MixtralExperts(config)
    ours = weights(bias=False)
    theirs.gate_up_proj.data[0] = torch.cat((ours.gate, ours.up))
    theirs.down_proj.data[0] = ours.down
    x = drawn(tokens, HIDDEN)
    expected = theirs(x, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)).detach()
    for form in (ours, fused(ours)):
        found = gated_ffn(x, form, ActivationSpec(activation))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 33])
def test_the_clamped_activation_and_the_biases_are_those_of_gpt_oss(tokens: int) -> None:
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_local_experts=1,
        swiglu_alpha=GPT_OSS.alpha,
        swiglu_limit=GPT_OSS.limit,
    )
    theirs = GptOssExperts(config)
    ours = weights(bias=True)
    assert ours.gate_bias is not None
    assert ours.up_bias is not None
    theirs.gate_up_proj.data[0] = torch.stack((ours.gate, ours.up), 1).flatten(0, 1).T
    theirs.gate_up_proj_bias.data[0] = torch.stack((ours.gate_bias, ours.up_bias), 1).flatten()
    theirs.down_proj.data[0] = ours.down.T
    theirs.down_proj_bias.data[0] = ours.down_bias
    x = drawn(tokens, HIDDEN)
    expected = theirs(x, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)).detach()
    for form in (ours, fused(ours)):
        found = gated_ffn(x, form, GPT_OSS)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("activation", [SILU, GPT_OSS])
@pytest.mark.parametrize("split", [16, 31])
def test_the_parts_of_an_expert_add_up_to_the_whole(activation: ActivationSpec, split: int) -> None:
    """The output's bias goes with one part."""
    whole = weights(bias=activation is GPT_OSS)

    def part(neurons: slice, down_bias: torch.Tensor | None) -> FfnWeights:
        return FfnWeights(
            whole.gate[neurons],
            whole.up[neurons],
            whole.down[:, neurons].contiguous(),
            None if whole.gate_bias is None else whole.gate_bias[neurons],
            None if whole.up_bias is None else whole.up_bias[neurons],
            down_bias,
        )

    x = drawn(5, HIDDEN)
    top = gated_ffn(x, part(slice(0, split), None), activation)
    bottom = gated_ffn(x, part(slice(split, None), whole.down_bias), activation)
    torch.testing.assert_close(top + bottom, gated_ffn(x, whole, activation), atol=1e-3, rtol=1e-5)
