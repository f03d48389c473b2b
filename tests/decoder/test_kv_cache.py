"""The cache takes the bytes that were planned, and forgets nothing that a window still sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moepack_runtime.kv_cache import KvCache, LayerCache

from moepack.checkpoint import Checkpoint
from moepack.working_memory import kv_bytes
from tests.conftest import TinyFolder
from tests.support.tiny_models import TINY_MODELS

KEYS = [(model.family, model.variant) for model in TINY_MODELS]


@pytest.mark.parametrize(("family", "variant"), KEYS)
@pytest.mark.parametrize(("context_tokens", "block_tokens"), [(96, 8), (12, 16)])
def test_the_cache_takes_exactly_the_planned_bytes(
    tiny_folder: TinyFolder, family: str, variant: str, context_tokens: int, block_tokens: int
) -> None:
    spec = Checkpoint.open(tiny_folder(family, variant)).spec
    kv = KvCache.allocate(
        spec,
        context_tokens=context_tokens,
        block_tokens=block_tokens,
        device=torch.device("cpu"),
    )
    assert kv.size_bytes == kv_bytes(spec, context_tokens, block_tokens)


def row(position: int) -> torch.Tensor:
    """What a token at this position leaves: [1, heads, width], no two alike."""
    return torch.arange(6.0).view(1, 2, 3) + 10 * (position + 1)


def rows(positions: range) -> torch.Tensor:
    return torch.cat([row(position) for position in positions])


@given(
    blocks=st.lists(st.integers(1, 5), max_size=40),
    window=st.integers(1, 9),
    sinks=st.booleans(),
)
def test_a_window_sees_its_tokens_in_order_behind_the_sink(
    blocks: list[int], window: int, sinks: bool
) -> None:
    capacity = window + 5 + sinks
    cache = LayerCache(
        torch.full((capacity * 6,), 0.0),
        [(2, 3)],
        capacity=capacity,
        window=window,
        sinks=sinks,
    )
    start = 0
    for tokens in blocks:
        seen_from, (seen,) = cache.append(start, rows(range(start, start + tokens)))
        # Nothing that the first of the tokens may see is missing; what is older may be there.
        assert seen_from <= max(0, start - window + 1)
        if sinks:
            assert not seen[:, :, 0].any()
            seen = seen[:, :, 1:]
        expected = rows(range(seen_from, start + tokens)).transpose(0, 1)
        assert torch.equal(seen[0], expected)
        start += tokens


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    window=st.none() | st.integers(1, 6),
    sinks=st.booleans(),
)
def test_what_can_be_truncated_can_be_gone_on_from(
    lengths: list[int], window: int | None, sinks: bool
) -> None:
    capacity = 200 + sinks if window is None else window + 1 + sinks
    cache = LayerCache(
        torch.zeros(capacity * 6), [(2, 3)], capacity=capacity, window=window, sinks=sinks
    )
    end = 0
    for length in lengths:
        for position in range(end, end + 12):
            cache.append(position, row(position))
        end += 12
        back = max(0, end - length)
        if window is None:
            assert cache.can_truncate(back)
        if cache.can_truncate(back):
            cache.truncate(back)
            end = back
        seen_from, (seen,) = cache.append(end, row(end))
        end += 1
        assert seen_from == (0 if window is None else max(0, end - window))
        assert torch.equal(
            seen[0, :, 1 if sinks else 0 :], rows(range(seen_from, end)).transpose(0, 1)
        )


def test_going_back_further_than_a_window_remembers_is_not_offered() -> None:
    cache = LayerCache(torch.zeros(6 * 6), [(2, 3)], capacity=6, window=4, sinks=False)
    for position in range(30):
        cache.append(position, row(position))
    offered = [length for length in range(31) if cache.can_truncate(length)]
    assert offered[0] == 0
    assert offered[-1] == 30
    assert 10 not in offered
