"""Slots: memory of the fast tier in which experts stay, and the cache that decides who.

A layer has slots of its own for each part of its experts, or its part of a pool that all layers
share. Either way it sees :class:`Slots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moepack.budget import layer_segment
from moepack.model_spec import ModelSpec
from moepack.plan import LayerLayout, LayerPlacement, Layout, SharedPool
from moepack.residency import ExpertCache, LayerCache, SharedCache
from moepack.segments import PARTS, Part, SegmentShape
from moepack_runtime.ffn import FfnWeights, QuantisedFfn
from moepack_runtime.pieces import Piece, pieces
from moepack_runtime.transfer import Transfer


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
    shapes, slots : dict
        Of each part that the layer's experts have.
    key_part : str
        The part whose residency counts as a hit.
    num_experts : int
    is_cut : bool
        Whether its experts have two parts.
    """

    def __init__(
        self,
        number: int,
        num_experts: int,
        shapes: dict[Part, SegmentShape],
        slots: dict[Part, Slots],
    ) -> None:
        self.number = number
        self.num_experts = num_experts
        self.shapes = shapes
        self.slots = slots
        self.key_part: Part = "top" if "top" in shapes else "bottom"
        self.is_cut = len(shapes) == 2
        # Where each part lies in a frame: the bottom behind the top.
        self._frame_offset: dict[Part, int] = {"top": 0, "bottom": 0}
        if self.is_cut:
            self._frame_offset["bottom"] = shapes["top"].stored_bytes

    @property
    def frame_bytes(self) -> int:
        """What one whole expert takes."""
        return sum(shape.stored_bytes for shape in self.shapes.values())

    def missing(self, expert: int) -> list[Part]:
        """The parts of an expert that are not resident, top first."""
        return [part for part, slots in self.slots.items() if not slots.cache.holds(expert)]

    def room(self, frame: Piece, part: Part) -> torch.Tensor:
        """Where a part of an expert lies in a frame: uint8 [stored bytes]."""
        return frame.room(self.shapes[part], self._frame_offset[part])

    def weights(self, frame: Piece, part: Part) -> FfnWeights | QuantisedFfn:
        """The same as weights."""
        return frame.weights(self.shapes[part], self._frame_offset[part])

    def admit(self, frame: Piece, part: Part, slot: int) -> Piece:
        """Put a part that lies in a frame into a slot.

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
        room.room(self.shapes[part]).copy_(self.room(frame, part))
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
    shapes = [_shapes(spec, cut, known) for cut in layout.layers]
    if pool is not None:
        by_layer, allocated_bytes = _shared(shapes, placement, pool, transfer)
    else:
        by_layer, allocated_bytes = _own(shapes, placement, transfer)
    return {
        cut.layer: LayerSlots(cut.layer, spec.moe(cut.layer).num_experts, of_layer, slots)
        for cut, of_layer, slots in zip(layout.layers, shapes, by_layer, strict=True)
    }, allocated_bytes


def _shapes(
    spec: ModelSpec, layout: LayerLayout, known: dict[SegmentShape, SegmentShape]
) -> dict[Part, SegmentShape]:
    """Of each part that the layer's experts have; one object for all that are alike."""
    found: dict[Part, SegmentShape] = {}
    for part in PARTS:
        shape = layer_segment(spec, layout, part)
        if shape is not None:
            found[part] = known.setdefault(shape, shape)
    return found


def _own(
    shapes: Sequence[dict[Part, SegmentShape]],
    placement: Sequence[LayerPlacement],
    transfer: Transfer,
) -> tuple[list[dict[Part, Slots]], int]:
    allocated_bytes = 0
    by_layer: list[dict[Part, Slots]] = []
    for of_layer, place in zip(shapes, placement, strict=True):
        capacity: dict[Part, int] = {"top": place.top_slots, "bottom": place.bottom_slots}
        slots: dict[Part, Slots] = {}
        for part, shape in of_layer.items():
            allocated_bytes += capacity[part] * shape.stored_bytes
            slots[part] = Slots(
                ExpertCache(
                    capacity[part], place.hot, place.policy, half_life_tokens=place.half_life_tokens
                ),
                _allocate(shape, capacity[part], transfer),
            )
        by_layer.append(slots)
    return by_layer, allocated_bytes


def _shared(
    shapes: Sequence[dict[Part, SegmentShape]],
    placement: Sequence[LayerPlacement],
    pool: SharedPool,
    transfer: Transfer,
) -> tuple[list[dict[Part, Slots]], int]:
    shape = shapes[0]["top"]
    assert all(of_layer == {"top": shape} for of_layer in shapes), "a pool of unlike experts"
    cache = SharedCache(pool.slots, [place.hot for place in placement], pool.policy)
    shared = _allocate(shape, pool.slots, transfer)
    by_layer: list[dict[Part, Slots]] = [
        {"top": Slots(cache.layer(index), shared)} for index in range(len(placement))
    ]
    return by_layer, pool.slots * shape.stored_bytes


def _allocate(shape: SegmentShape, count: int, transfer: Transfer) -> list[Piece]:
    return pieces(transfer.allocate(count * shape.stored_bytes), shape.stored_bytes)
