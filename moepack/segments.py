"""The geometry of an expert's segments, and the cutting itself.

An expert is cut along its intermediate dimension: the first ``split`` neurons are the *top*
segment, the rest the *bottom* (``y = y_top + y_bottom``). One segment is one contiguous block of
bytes: its tensors in the order of :func:`segment_shape`, padded to :data:`ALIGNMENT_BYTES`, the
same in a packed shard, in a slot of the fast tier and in flight.

What the tensors are is the layer's encoding (:mod:`moepack.encodings`). A quantised expert is
rounded whole and then cut, so that every split holds the same codes.

Plain arithmetic on sizes; only :func:`cut_expert_into` touches weights, as numpy bit patterns, so
that packing needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moepack.encodings import ELEMENT_BYTES, EncodedTensor, Encoding, encoding, pack_tiles
from moepack.errors import GroupMismatchError
from moepack.model_spec import MoeSpec
from moepack.records import record
from moepack.units import MIB

#: Segments start, and their stored length ends, on this boundary: the unit of direct I/O.
ALIGNMENT_BYTES = 4096

#: A read ahead of the routing goes in pieces of so much, one after the other: where nobody needs
#: it, what has not begun of it does not come. Pieces of 1 MiB take a tenth longer than whole
#: experts of 12 MiB, of 4 MiB a hundredth.
PIECE_BYTES = 4 * MIB

#: The smallest number of neurons between two cuts: narrower slices starve the matrix kernels.
MIN_GRANULARITY = 16

#: A granularity that leaves fewer interior cuts than this gives way to padding.
MIN_INTERIOR_CUTS = 4

Part = Literal["top", "bottom"]
PARTS: tuple[Part, Part] = ("top", "bottom")

#: The variants of a segment that this moepack writes: what the layout says, and the low copy.
BASE = "base"
LOW = "low"

#: The tensors of an expert as checkpoints hold it, and of a segment in a float encoding, in their
#: order inside it: gate and up are neighbours, so that a runtime may see them as one [2 f, hidden]
#: matrix.
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
    variant: str = BASE

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
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


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


def neuron_bytes(moe: MoeSpec, hidden_size: int, name: str) -> int:
    """Bytes of one neuron in the encoding of that name: its gate row, up row and down column.

    With its biases in a float encoding. In a quantised one with its share of scales, and without
    what does not grow with the neurons: the biases of the output, INT8's scales of ``down``.
    """
    stored = encoding(name)
    match stored.kind:
        case "float":
            elements = 3 * hidden_size + (2 if moe.expert_bias else 0)
            return elements * ELEMENT_BYTES[name]
        case "int8":
            return 3 * hidden_size + 2 * ELEMENT_BYTES["BF16"]
        case "int4":
            assert stored.group is not None
            return 3 * (hidden_size // 2 + 2 * ELEMENT_BYTES["BF16"] * hidden_size // stored.group)


def granularity(moe: MoeSpec, hidden_size: int, name: str) -> int:
    """Neurons between two possible cuts.

    The smallest number >= 16 whose bytes are a multiple of 4 KiB, or 16 (with padding) where that
    would leave fewer than four interior cuts; always a multiple of what the encoding of that name
    asks for, its group.

    Raises
    ------
    UnknownEncodingError, GroupMismatchError
        When the experts cannot be stored so.
    """
    stored = encoding(name)
    stored.check_fits(hidden_size, moe.intermediate_size)
    step = neuron_bytes(moe, hidden_size, name)
    smallest = align_up(MIN_GRANULARITY, stored.multiple)
    for neurons in range(smallest, moe.intermediate_size + 1, stored.multiple):
        if neurons * step % ALIGNMENT_BYTES == 0:
            if -(-moe.intermediate_size // neurons) - 1 >= MIN_INTERIOR_CUTS:
                return neurons
            break
    return smallest


def cuts(moe: MoeSpec, hidden_size: int, name: str) -> tuple[int, ...]:
    """Every possible ``split`` in neurons, 0 and the whole width included, ascending.

    Raises
    ------
    UnknownEncodingError, GroupMismatchError
        When the experts cannot be stored in the encoding of that name.
    """
    step = granularity(moe, hidden_size, name)
    return (*range(0, moe.intermediate_size, step), moe.intermediate_size)


def segment_shape(
    moe: MoeSpec, hidden_size: int, name: str, split: int, part: Part, bias_dtype: str = ""
) -> SegmentShape | None:
    """Geometry of the top or bottom segment of every expert of a layer.

    Parameters
    ----------
    name
        The encoding's name.
    split
        Neurons in the top segment, 0 to ``moe.intermediate_size``.
    bias_dtype
        The model's dtype: biases are stored in it. Needed where experts have biases and the
        encoding is quantised; a float encoding is their dtype.

    Returns
    -------
    SegmentShape or None
        None where the part is empty: the top at split 0, the bottom at the whole width.

    Raises
    ------
    UnknownEncodingError, GroupMismatchError
        When the experts cannot be stored, or cut, so.
    """
    width = moe.intermediate_size
    if not 0 <= split <= width:
        raise ValueError(f"split {split} outside 0..{width}")
    stored = encoding(name)
    stored.check_fits(hidden_size, width)
    if split % stored.multiple:
        raise GroupMismatchError(
            f"{name}: experts cut after {split} neurons, expected a multiple of {stored.multiple}; "
            "plan again"
        )
    neurons = split if part == "top" else width - split
    if neurons == 0:
        return None
    pieces = _matrices(stored, neurons, hidden_size)
    if moe.expert_bias:
        dtype = bias_dtype if stored.quantised else name
        pieces += [EncodedTensor(f"{matrix}.bias", dtype, (neurons,)) for matrix in ("gate", "up")]
        # The bias of the output counts once: with the bottom, or with the top where it is alone.
        if part == "bottom" or split == width:
            pieces.append(EncodedTensor("down.bias", dtype, (hidden_size,)))
    tensors = []
    offset_bytes = 0
    for piece in pieces:
        tensors.append(SegmentTensor(piece.name, piece.dtype, piece.shape, offset_bytes))
        offset_bytes += piece.size_bytes
    return SegmentShape(neurons, tuple(tensors), offset_bytes, align_up(offset_bytes))


def _matrices(stored: Encoding, neurons: int, hidden_size: int) -> list[EncodedTensor]:
    """The tensors of a segment's matrices, in order. Gate and up stay neighbours."""
    if stored.kind == "int4":  # tiles of rows: gate and up are one matrix
        inner = [item.of("gate_up") for item in stored.tensors(2 * neurons, hidden_size)]
    else:
        both = stored.tensors(neurons, hidden_size)
        inner = [item.of(matrix) for item in both for matrix in ("gate", "up")]
    return inner + [item.of("down") for item in stored.tensors(hidden_size, neurons)]


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

    Peak memory: for INT4 the codes of its gate and up once more, a byte each; nothing otherwise.

    Parameters
    ----------
    weights
        The whole expert as the segment's encoding has it: under the names of
        :data:`EXPERT_TENSORS`, as arrays of any dtype with the right item size (bit patterns:
        bfloat16 travels as uint16), or as :func:`moepack.quantise.quantise_expert` returns it.
    shape
        From :func:`segment_shape` for the same part.
    destination
        At least ``shape.size_bytes`` contiguous bytes.
    """
    quantised = "gate.codes" in weights
    width = weights["gate.codes"].shape[1] if quantised else weights["gate.weight"].shape[0]
    neurons = slice(0, shape.neurons) if part == "top" else slice(width - shape.neurons, width)
    for tensor in shape.tensors:
        piece = _cut(weights, tensor.name, neurons)
        codes = tensor.name.endswith(".codes")  # [in, out], two of them a byte when stored
        expected = (2 * tensor.shape[1], tensor.shape[0]) if codes else tensor.shape
        if piece.shape != expected or piece.dtype.itemsize != ELEMENT_BYTES[tensor.dtype]:
            raise ValueError(f"{tensor.name}: got {piece.shape} {piece.dtype}, expected {tensor}")
        target = destination[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        if codes:
            pack_tiles(piece, target)
        else:
            target.view(piece.dtype).reshape(tensor.shape)[...] = piece


def _cut(weights: Mapping[str, Bits], name: str, neurons: slice) -> Bits:
    """What of a segment's tensor belongs to some neurons of the whole expert."""
    match name:
        case "down.bias" | "down.scale":  # of the expert's outputs: every part has them whole
            return weights[name]
        case "down.weight":
            return weights[name][:, neurons]
        case "down.scales":
            group = weights["down.codes"].shape[0] // weights[name].shape[0]
            return weights[name][neurons.start // group : neurons.stop // group]
        case "gate_up.codes" | "gate_up.scales":
            tensor = name.removeprefix("gate_up.")
            both = [weights[f"{matrix}.{tensor}"][:, neurons] for matrix in ("gate", "up")]
            return np.concatenate(both, axis=1)
        case _:
            return weights[name][neurons]
