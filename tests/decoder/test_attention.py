"""Masks, and the two ways of latent attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from moepack_runtime.attention import LatentAttention, causal_mask
from moepack_runtime.kv_cache import LayerCache
from moepack_runtime.rope import RotaryEmbedding
from moepack_runtime.weights import Weights

from moepack.model_spec import AttentionSpec, MlaSpec, RopeSpec


@pytest.mark.parametrize(
    ("tokens", "start", "window"), list(itertools.product((2, 5), (0, 3, 9), (None, 1, 4, 20)))
)
def test_a_token_looks_back_as_far_as_its_window(
    tokens: int, start: int, window: int | None
) -> None:
    seen_from = 0 if window is None else max(0, start - window)
    rows = start + tokens - seen_from
    mask = causal_mask(tokens, rows, start, seen_from, window, torch.zeros(()))
    for token, row in itertools.product(range(tokens), range(rows)):
        distance = (start + token) - (seen_from + row)
        may_look = distance >= 0 and (window is None or distance < window)
        assert mask[token, row] == (0 if may_look else -torch.inf)


def latent_attention() -> LatentAttention:
    hidden, heads = 32, 3
    mla = MlaSpec(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=4)
    spec = AttentionSpec(heads, heads, 12, 10, 4, 12**-0.5, mla=mla)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q.weight": (heads * 12, hidden),
        "kv_a.weight": (20, hidden),
        "kv_b.weight": (heads * 18, 16),
        "o.weight": (hidden, heads * 10),
        "kv_a_norm.weight": (16,),
    }
    weights = {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }
    rope = RotaryEmbedding(
        RopeSpec(1e4, interleaved=True),
        head_dim=4,
        rotary_dim=4,
        context_tokens=64,
        device=torch.device("cpu"),
    )
    cache = LayerCache(torch.zeros(64 * 20), [(1, 20)], capacity=64, window=None, sinks=False)
    return LatentAttention(spec, mla, Weights(weights), rope=rope, cache=cache)


@pytest.mark.parametrize("blocks", [(40,), (7, 1, 20, 1, 11), (1,) * 40])
def test_absorbing_and_expanding_the_latent_agree(
    blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for absorbs in (True, False):
        attention = latent_attention()
        monkeypatch.setattr(attention, "_absorbs", lambda _, absorbs=absorbs: absorbs)
        start, outputs = 0, []
        for tokens in blocks:
            outputs.append(attention(x[start : start + tokens], start))
            start += tokens
        results.append(torch.cat(outputs))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
