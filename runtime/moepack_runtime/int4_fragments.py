"""The order in which torch's CUDA kernel for 4-bit weights reads codes: fragments of its products.

A tensor core takes a tile of 8 rows by 16 inputs, spread over the 32 threads of a warp; the codes
lie in the order in which the threads read two such tiles. :func:`reads_fragments` has torch make
and multiply them, and finds out whether ours are the same: no version or name says so.

They take the bytes of the format's tiles, 64 rows of one being 64 rows of the other, so a segment
is rearranged where it lies. The kernel takes bfloat16 alone: models in other dtypes keep the tiles
of the format.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moepack.encodings import TILE_ROWS, unpack_tiles
from moepack.segments import SegmentShape, SegmentTensor

#: Inputs of two tiles behind one another, which the bytes of a fragment alternate between.
INPUTS = 32
#: Rows of a tile.
ROWS = 8
#: Groups that the kernel knows.
GROUPS = (32, 64, 128, 256)

#: The present device.
CUDA = torch.device("cuda")

#: What a tensor of codes is called where they lie in fragments.
SUFFIX = ".fragments"
_CODES = ".codes"

Bytes = npt.NDArray[np.uint8]

# The kernel rounds weights to bfloat16, adds up in float32 and rounds once more.
_TOLERANCE = 2**-6

_log = logging.getLogger(__name__)


def fragments_of(codes: Bytes) -> Bytes:
    """Codes in the order of fragments.

    Parameters
    ----------
    codes
        [inputs, outputs], 0 to 15; multiples of :data:`INPUTS` and :data:`ROWS`.

    Returns
    -------
    array
        [outputs * inputs / 2]: [tile][pair of tiles][row][4][2][2], where the last three say which
        two neighbours of 8 inputs, which of them, and which tile; the nibbles are 8 inputs apart,
        the low one first.
    """
    inputs, outputs = codes.shape
    split = codes.reshape(inputs // INPUTS, 2, 2, 4, 2, outputs // ROWS, ROWS)
    # [pair of tiles, tile, neighbours, which, rows / 8, row]
    pairs = split[:, :, 0] | split[:, :, 1] << np.uint8(4)
    return pairs.transpose(4, 0, 5, 2, 3, 1).ravel()


def rebuild(packed: Bytes, outputs: int) -> None:
    """Turn the tiles of the format into fragments, where they lie.

    Peak memory: 64 rows of codes, a byte each, a few times over.

    Parameters
    ----------
    packed
        [outputs * inputs / 2], contiguous.
    """
    flat = packed.reshape(-1)
    row_bytes = flat.size // outputs
    for first in range(0, outputs, TILE_ROWS):
        rows = min(TILE_ROWS, outputs - first)
        some = flat[first * row_bytes : (first + rows) * row_bytes]
        some[:] = fragments_of(unpack_tiles(some, rows))


def in_memory(shape: SegmentShape, dtype: str, device: torch.device) -> SegmentShape:
    """A segment as it lies in slots and frames of a device: named after what its codes are in.

    Parameters
    ----------
    dtype
        Of the model.
    """
    if device.type != "cuda" or dtype != "BF16":
        return shape
    by_name = {tensor.name: tensor for tensor in shape.tensors}
    # One answer for all who ask, whether they know the device's number or not.
    if not any(name.endswith(_CODES) for name in by_name) or not reads_fragments(CUDA):
        return shape
    return replace(shape, tensors=tuple(_renamed(tensor, by_name) for tensor in shape.tensors))


def _renamed(tensor: SegmentTensor, by_name: dict[str, SegmentTensor]) -> SegmentTensor:
    if not tensor.name.endswith(_CODES):
        return tensor
    outputs, inputs = tensor.shape[0], 2 * tensor.shape[1]
    stem = tensor.name.removesuffix(_CODES)
    group = inputs // by_name[f"{stem}.scales"].shape[0]
    fits = outputs % ROWS == 0 and inputs % INPUTS == 0 and group in GROUPS
    return replace(tensor, name=stem + SUFFIX) if fits else tensor


@functools.cache
def reads_fragments(device: torch.device) -> bool:
    """Whether torch's kernel on a device multiplies what :func:`fragments_of` makes.

    Where not, it is logged once: everything is dequantised then, which is slower.
    """
    found = all(_multiplies(rows, group, device) for rows, group in ((80, 32), (16, 64)))
    if not found:
        _log.warning(
            "torch %s has no kernel for 4-bit weights on %s that reads a layout known here: they "
            "are dequantised for every product, which is slower",
            torch.__version__,
            device,
        )
    return found


def _multiplies(outputs: int, group: int, device: torch.device) -> bool:
    draw = torch.Generator().manual_seed(outputs)
    inputs = 2 * group
    codes = torch.randint(0, 16, (inputs, outputs), dtype=torch.uint8, generator=draw)
    scales = torch.rand(2, outputs, 2, generator=draw).bfloat16()
    x = torch.randn(5, inputs, generator=draw).bfloat16()
    operations: Any = torch.ops.aten
    pairs = (codes[::2] << 4 | codes[1::2]).T.contiguous()
    try:
        packed = operations._convert_weight_to_int4pack(pairs.to(device), 2)
        found = operations._weight_int4pack_mm(x.to(device), packed, group, scales.to(device))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError) as failure:
        # An older torch, or an older device.
        _log.info("torch's kernel for 4-bit weights on %s: %s", device, failure)
        return False
    scale, offset = scales.double().repeat_interleave(group, 0).unbind(-1)  # [inputs, outputs]
    weights = (codes.double() - 8) * scale + offset
    bound = (x.double().abs() @ weights.abs()).mul_(_TOLERANCE)
    if not bool(((found.cpu().double() - x.double() @ weights).abs() <= bound).all()):
        return False
    same = packed.cpu().contiguous().view(torch.uint8).flatten().numpy()
    return np.array_equal(same, fragments_of(codes.numpy()))
