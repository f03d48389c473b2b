"""The geometry of an expert's segments, and the cutting itself.

An expert is cut along its intermediate dimension: the first ``split`` neurons are the *top*
segment, the rest the *bottom* (``y = y_top + y_bottom``). One segment is one contiguous block of
bytes: its tensors in the order of :func:`segment_shape`, padded to :data:`ALIGNMENT_BYTES`, the
same in a packed shard, in a slot of the fast tier and in flight.

Plain arithmetic on sizes; only :func:`cut_expert_into` touches weights, as numpy bit patterns, so
that packing needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moepack.model_spec import DTYPE_BYTES, MoeSpec
from moepack.records import record

#: Segments start, and their stored length ends, on this boundary: the unit of direct I/O.
ALIGNMENT_BYTES = 4096

#: The smallest number of neurons between two cuts: narrower slices starve the matrix kernels.
MIN_GRANULARITY = 16

#: A granularity that leaves fewer interior cuts than this gives way to padding.
MIN_INTERIOR_CUTS = 4

Part = Literal["top", "bottom"]
PARTS: tuple[Part, Part] = ("top", "bottom")

#: The tensors of a segment, in their order inside it: gate and up are neighbours, so that a
#: runtime may see them as one [2 f, hidden] matrix.
EXPERT_TENSORS = (
    "gate.weight",
    "up.weight",
    "down.weight",
    "gate.bias",
    "up.bias",
    "down.bias",
)

Bits = npt.NDArray[Any]


@record
class SegmentId:
    """One segment of one expert. ``layer`` is the decoder's own number."""

    layer: int
    expert: int
    part: Part
    variant: str = "base"

    def __str__(self) -> str:
        return f"layer {self.layer}, expert {self.expert}, {self.part} ({self.variant})"


@record
class SegmentTensor:
    """A tensor inside a segment: its local name, dtype, shape, and offset from the start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@record
class SegmentShape:
    """What one segment holds.

    Attributes
    ----------
    neurons : int
        Width of the slice.
    size_bytes : int
        Bytes of the tensors.
    stored_bytes : int
        The same, rounded up to :data:`ALIGNMENT_BYTES`: what is read, and what a slot holds.
    """

    neurons: int
    tensors: tuple[SegmentTensor, ...]
    size_bytes: int
    stored_bytes: int


def align_up(size_bytes: int, alignment_bytes: int = ALIGNMENT_BYTES) -> int:
    """Round up to a multiple of the alignment."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes


def neuron_bytes(moe: MoeSpec, hidden_size: int, dtype: str) -> int:
    """Bytes of one neuron: its gate row, up row, down column and biases."""
    elements = 3 * hidden_size + (2 if moe.expert_bias else 0)
    return elements * DTYPE_BYTES[dtype]


def granularity(moe: MoeSpec, hidden_size: int, dtype: str, group: int = 1) -> int:
    """Neurons between two possible cuts.

    The smallest number >= 16 whose bytes are a multiple of 4 KiB, or 16 (with padding) where that
    would leave fewer than four interior cuts; always a multiple of the quantisation ``group``.
    """
    step = neuron_bytes(moe, hidden_size, dtype)
    smallest = align_up(MIN_GRANULARITY, group)
    for neurons in range(smallest, moe.intermediate_size + 1, group):
        if neurons * step % ALIGNMENT_BYTES == 0:
            if -(-moe.intermediate_size // neurons) - 1 >= MIN_INTERIOR_CUTS:
                return neurons
            break
    return smallest


def cuts(moe: MoeSpec, hidden_size: int, dtype: str, group: int = 1) -> tuple[int, ...]:
    """Every possible ``split`` in neurons, 0 and the whole width included, ascending."""
    step = granularity(moe, hidden_size, dtype, group)
    return (*range(0, moe.intermediate_size, step), moe.intermediate_size)


def segment_shape(
    moe: MoeSpec, hidden_size: int, dtype: str, split: int, part: Part
) -> SegmentShape | None:
    """Geometry of the top or bottom segment of every expert of a layer.

    Parameters
    ----------
    split
        Neurons in the top segment, 0 to ``moe.intermediate_size``.

    Returns
    -------
    SegmentShape or None
        None where the part is empty: the top at split 0, the bottom at the whole width.
    """
    width = moe.intermediate_size
    if not 0 <= split <= width:
        raise ValueError(f"split {split} outside 0..{width}")
    neurons = split if part == "top" else width - split
    if neurons == 0:
        return None
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (neurons, hidden_size),
        "up.weight": (neurons, hidden_size),
        "down.weight": (hidden_size, neurons),
    }
    if moe.expert_bias:
        shapes["gate.bias"] = (neurons,)
        shapes["up.bias"] = (neurons,)
        # The bias of the output counts once: with the bottom, or with the top where it is alone.
        if part == "bottom" or split == width:
            shapes["down.bias"] = (hidden_size,)
    tensors = []
    offset_bytes = 0
    for name in EXPERT_TENSORS:
        if name in shapes:
            tensor = SegmentTensor(name, dtype, shapes[name], offset_bytes)
            tensors.append(tensor)
            offset_bytes += tensor.size_bytes
    return SegmentShape(neurons, tuple(tensors), offset_bytes, align_up(offset_bytes))


def cut_expert(weights: Mapping[str, Bits], shape: SegmentShape, part: Part) -> bytes:
    """Bytes of one segment of one expert, without the padding. See :func:`cut_expert_into`."""
    destination = np.empty(shape.size_bytes, np.uint8)
    cut_expert_into(weights, shape, part, destination)
    return destination.tobytes()


def cut_expert_into(
    weights: Mapping[str, Bits],
    shape: SegmentShape,
    part: Part,
    destination: npt.NDArray[np.uint8],
) -> None:
    """Write one segment of one expert, without the padding, to the start of ``destination``.

    Parameters
    ----------
    weights
        The whole expert under the names of :data:`EXPERT_TENSORS`, as arrays of any dtype with
        the right item size (bit patterns: bfloat16 travels as uint16).
    shape
        From :func:`segment_shape` for the same part.
    destination
        At least ``shape.size_bytes`` contiguous bytes.
    """
    width = weights["gate.weight"].shape[0]
    neurons = slice(0, shape.neurons) if part == "top" else slice(width - shape.neurons, width)
    for tensor in shape.tensors:
        whole = weights[tensor.name]
        if tensor.name == "down.bias":
            piece = whole
        elif tensor.name == "down.weight":
            piece = whole[:, neurons]
        else:
            piece = whole[neurons]
        if piece.shape != tensor.shape or piece.dtype.itemsize != DTYPE_BYTES[tensor.dtype]:
            raise ValueError(f"{tensor.name}: got {piece.shape} {piece.dtype}, expected {tensor}")
        end_bytes = tensor.offset_bytes + tensor.size_bytes
        target = destination[tensor.offset_bytes : end_bytes].view(piece.dtype)
        target.reshape(tensor.shape)[...] = piece
