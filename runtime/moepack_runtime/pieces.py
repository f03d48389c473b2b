"""Memory of the fast tier, cut into pieces that hold one segment or one expert each."""

from __future__ import annotations

import torch

from moepack.segments import SegmentShape
from moepack_runtime.ffn import FfnWeights, QuantisedFfn
from moepack_runtime.int4_fragments import SUFFIX
from moepack_runtime.places import Place, form_of
from moepack_runtime.quantised import Int4Fragments, Int4Matrix, Int8Matrix, QuantisedMatrix
from moepack_runtime.weights import TORCH_DTYPE


class Piece:
    """Room for a segment, or for a whole expert: seen as bytes, and as weights.

    Views are made once and kept: computing and fetching allocate nothing. They are kept by the
    identity of the shape, so whoever asks keeps one shape for all that is alike.
    """

    __slots__ = ("_rooms", "_weights", "memory")

    def __init__(self, memory: torch.Tensor) -> None:
        #: uint8
        self.memory = memory
        self._rooms: dict[tuple[int, int], torch.Tensor] = {}
        self._weights: dict[tuple[int, int], FfnWeights | QuantisedFfn] = {}

    def room(self, shape: SegmentShape, offset_bytes: int = 0) -> torch.Tensor:
        """The bytes of a segment that lies at an offset: uint8 [stored bytes]."""
        key = (id(shape), offset_bytes)
        found = self._rooms.get(key)
        if found is None:
            found = self.memory[offset_bytes : offset_bytes + shape.stored_bytes]
            self._rooms[key] = found
        return found

    def weights(self, shape: SegmentShape, offset_bytes: int = 0) -> FfnWeights | QuantisedFfn:
        """The same as weights."""
        key = (id(shape), offset_bytes)
        found = self._weights.get(key)
        if found is None:
            found = segment_weights(self.room(shape, offset_bytes), shape)
            self._weights[key] = found
        return found


def pieces(memory: torch.Tensor, size_bytes: int) -> list[Piece]:
    """Memory in pieces of one size."""
    starts = range(0, len(memory), size_bytes)
    return [Piece(memory[start : start + size_bytes]) for start in starts]


def segment_weights(buffer: torch.Tensor, shape: SegmentShape) -> FfnWeights | QuantisedFfn:
    """See the bytes of a segment as its tensors, without a copy.

    Parameters
    ----------
    buffer
        uint8 [>= shape.size_bytes].
    """
    places = {tensor.name: tensor for tensor in shape.tensors}
    form = form_of(shape) if buffer.is_cuda else None  # kernels by address are a device's
    place = None if form is None else Place(buffer.data_ptr(), form)

    def view(first: str, last: str) -> torch.Tensor | None:
        """The neighbouring tensors ``first`` to ``last``, as one with all their rows."""
        if first not in places:
            return None
        begin, end = places[first], places[last]
        flat = buffer[begin.offset_bytes : end.offset_bytes + end.size_bytes]
        # The first axis grows with the neighbours; of 4-bit scales [groups, out, 2] there are none.
        return flat.view(TORCH_DTYPE[begin.dtype]).view(-1, *begin.shape[1:])

    def tensor(first: str, last: str = "") -> torch.Tensor:
        found = view(first, last or first)
        assert found is not None, f"a segment without {first}"
        return found

    def int4(name: str) -> QuantisedMatrix:
        if name + SUFFIX in places:
            return Int4Fragments(tensor(name + SUFFIX), tensor(f"{name}.scales"))
        return Int4Matrix(tensor(f"{name}.codes"), tensor(f"{name}.scales"))

    if "down.scales" in places:
        return QuantisedFfn(
            int4("gate_up"),
            int4("down"),
            view("gate.bias", "up.bias"),
            view("down.bias", "down.bias"),
            place,
        )
    if "down.scale" in places:
        return QuantisedFfn(
            Int8Matrix(tensor("gate.weight", "up.weight"), tensor("gate.scale", "up.scale")),
            Int8Matrix(tensor("down.weight"), tensor("down.scale")),
            view("gate.bias", "up.bias"),
            view("down.bias", "down.bias"),
            place,
        )
    return FfnWeights(
        gate=tensor("gate.weight"),
        up=tensor("up.weight"),
        down=tensor("down.weight"),
        gate_bias=view("gate.bias", "gate.bias"),
        up_bias=view("up.bias", "up.bias"),
        down_bias=view("down.bias", "down.bias"),
        gate_up=view("gate.weight", "up.weight"),
        gate_up_bias=view("gate.bias", "up.bias"),
        place=place,
    )
