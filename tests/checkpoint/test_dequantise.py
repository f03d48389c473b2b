"""Dequantised values against transformers' own functions, bit for bit."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moepack.dequantise import fp8_weights, mxfp4_weights, scale_values
from moepack.errors import DamagedCheckpointError

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
#: Largest exponents of two whose products with every code are finite.
LARGEST_FP8 = {"BF16": 119, "F16": 7, "F32": 119}
LARGEST_MXFP4 = {"BF16": 125, "F16": 13, "F32": 125}

every_dtype = pytest.mark.parametrize("dtype", TORCH)


def assert_same_bits(found: npt.NDArray[Any], expected: torch.Tensor) -> None:
    kind = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    bits = expected.contiguous().view(kind).numpy()
    np.testing.assert_array_equal(found.view(bits.dtype), bits)


def fp8_codes(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint8]:
    """Any code but those for no number."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(codes & 0x7F == 0x7F, np.uint8(0), codes)


def as_fp8(codes: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


@every_dtype
def test_every_code_of_fp8_under_scales_of_every_size(dtype: str) -> None:
    rng = np.random.default_rng(0)
    codes = np.tile(np.arange(256, dtype=np.uint8), (300, 1))
    codes[codes & 0x7F == 0x7F] = 0x80  # minus nought instead of no number
    exponents = rng.uniform(-149, LARGEST_FP8[dtype], (300, 1))
    scales = np.exp2(exponents).astype(np.float32)
    scales[:3] = [[0.0], [-0.37], [1e-45]]
    expected = Fp8Dequantize(None)._dequantize_one(
        as_fp8(codes), torch.from_numpy(scales), TORCH[dtype]
    )
    assert_same_bits(fp8_weights(codes, scales, (1, 256), dtype), expected)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(sorted(TORCH)),
    seed=st.integers(0, 2**32),
)
def test_blocks_may_be_cut_off_at_the_edges(
    shape: tuple[int, int], block: tuple[int, int], dtype: str, seed: int
) -> None:
    """As in the other of transformers' functions, whose result in float32 is rounded here."""
    rng = np.random.default_rng(seed)
    codes = fp8_codes(rng, *shape)
    tiles = [-(-size // length) for size, length in zip(shape, block, strict=True)]
    scales = np.exp2(rng.uniform(-14, 0, tiles)).astype(np.float32)
    exact = _dequantize_fp8_weight(
        as_fp8(codes), torch.from_numpy(scales), list(block), torch.float32
    )
    assert_same_bits(fp8_weights(codes, scales, block, dtype), exact.to(TORCH[dtype]))


@every_dtype
def test_a_matrix_of_many_portions(dtype: str) -> None:
    rng = np.random.default_rng(1)
    codes = fp8_codes(rng, 512, 1280)
    scales = np.exp2(rng.uniform(-14, 0, (4, 10))).astype(np.float32)
    expected = Fp8Dequantize(None)._dequantize_one(
        as_fp8(codes), torch.from_numpy(scales), TORCH[dtype]
    )
    assert_same_bits(fp8_weights(codes, scales, (128, 128), dtype), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E8M0", "U8"])
def test_scales_of_every_dtype_are_those_of_torch(dtype: str) -> None:
    bits = np.arange(255 if dtype in {"F8_E8M0", "U8"} else 65_536, dtype=np.uint16)
    stored: npt.NDArray[Any]
    if dtype in {"F8_E8M0", "U8"}:
        stored = bits.astype(np.uint8)
        expected = torch.from_numpy(stored).view(torch.float8_e8m0fnu).float()
    else:
        stored = bits if dtype == "BF16" else bits.view(np.float16)
        kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        expected = torch.from_numpy(bits.view(np.int16)).view(kind).float()
    np.testing.assert_array_equal(scale_values(stored, dtype), expected.numpy())


@every_dtype
def test_every_byte_of_mxfp4_under_every_scale(dtype: str) -> None:
    count = 127 + LARGEST_MXFP4[dtype] + 1
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (1, count, 1))
    scales = np.tile(np.arange(count, dtype=np.uint8), (16, 1))
    expected = convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None], dtype=TORCH[dtype]
    )
    assert_same_bits(mxfp4_weights(blocks, scales, dtype), expected[0].T)


@every_dtype
def test_mxfp4_of_many_portions(dtype: str) -> None:
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (900, 12, 16), dtype=np.uint8)
    scales = rng.integers(100, 135, (900, 12), dtype=np.uint8)
    expected = convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None], dtype=TORCH[dtype]
    )
    assert_same_bits(mxfp4_weights(blocks, scales, dtype), expected[0].T)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_placed(scale: float) -> None:
    scales = np.ones((3, 2), np.float32)
    scales[2, 1] = scale
    with pytest.raises(DamagedCheckpointError, match=rf"scale of {scale} at \[2, 1\]"):
        fp8_weights(np.zeros((10, 8), np.uint8), scales, (4, 4), "BF16")


@every_dtype
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_weight_that_is_no_number_is_refused(dtype: str, code: int) -> None:
    codes = np.zeros((300, 300), np.uint8)
    codes[299, 256] = code
    with pytest.raises(DamagedCheckpointError, match="no numbers"):
        fp8_weights(codes, np.ones((3, 3), np.float32), (128, 128), dtype)


@every_dtype
def test_weights_beyond_the_dtype_are_refused_and_the_largest_are_not(dtype: str) -> None:
    codes = np.full((4, 4), 0x38, np.uint8)  # one
    largest_value = {"BF16": 2.0**128 - 2.0**120, "F16": 65504.0, "F32": 2.0**128 - 2.0**104}
    scales = np.full((1, 1), largest_value[dtype], np.float32)
    largest = fp8_weights(codes, scales, (4, 4), dtype)
    expected = torch.full((4, 4), float(scales[0, 0]), dtype=torch.float32).to(TORCH[dtype])
    assert torch.isfinite(expected).all()
    assert_same_bits(largest, expected)
    codes[3, 3] = 0x40  # two
    with pytest.raises(DamagedCheckpointError, match="infinite"):
        fp8_weights(codes, scales, (4, 4), dtype)


@every_dtype
def test_mxfp4_beyond_the_dtype_or_without_a_scale_is_refused(dtype: str) -> None:
    blocks = np.full((2, 3, 16), 0x22, np.uint8)  # one
    scales = np.full((2, 3), 127 + LARGEST_MXFP4[dtype] + 1, np.uint8)
    finite = mxfp4_weights(blocks, scales, dtype)
    assert_same_bits(
        finite, torch.full((2, 96), 2.0 ** (LARGEST_MXFP4[dtype] + 1)).to(TORCH[dtype])
    )
    blocks[1, 2, 15] = 0x72  # six
    with pytest.raises(DamagedCheckpointError, match="infinite"):
        mxfp4_weights(blocks, scales, dtype)
    with pytest.raises(DamagedCheckpointError, match="no numbers"):
        mxfp4_weights(blocks * 0, np.full((2, 3), 255, np.uint8), dtype)


def test_dequantising_takes_a_mebibyte_beside_what_it_reads_and_makes() -> None:
    codes = np.zeros((2048, 7168), np.uint8)  # an expert of DeepSeek-V3
    scales = np.ones((16, 56), np.float32)
    blocks = np.zeros((5760, 90, 16), np.uint8)  # one of GPT-OSS
    exponents = np.full((5760, 90), 127, np.uint8)
    for values in range(2):
        tracemalloc.start()
        weights = (
            mxfp4_weights(blocks, exponents, "BF16")
            if values
            else fp8_weights(codes, scales, (128, 128), "BF16")
        )
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        read_scales = exponents.nbytes if values else scales.nbytes
        assert peak_bytes <= weights.nbytes + (1 << 20) + 2 * read_scales
