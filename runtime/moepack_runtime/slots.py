"""Slots: memory of the fast tier in which experts stay, and the cache that decides who.

A layer has slots of its own for each part of its experts, or its part of a pool that all layers
share. Either way it sees :class:`Slots`. In a mixed layer they are of several sizes, and an expert
may lie in those of its own encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moepack.budget import class_slots, layer_segment
from moepack.layout import LayerLayout, Layout
from moepack.mixed_residency import layer_cache
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, SharedPool
from moepack.residency import ExpertCache, LayerCache, SharedCache
from moepack.segments import BASE, LOW, PARTS, Part, SegmentShape
from moepack_runtime.ffn import FfnWeights, QuantisedFfn
from moepack_runtime.int4_fragments import in_memory
from moepack_runtime.pieces import Piece, pieces
from moepack_runtime.transfer import Transfer

#: Of every expert, what one part of it holds.
_Shapes = tuple[SegmentShape, ...]


class Slots(NamedTuple):
    """The slots that one part of one layer's experts may lie in.

    Attributes
    ----------
    cache : LayerCache
        Who lies where.
    pieces : list of Piece
        Of each slot its memory; a slot may take another piece of the same size for its own. Layers
        that share a pool share the list.
    """

    cache: LayerCache
    pieces: list[Piece]


class LayerSlots:
    """Geometry and slots of one layer.

    Attributes
    ----------
    shapes : dict
        Of each part that the layer's experts have, what it holds of every expert.
    low_shapes : dict
        The same of their low copies; empty where there are none.
    slots : dict
        Of each part.
    key_part : str
        The part whose residency counts as a hit.
    num_experts : int
    is_cut, is_mixed : bool
        Whether its experts have two parts; whether they are stored in different encodings.
    """

    def __init__(
        self,
        cut: LayerLayout,
        shapes: dict[Part, _Shapes],
        slots: dict[Part, Slots],
        low_shapes: dict[Part, _Shapes],
    ) -> None:
        self.number = cut.layer
        self.num_experts = len(next(iter(shapes.values())))
        self.shapes = shapes
        self.slots = slots
        self.low_shapes = low_shapes
        self.key_part: Part = "top" if "top" in shapes else "bottom"
        self.is_cut = len(shapes) == 2
        self.is_mixed = bool(cut.encodings)

    @property
    def frame_bytes(self) -> int:
        """What the largest of its experts takes, whole."""
        return max(
            sum(shapes[expert].stored_bytes for shapes in self.shapes.values())
            for expert in range(self.num_experts)
        )

    def slot_bytes(self, part: Part) -> int:
        """What one slot takes, where experts are stored alike."""
        assert not self.is_mixed, "slots of several sizes"
        return self.shapes[part][0].stored_bytes

    def missing(self, expert: int) -> list[Part]:
        """The parts of an expert that are not resident, top first."""
        return [part for part, slots in self.slots.items() if not slots.cache.holds(expert)]

    def room(self, frame: Piece, expert: int, part: Part, variant: str = BASE) -> torch.Tensor:
        """Where a part of an expert lies in a frame: uint8 [stored bytes].

        A low copy lies where the part itself would.
        """
        return frame.room(self._shape(expert, part, variant), self._frame_offset(expert, part))

    def weights(
        self, frame: Piece, expert: int, part: Part, variant: str = BASE
    ) -> FfnWeights | QuantisedFfn:
        """The same as weights."""
        return frame.weights(self._shape(expert, part, variant), self._frame_offset(expert, part))

    def _shape(self, expert: int, part: Part, variant: str) -> SegmentShape:
        return (self.low_shapes if variant == LOW else self.shapes)[part][expert]

    def _frame_offset(self, expert: int, part: Part) -> int:
        """Where a part lies in a frame: the bottom behind the top."""
        if self.is_cut and part == "bottom":
            return self.shapes["top"][expert].stored_bytes
        return 0

    def slot_room(self, slot: int, expert: int, part: Part) -> torch.Tensor:
        """Where a part of an expert lies in a slot that it may lie in: uint8 [stored bytes]."""
        return self.slots[part].pieces[slot].room(self.shapes[part][expert])

    def slot_weights(self, slot: int, expert: int, part: Part) -> FfnWeights | QuantisedFfn:
        """The same as weights."""
        return self.slots[part].pieces[slot].weights(self.shapes[part][expert])

    def admit(self, frame: Piece, expert: int, part: Part, slot: int) -> Piece:
        """Put a part of an expert that lies in a frame into a slot.

        Where both are of one size they change places: nothing is copied.

        Returns
        -------
        Piece
            What is the frame now.
        """
        pieces = self.slots[part].pieces
        room = pieces[slot]
        if room.memory.nbytes == frame.memory.nbytes:
            pieces[slot] = frame
            return room
        self.slot_room(slot, expert, part).copy_(self.room(frame, expert, part))
        return frame

    def shrink(self, part: Part, capacity: int, hot: Sequence[int]) -> list[Piece]:
        """Keep no more slots than ``capacity``, with the first of what they hold.

        Parameters
        ----------
        hot
            Every expert, hottest first: the ranking from now on.

        Returns
        -------
        list of Piece
            The memory of the others.
        """
        cache, pieces = self._own(part)
        for slot, source in cache.resize(capacity, hot).moved.items():
            pieces[slot], pieces[source] = pieces[source], pieces[slot]
        freed = pieces[capacity:]
        del pieces[capacity:]
        return freed

    def grow(self, part: Part, more: Sequence[Piece], hot: Sequence[int]) -> dict[int, int]:
        """Have more slots.

        Returns
        -------
        dict
            Expert -> slot, of those that are to be loaded into them.
        """
        cache, pieces = self._own(part)
        pieces.extend(more)
        return cache.resize(len(pieces), hot).admitted

    def _own(self, part: Part) -> tuple[ExpertCache, list[Piece]]:
        cache, pieces = self.slots[part]
        assert isinstance(cache, ExpertCache), "slots that all layers share belong to none"
        return cache, pieces


def allocate_slots(
    spec: ModelSpec,
    layout: Layout,
    placement: Sequence[LayerPlacement],
    pool: SharedPool | None,
    transfer: Transfer,
) -> tuple[dict[int, LayerSlots], int]:
    """Every slot of a placement, by layer, and the bytes that were allocated for them.

    Parameters
    ----------
    layout, placement
        Layer by layer, in the same order.
    pool
        Instead of the layers' own slots; :func:`moepack_runtime.capabilities.require_fit` says for
        which layouts.
    """
    known: dict[SegmentShape, SegmentShape] = {}
    device = transfer.allocate(0).device  # whose kernels read the slots
    shapes = [_shapes(spec, cut, device, known) for cut in layout.layers]
    low_shapes = [_shapes(spec, cut, device, known) for cut in layout.low_layers]
    low_shapes = low_shapes or [{}] * len(shapes)
    if pool is not None:
        by_layer, allocated_bytes = _shared(shapes, placement, pool, transfer)
    else:
        by_layer, allocated_bytes = _own(layout, shapes, placement, transfer)
    return {
        cut.layer: LayerSlots(cut, of_layer, slots, low)
        for cut, of_layer, slots, low in zip(
            layout.layers, shapes, by_layer, low_shapes, strict=True
        )
    }, allocated_bytes


def _shapes(
    spec: ModelSpec,
    layout: LayerLayout,
    device: torch.device,
    known: dict[SegmentShape, SegmentShape],
) -> dict[Part, _Shapes]:
    """Of each part that the layer's experts have; one object for all that are alike."""
    found: dict[Part, _Shapes] = {}
    for part in PARTS:
        of_class = {
            name: known.setdefault(shape, in_memory(shape, spec.dtype, device))
            for name in layout.classes
            if (shape := layer_segment(spec, layout, part, name)) is not None
        }
        if of_class:
            experts = range(spec.moe(layout.layer).num_experts)
            found[part] = tuple(of_class[layout.encoding_of(expert)] for expert in experts)
    return found


def _own(
    layout: Layout,
    shapes: Sequence[dict[Part, _Shapes]],
    placement: Sequence[LayerPlacement],
    transfer: Transfer,
) -> tuple[list[dict[Part, Slots]], int]:
    allocated_bytes = 0
    by_layer: list[dict[Part, Slots]] = []
    for cut, of_layer, place in zip(layout.layers, shapes, placement, strict=True):
        slots: dict[Part, Slots] = {}
        for part, of_expert in of_layer.items():
            memory: list[Piece] = []
            for count, shape in _slot_shapes(cut, place, part, of_expert):
                allocated_bytes += count * shape.stored_bytes
                memory += _allocate(shape, count, transfer)
            slots[part] = Slots(layer_cache(cut, place, part), memory)
        by_layer.append(slots)
    return by_layer, allocated_bytes


def _slot_shapes(
    cut: LayerLayout, place: LayerPlacement, part: Part, of_expert: _Shapes
) -> Iterator[tuple[int, SegmentShape]]:
    """How many slots there are, and for what, in the order in which the cache numbers them."""
    if not cut.encodings:
        yield place.top_slots if part == "top" else place.bottom_slots, of_expert[0]
        return
    for name, count in zip(cut.classes, class_slots(cut, place), strict=True):
        yield count, of_expert[cut.encodings.index(name)]


def _shared(
    shapes: Sequence[dict[Part, _Shapes]],
    placement: Sequence[LayerPlacement],
    pool: SharedPool,
    transfer: Transfer,
) -> tuple[list[dict[Part, Slots]], int]:
    shape = shapes[0]["top"][0]
    alike = all({*of_layer} == {"top"} and {*of_layer["top"]} == {shape} for of_layer in shapes)
    assert alike, "a pool of unlike experts"
    cache = SharedCache(pool.slots, [place.hot for place in placement], pool.policy)
    shared = _allocate(shape, pool.slots, transfer)
    by_layer: list[dict[Part, Slots]] = [
        {"top": Slots(cache.layer(index), shared)} for index in range(len(placement))
    ]
    return by_layer, pool.slots * shape.stored_bytes


def _allocate(shape: SegmentShape, count: int, transfer: Transfer) -> list[Piece]:
    return pieces(transfer.allocate(count * shape.stored_bytes), shape.stored_bytes)
