"""Where the tensors of a segment lie: for kernels that find them by address."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moepack.segments import SegmentShape, SegmentTensor
from moepack_runtime.int4_fragments import SUFFIX

#: In what a matrix is stored.
Codes = Literal["plain", "int8", "int4"]

# Of neurons, outputs and offsets: whole vectors can be read.
_MULTIPLE = 16


class MatrixPlace(NamedTuple):
    """Offsets in bytes from where the segment begins; -1: there is none.

    ``scales`` and ``bias`` are those of all rows, one behind the other.
    """

    codes: int
    scales: int
    bias: int


@dataclass(frozen=True, eq=False, slots=True)
class Form:
    """What segments have in common that one kernel can compute with: one object for all of them.

    Attributes
    ----------
    codes : str
    group : int
        Inputs that share a scale, in ``int4``.
    dtype : str
        Of plain weights, by safetensors' name; of a quantised segment's biases, or "".
    hidden, neurons : int
    gate_up, down : MatrixPlace
    """

    codes: Codes
    group: int
    dtype: str
    hidden: int
    neurons: int
    gate_up: MatrixPlace
    down: MatrixPlace


class Place(NamedTuple):
    """A segment in memory: its address, and where its tensors are from there."""

    address: int
    form: Form


@functools.cache
def form_of(shape: SegmentShape) -> Form | None:
    """The form of segments; None where no kernel reads them."""
    tensors = {tensor.name: tensor for tensor in shape.tensors}
    offsets = {name: tensor.offset_bytes for name, tensor in tensors.items()}

    def offset(name: str) -> int:
        return offsets.get(name, -1)

    group = 0
    codes: Codes
    if "down" + SUFFIX in tensors and "gate_up" + SUFFIX in tensors:
        codes, inner, outer = "int4", "gate_up" + SUFFIX, "down" + SUFFIX
        hidden = tensors[outer].shape[0]
        group = hidden // tensors["gate_up.scales"].shape[0]
        if group != shape.neurons // tensors["down.scales"].shape[0]:
            return None
        scales = "gate_up.scales", "down.scales"
    elif "down.weight" in tensors:
        codes = "int8" if "down.scale" in tensors else "plain"
        inner, outer = "gate.weight", "down.weight"
        hidden = tensors[outer].shape[0]
        scales = "gate.scale", "down.scale"
    else:
        return None
    dtype = _dtype(tensors, codes, outer)
    read = [*offsets.values(), hidden, shape.neurons]
    if any(number % _MULTIPLE for number in read):
        return None
    return Form(
        codes,
        group,
        dtype,
        hidden,
        shape.neurons,
        MatrixPlace(offset(inner), offset(scales[0]), offset("gate.bias")),
        MatrixPlace(offset(outer), offset(scales[1]), offset("down.bias")),
    )


def _dtype(tensors: dict[str, SegmentTensor], codes: Codes, weight: str) -> str:
    if codes == "plain":
        return tensors[weight].dtype
    return tensors["gate.bias"].dtype if "gate.bias" in tensors else ""
