"""4-bit codes as a GPU's threads read them: against what each thread reads, and on a GPU by use."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from moepack_runtime import int4_fragments
from moepack_runtime.int4_fragments import fragments_of, in_memory, reads_fragments, rebuild
from moepack_runtime.quantised import Int4Fragments, product

from moepack.encodings import encoding, pack_tiles
from moepack.segments import SegmentShape, SegmentTensor

CUDA = torch.device("cuda")


def codes_drawn(inputs: int, outputs: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 16, (inputs, outputs), np.uint8)


def by_thread(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """What PTX says of the second operand of mma.m16n8k16, two tiles to a word of each thread.

    Thread t holds row t / 4, and of the inputs (t % 4) * 2 + {0, 1, 8, 9} of each tile; torch puts
    the first of every pair into the lower half of the word, the second into the upper.
    """
    inputs, outputs = codes.shape
    words = np.zeros((outputs // 8, inputs // 32, 32), np.uint32)
    for tile, pair, thread in np.ndindex(words.shape):
        first = pair * 32 + thread % 4 * 2
        held = [first + step for step in (0, 1, 8, 9, 16, 17, 24, 25)]
        values = codes[held, tile * 8 + thread // 4].astype(np.uint32)
        for place, index in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[tile, pair, thread] |= values[index] << np.uint32(4 * place)
    return words.view(np.uint8).ravel()


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 8), (64, 24), (96, 64), (32, 200)])
def test_every_thread_finds_its_codes(inputs: int, outputs: int) -> None:
    codes = codes_drawn(inputs, outputs)
    np.testing.assert_array_equal(fragments_of(codes), by_thread(codes))
    packed = pack_tiles(codes)
    rebuild(packed, outputs)
    np.testing.assert_array_equal(packed.ravel(), by_thread(codes))


def shape_of(*tensors: tuple[str, tuple[int, ...]]) -> SegmentShape:
    return SegmentShape(
        8, tuple(SegmentTensor(name, "U8", size, 0) for name, size in tensors), 1, 4096
    )


def test_what_the_kernel_cannot_take_stays_in_tiles() -> None:
    """Another dtype, a processor, rows that are no multiple of 8, inputs of half a pair."""
    fits = shape_of(("down.codes", (64, 32)), ("down.scales", (2, 64, 2)))
    renamed = shape_of(("down.fragments", (64, 32)), ("down.scales", (2, 64, 2)))
    with patch.object(int4_fragments, "reads_fragments", return_value=True):
        assert in_memory(fits, "BF16", CUDA) == renamed
        assert in_memory(fits, "F32", CUDA) == fits
        assert in_memory(fits, "BF16", torch.device("cpu")) == fits
        for codes, scales in (((60, 32), (2, 60, 2)), ((64, 8), (1, 64, 2))):
            odd = shape_of(("down.codes", codes), ("down.scales", scales))
            assert in_memory(odd, "BF16", CUDA) == odd
    with patch.object(int4_fragments, "reads_fragments", return_value=False):
        assert in_memory(fits, "BF16", CUDA) == fits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["INT4_G32", "INT4_G64"])
@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_a_device_multiplies_fragments(name: str, tokens: int) -> None:
    assert reads_fragments(CUDA)
    outputs, inputs = 200, 256
    group = encoding(name).group
    assert group is not None
    codes = codes_drawn(inputs, outputs)
    draw = torch.Generator().manual_seed(1)
    scales = torch.rand(inputs // group, outputs, 2, generator=draw).bfloat16()
    x = torch.randn(tokens, inputs, generator=draw).bfloat16()
    lying = torch.from_numpy(fragments_of(codes)).view(outputs, inputs // 2)
    matrix = Int4Fragments(lying.to(CUDA), scales.to(CUDA))
    found = product(x.to(CUDA), matrix).cpu().double()
    scale, offset = scales.double().repeat_interleave(group, 0).unbind(-1)
    weights = (torch.from_numpy(codes).double() - 8) * scale + offset
    bound = x.double().abs() @ weights.abs() * 2**-6
    assert bool(((found - x.double() @ weights).abs() <= bound).all())
