"""Weights out of the formats that checkpoints are published in: FP8 in blocks, and MXFP4.

The values are those of transformers 5 (``Fp8Dequantize._dequantize_one`` and
``convert_moe_packed_tensors``), bit for bit: what the code stands for times the scale, in float32,
rounded to the model's dtype, to nearest and ties to even. As a block has one scale and a code few
values, the products are made once a block and every weight is looked up. That goes by portions of
rows, so that beside codes, scales and result it takes 1 MiB and twice the scales. Only numpy is
needed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.errors import DamagedCheckpointError
from moepack.segments import Bits

#: numpy has no bfloat16: its bits travel as unsigned integers.
NUMPY_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}

#: The dtypes that scales come in; of E8M0 there are the bare exponents.
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

#: Weights that share a scale in MXFP4 (OCP Microscaling Formats 1.0), and the bytes they take.
MXFP4_GROUP = 32
MXFP4_GROUP_BYTES = MXFP4_GROUP // 2

#: Products of this size and larger round to infinity.
_INFINITE_FROM = {"BF16": 2.0**128 - 2.0**119, "F16": 2.0**16 - 2.0**4, "F32": np.inf}

#: Codes looked up at once: their indices (8 bytes each) stay in a core's cache.
_PORTION = 65_536

#: In E4M3, all ones but for the sign: the code for no number.
_E4M3_NAN = 0x7F

_Floats = npt.NDArray[np.float32]


class _Products(NamedTuple):
    """Values to look up, and whether each is infinite or no number. Both by index."""

    values: Bits
    refused: npt.NDArray[np.bool_]


def fp8_weights(codes: Bits, scales: _Floats, block: tuple[int, int], dtype: str) -> Bits:
    """A matrix in FP8 (E4M3) with a scale for each block.

    Blocks at the lower and the right edge may be cut off, as in DeepSeek's reference and in the
    products of transformers; its ``Fp8Dequantize`` knows matrices of whole blocks alone.

    Parameters
    ----------
    codes
        uint8 [rows, columns].
    scales
        [ceil(rows / height), ceil(columns / width)]: see :func:`scale_values`.
    block
        Height and width.
    dtype
        Of the result: a key of :data:`NUMPY_DTYPES`.

    Raises
    ------
    DamagedCheckpointError
        Where a scale is not finite, or a weight would not be. The caller names the tensor.
    """
    _check_finite(scales)
    height, width = block
    weights = np.empty(codes.shape, NUMPY_DTYPES[dtype])
    starts = np.broadcast_to(np.arange(codes.shape[1]) // width * 256, codes.shape)
    for tile, first in zip(scales, range(0, len(codes), height), strict=True):
        rows = slice(first, first + height)
        products = _products(_e4m3_values(), tile[:, None], dtype)
        # Two codes of a block stand for no number: what counts is whether a weight has them.
        suspect = int(products.refused.sum()) > 2 * len(tile) or _has_nan(codes[rows])
        _look_up(products, codes[rows], starts[rows], weights[rows], suspect=suspect)
    return weights


def mxfp4_weights(blocks: Bits, scales: Bits, dtype: str) -> Bits:
    """A matrix in MXFP4: E2M1 codes, the even column in the low bits, an E8M0 scale for each 32.

    Parameters
    ----------
    blocks
        uint8 [rows, groups, 16].
    scales
        uint8 [rows, groups].
    dtype
        As in :func:`fp8_weights`.

    Returns
    -------
    Bits
        [rows, 32 * groups].

    Raises
    ------
    DamagedCheckpointError
        Where a scale is the code for no number, or a weight would be infinite. The caller names
        the tensor.
    """
    products = _mxfp4_products(dtype)
    pairs = np.empty(blocks.shape, products.values.dtype)
    starts = scales.astype(np.uint16)[..., None] << 8  # [rows, groups, 1]
    suspects = np.flatnonzero(products.refused) // 256  # the largest scales, and no number
    _look_up(products, blocks, starts, pairs, suspect=bool(scales.max() >= suspects[0]))
    return pairs.view(NUMPY_DTYPES[dtype]).reshape(len(blocks), -1)


def scale_values(scales: Bits, dtype: str) -> _Floats:
    """Scales as float32, from any of :data:`SCALE_DTYPES`."""
    if dtype == "BF16":
        return (scales.astype(np.uint32) << 16).view(np.float32)
    if dtype in {"F8_E8M0", "U8"}:
        return _e8m0_values()[scales]
    return scales.astype(np.float32)


def _look_up(
    products: _Products, codes: Bits, starts: npt.NDArray[np.integer], out: Bits, *, suspect: bool
) -> None:
    """``out = values[starts + codes]``; where it is ``suspect``, all of it is checked."""
    rows = _portion_rows(codes)
    room = np.empty((min(rows, len(codes)), *codes.shape[1:]), np.intp)
    for first in range(0, len(codes), rows):
        portion = slice(first, first + rows)
        index = room[: len(codes[portion])]
        np.add(codes[portion], starts[portion], out=index)
        if suspect and products.refused[index].any():
            raise DamagedCheckpointError("weights that are infinite or no numbers")
        # No index is out of range: "clip" spares numpy the copy that "raise" makes.
        np.take(products.values, index, out=out[portion], mode="clip")


def _has_nan(codes: Bits) -> bool:
    """Whether E4M3 codes stand for no number anywhere."""
    rows = _portion_rows(codes)
    portions = (codes[first : first + rows] for first in range(0, len(codes), rows))
    return any(np.bitwise_and(portion, _E4M3_NAN).max() == _E4M3_NAN for portion in portions)


def _portion_rows(codes: Bits) -> int:
    return max(1, _PORTION // int(codes[0].size))


def _check_finite(scales: _Floats) -> None:
    wrong = np.argwhere(~np.isfinite(scales))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise DamagedCheckpointError(f"a scale of {scales[place]} at {list(place)}")


def _products(codes: _Floats, scales: _Floats, dtype: str) -> _Products:
    """What every code stands for under every scale; ``codes`` are along the last axes."""
    with np.errstate(over="ignore"):
        exact = codes * scales
    refused = np.logical_not(np.abs(exact) < _INFINITE_FROM[dtype])
    return _Products(_round(exact, dtype).ravel(), refused.ravel())


def _round(values: _Floats, dtype: str) -> Bits:
    """Bit patterns in another dtype: the nearest, the even one of two."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(NUMPY_DTYPES[dtype])


@functools.cache
def _e4m3_values() -> _Floats:
    """What E4M3 codes stand for (OCP 8-bit Floating Point 1.0): no infinities, exponent bias 7."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, (codes & 7) / 8
    values = np.where(exponents > 0, (1 + fractions) * 2.0 ** (exponents - 7), fractions * 2.0**-6)
    values[codes & _E4M3_NAN == _E4M3_NAN] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


@functools.cache
def _e8m0_values() -> _Floats:
    """What E8M0 codes stand for: powers of two, and 255 for no number."""
    values = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


@functools.cache
def _mxfp4_products(dtype: str) -> _Products:
    """Pairs of weights by scale and byte: index 256 * scale + byte, two values in one element."""
    halves = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    e2m1 = np.concatenate([halves, -halves])
    byte = np.arange(256)
    pairs = np.stack([e2m1[byte & 15], e2m1[byte >> 4]], axis=-1)  # [256, 2]
    single = _products(pairs, _e8m0_values()[:, None, None], dtype)
    both = single.values.view(f"<u{2 * single.values.itemsize}")
    return _Products(both, np.asarray(single.refused.reshape(-1, 2).any(axis=1)))
