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
from moepack_runtime.ffn import FfnWeights
from moepack_runtime.transfer import Transfer
from moepack_runtime.weights import TORCH_DTYPE


def segment_weights(buffer: torch.Tensor, shape: SegmentShape) -> FfnWeights:
    """See the bytes of a segment as its tensors, without a copy.

    Parameters
    ----------
    buffer
        uint8 [>= shape.size_bytes].
    """
    places = {tensor.name: tensor for tensor in shape.tensors}

    def view(first: str, last: str) -> torch.Tensor | None:
        """The neighbouring tensors ``first`` to ``last``, as one with all their rows."""
        if first not in places:
            return None
        begin, end = places[first], places[last]
        flat = buffer[begin.offset_bytes : end.offset_bytes + end.size_bytes]
        return flat.view(TORCH_DTYPE[begin.dtype]).view(-1, *begin.shape[1:])

    def matrix(name: str) -> torch.Tensor:
        found = view(name, name)
        assert found is not None, f"a segment without {name}"
        return found

    return FfnWeights(
        gate=matrix("gate.weight"),
        up=matrix("up.weight"),
        down=matrix("down.weight"),
        gate_bias=view("gate.bias", "gate.bias"),
        up_bias=view("up.bias", "up.bias"),
        down_bias=view("down.bias", "down.bias"),
        gate_up=view("gate.weight", "up.weight"),
        gate_up_bias=view("gate.bias", "up.bias"),
    )


def pieces(memory: torch.Tensor, size_bytes: int) -> list[torch.Tensor]:
    """Memory in pieces of one size."""
    return [memory[start : start + size_bytes] for start in range(0, len(memory), size_bytes)]


class Slots(NamedTuple):
    """The slots that one part of one layer's experts may lie in.

    Attributes
    ----------
    cache : LayerCache
        Who lies where.
    memory : list of Tensor
        Of each slot, uint8 [stored bytes].
    views : list of FfnWeights
        The same as weights. Layers that share a pool share these, too: their experts are alike.
    """

    cache: LayerCache
    memory: list[torch.Tensor]
    views: list[FfnWeights]


class LayerSlots:
    """Geometry and slots of one layer.

    Attributes
    ----------
    slots : dict
        Of each part that the layer's experts have.
    key_part : str
        The part whose residency counts as a hit.
    frame_offset : dict
        Where each part lies in a frame: the bottom behind the top.
    """

    def __init__(
        self, number: int, shapes: dict[Part, SegmentShape], slots: dict[Part, Slots]
    ) -> None:
        self.number = number
        self.shapes = shapes
        self.slots = slots
        self.key_part: Part = "top" if "top" in shapes else "bottom"
        self.frame_offset: dict[Part, int] = {"top": 0, "bottom": 0}
        if len(shapes) == 2:
            self.frame_offset["bottom"] = shapes["top"].stored_bytes

    @property
    def frame_bytes(self) -> int:
        """What one whole expert takes."""
        return sum(shape.stored_bytes for shape in self.shapes.values())


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
    shapes = [_shapes(spec, cut) for cut in layout.layers]
    if pool is not None:
        by_layer, allocated_bytes = _shared(shapes, placement, pool, transfer)
    else:
        by_layer, allocated_bytes = _own(shapes, placement, transfer)
    return {
        cut.layer: LayerSlots(cut.layer, of_layer, slots)
        for cut, of_layer, slots in zip(layout.layers, shapes, by_layer, strict=True)
    }, allocated_bytes


def _shapes(spec: ModelSpec, layout: LayerLayout) -> dict[Part, SegmentShape]:
    found: dict[Part, SegmentShape] = {}
    for part in PARTS:
        shape = layer_segment(spec, layout, part)
        if shape is not None:
            found[part] = shape
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
            memory, views = _allocate(shape, capacity[part], transfer)
            allocated_bytes += capacity[part] * shape.stored_bytes
            slots[part] = Slots(
                ExpertCache(
                    capacity[part], place.hot, place.policy, half_life_tokens=place.half_life_tokens
                ),
                memory,
                views,
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
    memory, views = _allocate(shape, pool.slots, transfer)
    by_layer: list[dict[Part, Slots]] = [
        {"top": Slots(cache.layer(index), memory, views)} for index in range(len(placement))
    ]
    return by_layer, pool.slots * shape.stored_bytes


def _allocate(
    shape: SegmentShape, count: int, transfer: Transfer
) -> tuple[list[torch.Tensor], list[FfnWeights]]:
    memory = pieces(transfer.allocate(count * shape.stored_bytes), shape.stored_bytes)
    return memory, [segment_weights(slot, shape) for slot in memory]
