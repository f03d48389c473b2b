"""Products are as exact as torch's own, whichever kernel makes them, and leave no switch behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moepack_runtime.ffn import FfnWeights, gated_ffn, rows_for
from moepack_runtime.products import dear_rows, is_dear, is_one_row, linear, without_onednn

from moepack.model_spec import ActivationSpec
from moepack.segments import align_up
from moepack.working_memory import ROW_MULTIPLE

SHAPES = [(2048, 1024), (512, 2048), (300, 96), (7, 3)]
HALVES = [torch.bfloat16, torch.float16]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_error_of_one_row_is_no_larger_than_that_of_torch(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    weight = drawn(*shape, seed=1).to(dtype)
    bias = drawn(shape[0], seed=2).to(dtype) if has_bias else None
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(10):
        x = drawn(1, shape[1], seed=seed).to(dtype)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for which, found in enumerate((linear(x, weight, bias), F.linear(x, weight, bias))):
            assert found.dtype is dtype
            errors[which] += (found.double() - exact).abs().mean()
    assert errors[0] <= errors[1] * 1.01


@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_several_rows_are_torchs_own(tokens: int, dtype: torch.dtype) -> None:
    x, weight = drawn(tokens, 96).to(dtype), drawn(40, 96, seed=1).to(dtype)
    assert not is_one_row(x)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.usefixtures("threads")
def test_the_bits_depend_neither_on_threads_nor_on_where_the_weights_lie() -> None:
    x, weight = drawn(1, 1056).bfloat16(), drawn(768, 1056, seed=1).bfloat16()
    memory = torch.empty(weight.nbytes + 128, dtype=torch.uint8)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        for offset in (0, 2, 64, 98):
            place = memory[offset : offset + weight.nbytes].view(torch.bfloat16).view(weight.shape)
            found.append(linear(x, place.copy_(weight)))
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("was_on", [True, False])
def test_the_switch_is_put_back(monkeypatch: pytest.MonkeyPatch, was_on: bool) -> None:
    library: Any = torch.backends.mkldnn
    monkeypatch.setattr(library, "enabled", was_on)
    x = drawn(1, 96).bfloat16()
    gate, up, down = (drawn(96, 96, seed=seed).bfloat16() for seed in range(3))
    weights = FfnWeights(gate, up, down)
    gated_ffn(x, weights, ActivationSpec("silu"))
    assert library.enabled == was_on
    with pytest.raises(RuntimeError):
        gated_ffn(x, weights._replace(down=drawn(96, 95).bfloat16()), ActivationSpec("silu"))
    assert library.enabled == was_on
    with without_onednn:
        assert not library.enabled
    assert library.enabled == was_on


BLOCK = 512


def test_dear_experts_take_fewer_rows_by_no_more_kernels() -> None:
    counts = range(1, BLOCK + 1)
    kernels = {dear_rows(tokens) for tokens in counts}
    assert len(kernels) <= BLOCK // ROW_MULTIPLE, "each number of rows costs a kernel's memory"
    assert all(dear_rows(tokens) >= tokens for tokens in counts)
    assert all(dear_rows(rows) == rows for rows in kernels)
    # At the counts that a block of 512 gives the experts of published models, and below.
    assert all(dear_rows(tokens) <= align_up(tokens, ROW_MULTIPLE) for tokens in range(1, 257))
    assert [dear_rows(tokens) for tokens in (1, 2, 5, 65, 100)] == [1, 2, 8, 72, 104]


def test_rows_are_never_more_than_the_plan_has_room_for() -> None:
    def expert(hidden: int, neurons: int) -> FfnWeights:
        return FfnWeights(*(torch.empty(0),) * 2, torch.empty(hidden, neurons).bfloat16())

    dear, cheap = expert(2048, 1024), expert(512, 1024)
    for block in (1, 9, 260, 300, BLOCK):
        x = torch.empty(block, 1).bfloat16()
        assert is_dear(x, dear.down)
        assert not is_dear(x, cheap.down)
        assert not is_dear(x.float(), dear.down)
        for tokens in range(1, block + 1):
            padded = align_up(tokens, ROW_MULTIPLE)
            assert tokens <= rows_for(tokens, x, dear) <= align_up(block, ROW_MULTIPLE)
            assert rows_for(tokens, x, cheap) == rows_for(tokens, x.float(), dear) == padded
