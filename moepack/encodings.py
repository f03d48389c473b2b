"""How routed experts can be stored: the table of encodings, and the geometry of their tensors.

An *encoding* turns a matrix [outputs, inputs] into one or two stored tensors:

========  =====================================  ============================================
float     ``weight``  [out, in]                  as it is, in a safetensors dtype
INT8      ``weight``  I8 [out, in]               value = code * scale
          ``scale``   BF16 [out]
INT4_Gg   ``codes``   U8 [out, in / 2]           value = (code - 8) * scale + offset
          ``scales``  BF16 [in / g, out, 2]      (scale, offset) of each row and g inputs
========  =====================================  ============================================

``codes`` holds two codes of 0 to 15 a byte, in tiles of 64 rows, one after another: byte
(k, r) of a tile, k the input and r of 0 to 31, holds row r in its low nibble and row 32 + r in its
high one. Rows left over make a last tile of their own, in which byte (k, r) holds rows 2 r (low)
and 2 r + 1 (high). This definition is ours and portable; torch's ``_weight_int4pack_mm_for_cpu``
happens to read the very same bytes where its instruction set is AVX-512.

Pure arithmetic on sizes and numpy on bytes: no torch, no rounding (:mod:`moepack.quantise`).
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.errors import GroupMismatchError, UnknownEncodingError
from moepack.model_spec import DTYPE_BYTES
from moepack.records import record

#: Bytes of one element of every dtype that a segment's tensors may have.
ELEMENT_BYTES = MappingProxyType({**DTYPE_BYTES, "I8": 1, "U8": 1})

#: Rows of a tile of 4-bit codes.
TILE_ROWS = 64

_FLOATS = ("F64", "F32", "F16", "BF16")

Kind = Literal["float", "int8", "int4"]


class EncodedTensor(NamedTuple):
    """One stored tensor of a matrix: ``name`` is what follows the matrix's own, after a dot."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]

    def of(self, matrix: str) -> EncodedTensor:
        """The same under the name of its matrix: ``down.scales``."""
        return self._replace(name=f"{matrix}.{self.name}")


@record
class Encoding:
    """One way to store a matrix of weights.

    Attributes
    ----------
    name : str
        As layouts and manifests spell it.
    kind : {"float", "int8", "int4"}
        Which formula gives a weight back.
    bits : int
        Of one weight's code, scales not counted.
    group : int or None
        Consecutive inputs of a row that share a scale; None where the whole row does, or where
        there are no scales.
    multiple : int
        Hidden size and width of an expert, and every cut, are multiples of it.
    """

    name: str
    kind: Kind
    bits: int
    group: int | None
    multiple: int

    @property
    def quantised(self) -> bool:
        """Whether weights are rounded to codes."""
        return self.kind != "float"

    def tensors(self, outputs: int, inputs: int) -> tuple[EncodedTensor, ...]:
        """The stored tensors of a matrix [outputs, inputs], in the order of the table above.

        Raises
        ------
        GroupMismatchError
            When the group does not divide the inputs, or rows cannot be paired.
        """
        match self.kind:
            case "float":
                return (EncodedTensor("weight", self.name, (outputs, inputs)),)
            case "int8":
                return (
                    EncodedTensor("weight", "I8", (outputs, inputs)),
                    EncodedTensor("scale", "BF16", (outputs,)),
                )
            case "int4":
                assert self.group is not None
                if inputs % self.group or outputs % 2:
                    raise GroupMismatchError(
                        f"{self.name}: a matrix of {outputs} rows and {inputs} columns, expected "
                        f"an even number of rows and a multiple of {self.group} columns; choose "
                        f"{_alternatives(self, inputs)}"
                    )
                return (
                    EncodedTensor("codes", "U8", (outputs, inputs // 2)),
                    EncodedTensor("scales", "BF16", (inputs // self.group, outputs, 2)),
                )

    def matrix_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix [outputs, inputs], scales included.

        Raises
        ------
        GroupMismatchError
            As :meth:`tensors`.
        """
        return sum(tensor.size_bytes for tensor in self.tensors(outputs, inputs))

    def bytes_per_weight(self, inputs: int) -> float:
        """Bytes that one weight of a matrix with so many columns takes, its scale included."""
        match self.kind:
            case "float":
                return self.bits / 8
            case "int8":
                return 1 + 2 / inputs
            case "int4":
                assert self.group is not None
                return 0.5 + 4 / self.group

    def check_fits(self, hidden_size: int, width: int) -> None:
        """Refuse experts whose matrices this encoding cannot hold.

        Raises
        ------
        GroupMismatchError
            When the hidden size or the experts' width is not a multiple of ``multiple``.
        """
        for what, size in (("hidden size", hidden_size), ("width of experts", width)):
            if size % self.multiple:
                raise GroupMismatchError(
                    f"{self.name}: the {what} is {size}, expected a multiple of {self.multiple}; "
                    f"choose {_alternatives(self, math.gcd(hidden_size, width))}"
                )


def encoding(name: str) -> Encoding:
    """The encoding of this name.

    Raises
    ------
    UnknownEncodingError
        Listing those that there are.
    """
    try:
        return ENCODINGS[name]
    except KeyError:
        raise UnknownEncodingError(
            f"{name!r} is not an encoding of experts, expected one of {', '.join(ENCODINGS)}; "
            "choose one of these or update moepack"
        ) from None


def fitting(hidden_size: int, width: int) -> tuple[str, ...]:
    """The quantised encodings that experts of these sizes can be stored in, best first."""
    divisor = math.gcd(hidden_size, width)
    return tuple(name for name in QUANTISED if divisor % ENCODINGS[name].multiple == 0)


def _alternatives(refused: Encoding, divisor: int) -> str:
    """The quantised encodings that take sizes with this divisor, for a message."""
    others = [name for name in fitting(divisor, divisor) if name != refused.name]
    return f"{', '.join(others)} or the model's own dtype" if others else "the model's own dtype"


def pack_tiles(
    codes: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """Two 4-bit codes a byte, in the order of the tiles.

    Parameters
    ----------
    codes
        [inputs, outputs], 0 to 15; the outputs even. Columns are the matrix's rows: in this order
        they are both rounded and stored.
    out
        [outputs * inputs / 2], contiguous; made anew where there is none.

    Returns
    -------
    array
        ``out``: the bytes of the tensor ``codes`` as stored.
    """
    inputs, outputs = codes.shape
    packed = np.empty(outputs * inputs // 2, np.uint8) if out is None else out
    whole = outputs // TILE_ROWS * TILE_ROWS
    tiles = codes[:, :whole].reshape(inputs, -1, 2, TILE_ROWS // 2).transpose(1, 0, 2, 3)
    end = whole * inputs // 2
    target = packed[:end].reshape(-1, inputs, TILE_ROWS // 2)
    np.left_shift(tiles[:, :, 1], 4, out=target)
    np.bitwise_or(target, tiles[:, :, 0], out=target)
    packed[end:] = (codes[:, whole::2] | codes[:, whole + 1 :: 2] << 4).reshape(-1)
    return packed


def unpack_tiles(packed: npt.NDArray[np.uint8], outputs: int) -> npt.NDArray[np.uint8]:
    """The codes [inputs, outputs] of :func:`pack_tiles`, from its bytes."""
    flat = packed.reshape(-1)
    inputs = 2 * flat.size // outputs
    codes = np.empty((inputs, outputs), np.uint8)
    whole = outputs // TILE_ROWS * TILE_ROWS
    end = whole * inputs // 2
    tiles = flat[:end].reshape(-1, inputs, TILE_ROWS // 2).transpose(1, 0, 2)
    halves = codes[:, :whole].reshape(inputs, -1, 2, TILE_ROWS // 2)
    halves[:, :, 0] = tiles & 15
    halves[:, :, 1] = tiles >> 4
    rest = flat[end:].reshape(inputs, (outputs - whole) // 2)
    codes[:, whole::2] = rest & 15
    codes[:, whole + 1 :: 2] = rest >> 4
    return codes


def _int4(group: int) -> Encoding:
    return Encoding(f"INT4_G{group}", "int4", 4, group, group)


def _table() -> dict[str, Encoding]:
    floats = [Encoding(name, "float", 8 * DTYPE_BYTES[name], None, 1) for name in _FLOATS]
    # Multiples of 4 keep every tensor of an INT8 segment on a multiple of its element's size.
    quantised = [Encoding("INT8", "int8", 8, None, 4), _int4(32), _int4(64)]
    return {item.name: item for item in (*floats, *quantised)}


#: Every encoding, by name.
ENCODINGS = MappingProxyType(_table())

#: What a plan may store a layer's experts in beside the model's own dtype, best first.
QUANTISED = tuple(item.name for item in ENCODINGS.values() if item.quantised)
