"""A block's norms and rotations give the same bits in parts, and take little memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from moepack_runtime.norms import rms_norm
from moepack_runtime.parts import is_in_parts
from moepack_runtime.rope import RotaryEmbedding

from moepack.model_spec import RopeSpec
from moepack.units import KIB, MIB
from tests.support.memory import peak_bytes

HALVES = [torch.bfloat16, torch.float16]

#: The last part has as many rows as the others, one, or some; heads of a width have norms as well.
BLOCKS = [(512, 2048), (193, 2048), (450, 768), (300, 16, 128)]


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stored", [torch.float32, None])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", BLOCKS)
def test_a_blocks_norm_is_torchs_own(
    shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype | None
) -> None:
    x, weight = drawn(*shape).to(dtype), (1 + drawn(shape[-1]) / 8).to(stored or dtype)
    assert is_in_parts(x)
    whole = F.rms_norm(x.float(), (shape[-1],), weight.float(), 1e-5).to(dtype)
    if stored is None:
        assert torch.equal(whole, F.rms_norm(x, (shape[-1],), weight, 1e-5))
    assert torch.equal(rms_norm(weight, 1e-5)(x), whole)
    beside = torch.cat((x, x), -1)[..., : shape[-1]]  # its rows are no neighbours
    assert torch.equal(rms_norm(weight, 1e-5)(beside), whole)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(128, False), (128, True), (64, False)])
def test_a_blocks_rotation_is_that_of_its_tokens(
    rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    rope = RotaryEmbedding(
        RopeSpec(1e4, interleaved=interleaved),
        head_dim=128,
        rotary_dim=rotary_dim,
        context_tokens=512,
        device=torch.device("cpu"),
    )
    x = drawn(193, 16, 128).to(dtype)
    assert is_in_parts(x)
    turned = rope.rotate(x, rope.rotation(7, 193))
    assert turned.dtype is dtype
    for token in range(193):
        one = x[token : token + 1]
        assert not is_in_parts(one)
        assert torch.equal(turned[token], rope.rotate(one, rope.rotation(7 + token, 1))[0])


@pytest.mark.parametrize("shape", BLOCKS)
def test_parts_take_no_more_memory_for_larger_blocks(shape: tuple[int, ...]) -> None:
    weight = drawn(shape[-1]).bfloat16()
    for tokens in (shape[0], 4 * shape[0]):
        x = drawn(tokens, *shape[1:]).bfloat16()
        assert peak_bytes(partial(rms_norm(weight, 1e-5), x)) <= x.nbytes + MIB + 64 * KIB
