"""The tiles in which torch's kernel for 4-bit weights reads codes, found by what it does.

Torch packs codes in one way where its instruction set is AVX-512, in another with AVX2, and in a
third without either, and computes wrong numbers, without an error, from any but its own. No version
or name says which it is: :func:`torch_tile_rows` lets torch pack a matrix and multiply with it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moepack.encodings import TILE_ROWS, unpack_tiles

#: Rows of a tile where torch's instruction set is AVX2: the low nibbles of a tile's bytes are its
#: first rows, the high ones the others, as in ours.
AVX2_TILE_ROWS = 32

Bytes = npt.NDArray[np.uint8]

# One tile of 64 rows, and tails of every kind: 16 rows, 32 and 48.
_ROWS = (80, 96, 112)
_INPUTS, _GROUP = 64, 32

# The kernels add up in float32 and round to bfloat16 once.
_TOLERANCE = 2**-7

_log = logging.getLogger(__name__)


def memory_tile_rows(device: torch.device) -> int:
    """Rows of the tiles in which segments lie in slots and frames on a device.

    Those of the format, but for a processor whose torch reads other ones that we can make.
    """
    wanted = torch_tile_rows() if device.type == "cpu" else None
    return TILE_ROWS if wanted is None else wanted


@functools.cache
def torch_tile_rows() -> int | None:
    """Rows of the tiles that torch's kernel reads here; None where it is of no use."""
    found = {_tile_rows_of(rows) for rows in _ROWS}
    rows = found.pop() if len(found) == 1 else None
    capability = torch.backends.cpu.get_cpu_capability()
    if rows is None:
        _log.warning(
            "torch %s (%s) has no kernel for 4-bit weights that reads a layout known here: they "
            "are dequantised for every product, which is slower",
            torch.__version__,
            capability,
        )
    elif rows != TILE_ROWS:
        _log.warning(
            "torch %s (%s) reads 4-bit weights in tiles of %d rows, packs hold tiles of %d: every "
            "segment is rebuilt once, when it arrives in memory",
            torch.__version__,
            capability,
            rows,
            TILE_ROWS,
        )
    return rows


def _tile_rows_of(outputs: int) -> int | None:
    """The tiles of a matrix of so many rows, if it multiplies as it should."""
    draw = torch.Generator().manual_seed(outputs)
    codes = torch.randint(0, 16, (outputs, _INPUTS), dtype=torch.int32, generator=draw)
    scales = torch.rand(_INPUTS // _GROUP, outputs, 2, generator=draw).bfloat16()
    x = torch.randn(5, _INPUTS, generator=draw).bfloat16()
    operations: Any = torch.ops.aten
    try:
        packed = operations._convert_weight_to_int4pack_for_cpu(codes, 1)
        found = operations._weight_int4pack_mm_for_cpu(x, packed, _GROUP, scales)
    except (AttributeError, NotImplementedError, RuntimeError) as failure:
        # An older torch, or one built without it.
        _log.info("torch's kernel for 4-bit weights: %s", failure)
        return None
    scale, offset = scales.double().repeat_interleave(_GROUP, 0).unbind(-1)  # [inputs, outputs]
    weights = (codes.T.double() - 8) * scale + offset
    bound = (x.double().abs() @ weights.abs()).mul_(_TOLERANCE)
    if not bool(((found.double() - x.double() @ weights).abs() <= bound).all()):
        return None
    plain = codes.T.numpy().astype(np.uint8)
    for rows in (TILE_ROWS, AVX2_TILE_ROWS):
        if np.array_equal(packed.numpy().reshape(-1), tiles_of(plain, rows)):
            return rows
    return None


def tiles_of(codes: Bytes, tile_rows: int) -> Bytes:
    """Codes in tiles of so many rows: what stands in :mod:`moepack.encodings` for 64.

    Parameters
    ----------
    codes
        [inputs, outputs], 0 to 15; the outputs even.

    Returns
    -------
    array
        [outputs * inputs / 2].
    """
    inputs, outputs = codes.shape
    whole = outputs // tile_rows * tile_rows
    halves = codes[:, :whole].reshape(inputs, -1, 2, tile_rows // 2).transpose(1, 0, 2, 3)
    tail = codes[:, whole::2] | codes[:, whole + 1 :: 2] << 4
    return np.concatenate([(halves[:, :, 0] | halves[:, :, 1] << 4).ravel(), tail.ravel()])


def rebuild(packed: Bytes, outputs: int) -> None:
    """Turn the tiles of the format into those of AVX2, where they lie.

    Peak memory: a quarter of a tile's bytes a few times over, and of the last, incomplete tile all
    of its codes, a byte each.

    Parameters
    ----------
    packed
        [outputs * inputs / 2], contiguous and aligned to 8 bytes.
    """
    inputs = 2 * packed.size // outputs
    end = outputs // TILE_ROWS * TILE_ROWS * inputs // 2
    if end < packed.size:
        tail = packed[end:]
        tail[:] = tiles_of(unpack_tiles(tail, outputs % TILE_ROWS), AVX2_TILE_ROWS)
    # [tiles, inputs, 4]: eight bytes at a time, byte r of an input holding rows r and 32 + r.
    for tile in packed[:end].view(np.uint64).reshape(-1, inputs, 4):
        _halve(tile)


_LOW, _HIGH, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(4)


def _halve(tile: npt.NDArray[np.uint64]) -> None:
    """One tile of 64 rows to two of 32: [inputs, 4] to [2, inputs, 2] in the same memory."""
    first, last = tile[:, :2], tile[:, 2:]  # rows 0 to 15 and 32 to 47; 16 to 31 and 48 to 63
    upper = (first & _LOW) | (last & _LOW) << _FOUR
    lower = (first >> _FOUR) & _LOW | (last & _HIGH)
    halves = tile.reshape(2, -1, 2)
    halves[0] = upper
    halves[1] = lower
