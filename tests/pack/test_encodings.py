"""The table of encodings: sizes against counting by hand, tiles against a loop over elements."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.encodings import ENCODINGS, QUANTISED, encoding, pack_tiles, unpack_tiles
from moepack.errors import GroupMismatchError, UnknownEncodingError


def random_codes(inputs: int, outputs: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 16, (inputs, outputs), dtype=np.uint8)


def tiles_by_hand(codes: npt.NDArray[np.uint8]) -> bytes:
    """As the format chapter says it, one byte after another."""
    inputs, outputs = codes.shape
    found = []
    for first in range(0, outputs, 64):
        rows = min(64, outputs - first)
        for k in range(inputs):
            for r in range(rows // 2):
                low, high = (r, 32 + r) if rows == 64 else (2 * r, 2 * r + 1)
                found.append(int(codes[k, first + low]) | int(codes[k, first + high]) << 4)
    return bytes(found)


@given(st.integers(1, 70), st.integers(1, 100), st.integers(0, 9))
def test_tiles_hold_the_codes_where_the_format_says(inputs: int, pairs: int, seed: int) -> None:
    codes = random_codes(inputs, 2 * pairs, seed)
    packed = pack_tiles(codes)
    assert packed.tobytes() == tiles_by_hand(codes)
    np.testing.assert_array_equal(unpack_tiles(packed, 2 * pairs), codes)


@pytest.mark.parametrize("outputs", [16, 32, 48, 64, 80, 128, 160])
def test_tiles_are_the_bytes_of_torchs_kernel_where_it_runs_avx512(outputs: int) -> None:
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("torch packs 4-bit weights otherwise without AVX-512")
    codes = random_codes(96, outputs, outputs)
    rows = torch.from_numpy(np.ascontiguousarray(codes.T)).int()
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows, 1)
    assert pack_tiles(codes).tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "weight_bytes", "matrix_bytes"),
    [
        ("F32", 4.0, 128 * 64 * 4),
        ("BF16", 2.0, 128 * 64 * 2),
        ("INT8", 1 + 2 / 64, 128 * 64 + 128 * 2),
        ("INT4_G32", 0.625, 128 * 64 // 2 + 128 * 2 * 4),
        ("INT4_G64", 0.5625, 128 * 64 // 2 + 128 * 4),
    ],
)
def test_a_matrix_takes_its_codes_and_its_scales(
    name: str, weight_bytes: float, matrix_bytes: int
) -> None:
    found = encoding(name)
    assert found.bytes_per_weight(64) == weight_bytes
    assert found.matrix_bytes(128, 64) == matrix_bytes == 128 * 64 * weight_bytes


def test_an_unknown_encoding_is_refused_with_the_list_of_the_known() -> None:
    with pytest.raises(UnknownEncodingError, match=r"'INT3' is not .* BF16, INT8, INT4_G32"):
        encoding("INT3")


@pytest.mark.parametrize("name", QUANTISED)
def test_sizes_that_the_group_does_not_divide_are_refused(name: str) -> None:
    item = encoding(name)
    item.check_fits(item.multiple, 3 * item.multiple)
    with pytest.raises(GroupMismatchError, match="the hidden size is"):
        item.check_fits(item.multiple + 2, item.multiple)
    with pytest.raises(GroupMismatchError, match="width of experts is"):
        item.check_fits(item.multiple, item.multiple + 2)


def test_the_refusal_says_what_would_do() -> None:
    with pytest.raises(GroupMismatchError, match="choose INT8, INT4_G32 or the model's own"):
        ENCODINGS["INT4_G64"].check_fits(128, 96)
    with pytest.raises(GroupMismatchError, match="choose INT8, INT4_G32 or the model's own"):
        ENCODINGS["INT4_G64"].tensors(64, 96)
