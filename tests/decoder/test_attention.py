"""Masks, and the two ways of latent attention."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from moepack_runtime.attention import attend_alone, attend_in_groups, causal_mask
from moepack_runtime.kv_cache import LayerCache
from moepack_runtime.latent_attention import LatentAttention
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 500, 9000])
def test_one_token_of_heads_that_share_no_keys_is_as_exact_as_torchs_own(
    rows: int, dtype: torch.dtype
) -> None:
    """With 9000 rows a few heads at a time; and the same bits from another place of the cache."""
    heads, width, value_width, spare = 5, 64, 48, 3
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(dtype)

    queries = drawn(heads, width)
    memory = drawn(heads, rows + spare, width), drawn(heads, rows + spare, value_width)
    keys, values = (tensor[:, :, spare:] for tensor in memory)
    found = attend_alone(queries, keys, values, width**-0.5)
    assert found.dtype is dtype
    assert torch.equal(
        found, attend_alone(queries, keys.contiguous(), values.contiguous(), width**-0.5)
    )
    attend = partial(F.scaled_dot_product_attention, scale=width**-0.5)
    exact = attend(queries.double().unsqueeze(2), keys.double(), values.double())[0]
    torchs = attend(queries.unsqueeze(2), keys, values)[0]
    assert (found - exact).abs().mean() <= (torchs - exact).abs().mean()


@pytest.mark.parametrize(("tokens", "start"), [(384, 0), (385, 0), (512, 100)])
@pytest.mark.parametrize("masks", ["plain", "window", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_in_halves_is_as_exact_as_at_once(
    dtype: torch.dtype, masks: str, tokens: int, start: int
) -> None:
    kv_heads, groups, width, value_width = 2, 3, 32, 48
    sinks = masks == "sinks"
    rows = start + tokens + sinks
    generator = torch.Generator().manual_seed(tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    queries = drawn(tokens, kv_heads * groups, width).transpose(0, 1)
    keys, values = drawn(1, kv_heads, rows, width), drawn(1, kv_heads, rows, value_width)
    window = 200 if masks == "window" else None
    mask = causal_mask(tokens, rows - sinks, start, 0, window, queries)
    if sinks:
        seen = mask.expand(kv_heads, groups, tokens, -1)
        mask = torch.cat((torch.ones_like(seen[..., :1]), seen), -1)
    is_causal = masks == "plain" and start == 0
    found = attend_in_groups(
        queries, keys, values, None if is_causal else mask, is_causal=is_causal, scale=0.2
    )
    assert found.shape == (kv_heads * groups, tokens, value_width)
    every = queries.reshape(kv_heads, groups, tokens, width)
    seen_keys, seen_values = (
        each.transpose(0, 1).expand(-1, groups, -1, -1) for each in (keys, values)
    )
    whole, exact = (
        F.scaled_dot_product_attention(
            every.to(kind),
            seen_keys.to(kind),
            seen_values.to(kind),
            attn_mask=mask.to(kind),
            scale=0.2,
        ).flatten(0, 1)
        for kind in (dtype, torch.float64)
    )
    assert (found - exact).abs().mean() <= 1.1 * (whole - exact).abs().mean()
    # What a token does not see plays no role.
    keys[:, :, -1], values[:, :, -1] = 7, torch.inf
    again = attend_in_groups(
        queries, keys, values, None if is_causal else mask, is_causal=is_causal, scale=0.2
    )
    assert torch.equal(again[:, : tokens // 2], found[:, : tokens // 2])


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
