"""Products with quantised weights: by torch's kernels, or dequantised and multiplied.

Which of them is a function of shape, dtype and device alone, so equal shapes give equal bits,
wherever a segment lies. Torch's kernels for int8 and int4 weights read the codes once and add up in
float32, but take longer for every token: for many it is faster to dequantise, a part of the matrix
at a time, and to leave the rest to the matrix library. They take bfloat16 on a processor;
everything else is dequantised.

The formulas and the bytes are those of :mod:`moepack.encodings`.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from typing_extensions import override

from moepack.working_memory import dequantised_rows
from moepack_runtime.int4_fragments import INPUTS as FRAGMENT_INPUTS
from moepack_runtime.int4_fragments import ROWS as FRAGMENT_ROWS
from moepack_runtime.int4_tiles import memory_tile_rows, torch_tile_rows

# The most tokens that the kernels multiply with. Beyond, dequantising is faster: by interleaved
# medians of processor time on one thread, for matrices of [2048, 2048] and [2048, 1024] (AVX-512).
INT8_KERNEL_TOKENS = 32
INT4_KERNEL_TOKENS = 80

# Of int8 codes the kernel loads so many at a time, from addresses that are multiples of it; of
# tokens, twice the bytes.
_INT8_STEP = 16

# The kernel for int4 takes rows by so many.
_INT4_ROWS = 16

_OPERATIONS: Any = torch.ops.aten

_log = logging.getLogger(__name__)

_SLOWER = "8-bit weights are dequantised for every product, which is slower"


class Rows(NamedTuple):
    """Some rows of a matrix, in the order in which a part of it is dequantised.

    There are ``blocks`` times ``length`` of them; (i, j) is ``first + i * outer + j * inner``.
    """

    first: int
    blocks: int
    length: int
    outer: int
    inner: int

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """[..., outputs] to a view [..., blocks, length]."""
        *strides, step = values.stride()
        return values.as_strided(
            (*values.shape[:-1], self.blocks, self.length),
            (*strides, self.outer * step, self.inner * step),
            values.storage_offset() + self.first * step,
        )


class Room:
    """Memory for a part of a matrix on its way from codes to weights.

    Made once for a product: allocating anew for every part costs more than its arithmetic. Scales
    apart, it takes what :func:`moepack.working_memory.dequantised_bytes` says.
    """

    __slots__ = ("_beside", "_dtype", "_floats", "_packed", "rows")

    def __init__(self, outputs: int, inputs: int, like: torch.Tensor) -> None:
        #: What a part may have.
        self.rows = min(outputs, dequantised_rows(inputs))
        self._dtype = like.dtype
        count = self.rows * inputs
        self._floats = like.new_empty(count, dtype=torch.float32)
        self._packed = like.new_empty(count, dtype=torch.int8)
        beside = 1 if self._dtype is torch.float32 else like.element_size()
        self._beside = like.new_empty(count * beside, dtype=torch.int8)

    def packed(self, *shape: int) -> torch.Tensor:
        """For packed codes: int8 of at most as many elements as a part."""
        return _within(self._packed, shape)

    def codes(self, *shape: int) -> torch.Tensor:
        """For unpacked codes, int8; gone once weights are rounded."""
        return _within(self._beside, shape)

    def floats(self, *shape: int) -> torch.Tensor:
        """For weights in float32."""
        return _within(self._floats, shape)

    def rounded(self, floats: torch.Tensor) -> torch.Tensor:
        """What :meth:`floats` holds in the dtype of the product, in the same shape."""
        if self._dtype is torch.float32:
            return floats
        return _within(self._beside.view(self._dtype), floats.shape).copy_(floats)


def _within(memory: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return memory[: math.prod(shape)].view(shape)


def _contiguous(values: torch.Tensor) -> torch.Tensor:
    """In float32, without a copy in between."""
    return values.new_empty(values.shape, dtype=torch.float32).copy_(values)


class QuantisedMatrix(ABC):
    """A weight [outputs, inputs] in codes and scales.

    Attributes
    ----------
    kernel_tokens : int
        Up to so many tokens in bfloat16 are multiplied by :meth:`by_kernel`; 0: none.
    """

    __slots__ = ("inputs", "kernel_tokens", "outputs")

    outputs: int
    inputs: int
    kernel_tokens: int

    @abstractmethod
    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, inputs] to [tokens, outputs], both bfloat16: rounded once."""

    @abstractmethod
    def parts(self, room: Room) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Every row once: which, and their weights [rows of the part, inputs] in the room.

        Weights are computed in float32 and rounded once. They stay until the next part.
        """


class Int8Matrix(QuantisedMatrix):
    """``code * scale``, symmetric.

    Parameters
    ----------
    codes
        int8 [outputs, inputs], contiguous.
    scale
        bfloat16 [outputs].
    """

    __slots__ = ("_codes", "_scale")

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self._codes = codes
        self._scale = scale
        self.outputs, self.inputs = codes.shape
        fits = self.inputs % _INT8_STEP == 0 and codes.data_ptr() % _INT8_STEP == 0
        self.kernel_tokens = INT8_KERNEL_TOKENS if fits and _has_int8(codes.device) else 0

    @override
    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() % (2 * _INT8_STEP):
            x = x.clone()  # into memory of torch's own, which begins on a cache line
        return torch._weight_int8pack_mm(x, self._codes, self._scale)

    @override
    def parts(self, room: Room) -> Iterator[tuple[Rows, torch.Tensor]]:
        for first in range(0, self.outputs, room.rows):
            codes = self._codes[first : first + room.rows]
            weights = room.floats(*codes.shape).copy_(codes)
            weights.mul_(self._scale[first : first + room.rows, None].float())
            yield Rows(first, 1, len(codes), 0, 1), room.rounded(weights)


class Int4Matrix(QuantisedMatrix):
    """``(code - 8) * scale + offset``, by groups of inputs.

    Parameters
    ----------
    codes
        uint8 [outputs, inputs / 2], contiguous: tiles of as many rows as
        :func:`moepack_runtime.int4_tiles.memory_tile_rows` says for the device.
    scales
        bfloat16 [inputs / group, outputs, 2]: scale and offset.
    """

    __slots__ = ("_codes", "_group", "_scales", "_tile_rows")

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self._codes = codes
        self._scales = scales
        self.outputs, self.inputs = codes.shape[0], 2 * codes.shape[1]
        self._group = self.inputs // scales.shape[0]
        self._tile_rows = memory_tile_rows(codes.device)
        fits = codes.is_cpu and self.outputs % _INT4_ROWS == 0 and torch_tile_rows() is not None
        self.kernel_tokens = INT4_KERNEL_TOKENS if fits else 0

    @override
    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _OPERATIONS._weight_int4pack_mm_for_cpu(
            x, self._codes, self._group, self._scales
        )
        return found

    @override
    def parts(self, room: Room) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Rows that are the low, or the high, nibbles of some tiles."""
        size, half = self._tile_rows, self._tile_rows // 2
        whole = self.outputs // size * size
        step = max(1, room.rows // half) * size
        for first in range(0, whole, step):
            count = min(step, whole - first) // size
            flipped = self._flipped(first, count, half, room)
            for high in (0, 1):
                rows = Rows(first + high * half, count, half, size, 1)
                yield rows, self._weights(flipped, rows, high, room)
        if whole < self.outputs:
            length = (self.outputs - whole) // 2
            flipped = self._flipped(whole, 1, length, room)
            for high in (0, 1):
                rows = Rows(whole + high, 1, length, 0, 2)
                yield rows, self._weights(flipped, rows, high, room)

    def _flipped(self, first: int, count: int, length: int, room: Room) -> torch.Tensor:
        """The bytes of some tiles, int8 [inputs, count * length], as two's complement.

        With its top bit flipped, a nibble is ``code - 8``.
        """
        tiles = self._codes[first : first + 2 * count * length].view(count, self.inputs, length)
        flipped = room.packed(self.inputs, count, length)
        flipped.copy_(tiles.view(torch.int8).transpose(0, 1))
        return flipped.bitwise_xor_(-0x78).view(self.inputs, -1)

    def _weights(self, flipped: torch.Tensor, rows: Rows, high: int, room: Room) -> torch.Tensor:
        codes = room.codes(*flipped.shape)
        if high:
            torch.bitwise_right_shift(flipped, 4, out=codes)
        else:
            torch.bitwise_left_shift(flipped, 4, out=codes).bitwise_right_shift_(4)
        weights = room.floats(*codes.shape).copy_(codes)
        groups = weights.view(-1, self._group, codes.shape[1])
        scale, offset = (
            _contiguous(rows.of(values)).flatten(1).unsqueeze(1)
            for values in self._scales.unbind(-1)
        )
        torch.addcmul(offset, groups, scale, out=groups)
        return room.rounded(weights).T


class Int4Fragments(QuantisedMatrix):
    """The same weights in the order in which CUDA's kernel reads them; it takes any tokens.

    Parameters
    ----------
    codes
        uint8 [outputs, inputs / 2], contiguous: what
        :func:`moepack_runtime.int4_fragments.fragments_of` makes.
    scales
        As of :class:`Int4Matrix`.
    """

    __slots__ = ("_fragments", "_group", "_scales")

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.outputs, self.inputs = codes.shape[0], 2 * codes.shape[1]
        self._group = self.inputs // scales.shape[0]
        self._scales = scales
        tiles = self.outputs // FRAGMENT_ROWS, self.inputs // FRAGMENT_INPUTS
        self._fragments = codes.view(torch.int32).view(*tiles, 32, 1)
        self.kernel_tokens = sys.maxsize

    @override
    def by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _OPERATIONS._weight_int4pack_mm(
            x, self._fragments, self._group, self._scales
        )
        return found

    @override
    def parts(self, room: Room) -> Iterator[tuple[Rows, torch.Tensor]]:
        raise AssertionError("4-bit weights in fragments are for the kernel, which takes bfloat16")


@functools.cache
def _has_int8(device: torch.device) -> bool:
    """Whether torch's kernel for int8 weights is here and computes what it should.

    Where not, it is logged once: everything is dequantised then, which is slower.
    """
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (7, 48), dtype=torch.int8, generator=draw)
    scale = torch.rand(7, generator=draw).bfloat16()
    x = torch.randn(5, 48, generator=draw).bfloat16()
    try:
        found = torch._weight_int8pack_mm(*(given.to(device) for given in (x, codes, scale))).cpu()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError) as failure:
        _log.warning("%s: torch %s has no kernel (%s)", _SLOWER, torch.__version__, failure)
        return False
    weights = codes.double() * scale.double()[:, None]
    bound = F.linear(x.double().abs(), weights.abs()) * 2**-7
    if bool(((found.double() - F.linear(x.double(), weights)).abs() <= bound).all()):
        return True
    _log.warning("%s: torch %s computes wrong products with them", _SLOWER, torch.__version__)
    return False


def takes_kernel(x: torch.Tensor, weight: QuantisedMatrix, tokens: int) -> bool:
    """Whether :func:`product` leaves so many tokens of ``x`` to a kernel."""
    return tokens <= weight.kernel_tokens and x.dtype is torch.bfloat16


def product(
    x: torch.Tensor, weight: QuantisedMatrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x W^T + b``.

    Parameters
    ----------
    x
        [tokens, in].
    bias
        [out], in the dtype of ``x``.

    Returns
    -------
    Tensor
        [tokens, out] in the dtype of ``x``. By a kernel: summed in float32 with unrounded weights,
        rounded, and once more where there is a bias. Otherwise from weights rounded to the dtype.
    """
    if takes_kernel(x, weight, x.shape[0]):
        found = weight.by_kernel(x.contiguous())
        return found if bias is None else found.add_(bias)
    found = x.new_empty(x.shape[0], weight.outputs)
    room = Room(weight.outputs, weight.inputs, x)
    for rows, weights in weight.parts(room):
        part = F.linear(x, weights, None if bias is None else rows.of(bias).reshape(-1))
        target = rows.of(found)
        target.copy_(part.view(target.shape))
    return found
