"""Frequencies are those of transformers to the last bit; rotations are those of the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from moepack_runtime.rope import RotaryEmbedding, rope_frequencies
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moepack.checkpoint import Checkpoint
from moepack.errors import ContextLengthError
from moepack.model_spec import RopeSpec
from tests.conftest import TinyFolder
from tests.support.tiny_models import TINY_MODELS, build_tiny

KEYS = [(model.family, model.variant) for model in TINY_MODELS]

#: Parameters as published, with what the families make of them.
PUBLISHED: dict[str, tuple[int, dict[str, Any], RopeSpec]] = {
    "gpt-oss-20b": (
        64,
        {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        RopeSpec(
            150_000.0,
            "yarn",
            factor=32.0,
            original_context=4096,
            attention_factor=0.1 * math.log(32) + 1,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
        ),
    ),
    "deepseek-v3": (
        64,
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        RopeSpec(
            10_000.0,
            "yarn",
            factor=40.0,
            original_context=4096,
            attention_factor=1.0,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
    ),
    "llama-3.1": (
        128,
        {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeSpec(
            500_000.0,
            "llama3",
            factor=8.0,
            original_context=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ),
    "linear": (
        128,
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
        RopeSpec(10_000.0, "linear", factor=2.5),
    ),
    "dynamic": (
        128,
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        RopeSpec(10_000.0, "dynamic", factor=4.0, original_context=65536),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_of_published_parameters(name: str) -> None:
    head_dim, parameters, rope = PUBLISHED[name]
    config = transformers.Qwen3MoeConfig(
        head_dim=head_dim, max_position_embeddings=65536, rope_parameters=dict(parameters)
    )
    theirs, scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    ours, factor = rope_frequencies(rope, head_dim)
    assert torch.equal(ours, theirs)
    assert factor == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("length", [4096, 4097])
def test_longrope_takes_its_factors_by_the_length(length: int) -> None:
    short, long = [1.0 + 0.1 * i for i in range(32)], [2.0 + 0.5 * i for i in range(32)]
    config = transformers.Qwen3MoeConfig(
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": 32.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": 4096,
        },
    )
    theirs, scaling = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
    rope = RopeSpec(
        10_000.0,
        "longrope",
        factor=32.0,
        original_context=4096,
        attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
        short_factor=tuple(short),
        long_factor=tuple(long),
    )
    ours, factor = rope_frequencies(rope, 64, is_long=length > 4096)
    assert torch.equal(ours, theirs)
    assert factor == pytest.approx(scaling, rel=1e-12)
    embedding = make(rope, head_dim=64)
    embedding.begin_pass(length)
    torch.testing.assert_close(
        embedding.rotation(length - 1, 1).cos[0, 0, :32],
        ((length - 1) * theirs).cos() * scaling,
        atol=0,
        rtol=1e-6,
    )


@pytest.mark.parametrize(("family", "variant"), KEYS)
def test_frequencies_are_those_of_the_transformers_model(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    spec = Checkpoint.open(tiny_folder(family, variant)).spec
    theirs = build_tiny(family, variant).model.rotary_emb
    ours, factor = rope_frequencies(spec.rope, spec.layers[0].attention.rotary_dim)
    assert torch.equal(ours, theirs.inv_freq)
    if spec.rope.short_mscale is None:
        assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def make(
    rope: RopeSpec, *, head_dim: int, rotary_dim: int | None = None, context_tokens: int = 8192
) -> RotaryEmbedding:
    return RotaryEmbedding(
        rope,
        head_dim=head_dim,
        rotary_dim=head_dim if rotary_dim is None else rotary_dim,
        context_tokens=context_tokens,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_pairs_turn_by_their_angle_and_the_rest_passes(interleaved: bool, rotary_dim: int) -> None:
    embedding = make(RopeSpec(100.0, interleaved=interleaved), head_dim=16, rotary_dim=rotary_dim)
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    turned = embedding.rotate(x, embedding.rotation(1000, 3))
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    half = rotary_dim // 2
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        for token in range(3):
            angle = (1000 + token) * 100.0 ** (-2 * pair / rotary_dim)
            turn = torch.polar(torch.tensor(1.0), torch.tensor(angle))
            expected = torch.complex(x[token, :, a], x[token, :, b]) * turn
            found = torch.complex(turned[token, :, a], turned[token, :, b])
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_bfloat16_is_rounded_once() -> None:
    embedding = make(RopeSpec(100.0), head_dim=16)
    x = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = embedding.rotation(5, 4)
    assert torch.equal(
        embedding.rotate(x, rotation), embedding.rotate(x.float(), rotation).bfloat16()
    )


def test_dynamic_scaling_is_refused_where_it_would_change_cached_keys() -> None:
    rope = RopeSpec(10_000.0, "dynamic", factor=4.0, original_context=4096)
    make(rope, head_dim=16, context_tokens=4096)
    with pytest.raises(ContextLengthError, match="4097 tokens exceeds the 4096"):
        make(rope, head_dim=16, context_tokens=4097)
