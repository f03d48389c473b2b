"""Slots: what is where in the fast tier, and how a layer's experts get there.

All memory is allocated once, from the transfer that will fill it: per layer and part a pool of
slots, and one ring of *frames* that all layers share, each of which holds one expert in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from moepack.budget import layer_segment
from moepack.model_spec import ModelSpec
from moepack.plan import LayerLayout, LayerPlacement, Layout
from moepack.residency import Access, ExpertCache
from moepack.segments import PARTS, Part, SegmentId, SegmentShape
from moepack_runtime.ffn import FfnWeights
from moepack_runtime.transfer import Ticket, Transfer
from moepack_runtime.weights import TORCH_DTYPE


class Arrival(NamedTuple):
    """One segment that can be computed with."""

    expert: int
    weights: FfnWeights


class LayerCounts(NamedTuple):
    """Of one pass over one layer, summed over (token, expert) activations.

    ``hits``: the cached part (the top, or the whole expert at split 0) was resident; ``ready``:
    all parts were.
    """

    activations: int
    hits: int
    ready: int


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


def _pieces(memory: torch.Tensor, size_bytes: int) -> list[torch.Tensor]:
    return [memory[start : start + size_bytes] for start in range(0, len(memory), size_bytes)]


class _Pool:
    """The slots of one part of one layer, with the cache that decides who sits in them."""

    def __init__(
        self, shape: SegmentShape, capacity: int, placement: LayerPlacement, transfer: Transfer
    ) -> None:
        self.cache = ExpertCache(capacity, placement.hot, placement.policy)
        self.stored_bytes = shape.stored_bytes
        memory = transfer.allocate(capacity * shape.stored_bytes)
        self.slots = _pieces(memory, shape.stored_bytes)
        self.views = [segment_weights(slot, shape) for slot in self.slots]


class _Layer:
    """Geometry and pools of one layer."""

    def __init__(
        self, spec: ModelSpec, layout: LayerLayout, placement: LayerPlacement, transfer: Transfer
    ) -> None:
        self.number = layout.layer
        self.shapes: dict[Part, SegmentShape] = {}
        for part in PARTS:
            shape = layer_segment(spec, layout, part)
            if shape is not None:
                self.shapes[part] = shape
        capacity: dict[Part, int] = {
            "top": placement.top_slots,
            "bottom": placement.bottom_slots,
        }
        self.pools = {
            part: _Pool(shape, capacity[part], placement, transfer)
            for part, shape in self.shapes.items()
        }
        # The part whose residency counts as a hit.
        self.key_part: Part = "top" if "top" in self.shapes else "bottom"
        # Where each part lies in a frame: the bottom behind the top.
        self.frame_offset: dict[Part, int] = {"top": 0, "bottom": 0}
        if len(self.shapes) == 2:
            self.frame_offset["bottom"] = self.shapes["top"].stored_bytes

    @property
    def frame_bytes(self) -> int:
        return sum(shape.stored_bytes for shape in self.shapes.values())


class _Fetch(NamedTuple):
    """An expert in flight: its frame, and a ticket for each part that was missing."""

    frame: int
    tickets: dict[Part, Ticket]


class ExpertMemory:
    """Every slot and frame of a placement, and the only way to an expert's weights.

    Parameters
    ----------
    transfer
        Allocates the memory and fills it.
    layout, placement
        Layer by layer, in the same order.
    staging_experts : int
        Number of frames, at least one.

    Raises
    ------
    TransferError, DamagedSegmentError
        While filling the slots at the start, or while streaming.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        placement: Sequence[LayerPlacement],
        *,
        staging_experts: int,
        transfer: Transfer,
    ) -> None:
        if staging_experts < 1:
            raise ValueError(f"staging of {staging_experts} experts; expected at least one")
        self._transfer = transfer
        self._layers = {
            cut.layer: _Layer(spec, cut, place, transfer)
            for cut, place in zip(layout.layers, placement, strict=True)
        }
        frame_bytes = max(layer.frame_bytes for layer in self._layers.values())
        memory = transfer.allocate(staging_experts * frame_bytes)
        self._frames = _pieces(memory, frame_bytes)
        self._free = deque(range(staging_experts))
        self._frame_views: dict[tuple[int, Part, int], FfnWeights] = {}
        self.wait_s = 0.0
        self.allocated_bytes = staging_experts * frame_bytes + sum(
            pool.stored_bytes * len(pool.slots)
            for layer in self._layers.values()
            for pool in layer.pools.values()
        )

    def warm(self) -> None:
        """Fill every slot with the head of its layer's hot ranking."""
        tickets = []
        for layer in self._layers.values():
            for part, pool in layer.pools.items():
                for expert, slot in pool.cache.resident.items():
                    segment = SegmentId(layer.number, expert, part)
                    tickets.append(self._transfer.start(segment, pool.slots[slot]))
        for ticket in tickets:
            self._transfer.wait(ticket)

    def step(self, layer: int, tokens: Sequence[Sequence[int]]) -> LayerPass:
        """Begin one pass over a layer: the first fetches start at once.

        Parameters
        ----------
        tokens
            For every token of the pass the ids of its experts.
        """
        return LayerPass(self, self._layers[layer], tokens)


class LayerPass:
    """One pass over one layer: yields its experts' segments in the order of summation.

    The order (ascending expert, top before bottom) never depends on what is resident or on what
    arrives first, so neither does the sum.
    """

    def __init__(
        self, memory: ExpertMemory, layer: _Layer, tokens: Sequence[Sequence[int]]
    ) -> None:
        self._memory = memory
        self._layer = layer
        self._access: dict[Part, Access] = {
            part: pool.cache.step(tokens) for part, pool in layer.pools.items()
        }
        self._needed = sorted({expert for experts in tokens for expert in experts})
        self._missing = deque(
            expert
            for expert in self._needed
            if any(expert not in access.resident for access in self._access.values())
        )
        self._fetches: dict[int, _Fetch] = {}
        self.counts = self._count(tokens)
        self._start_fetches()

    def _count(self, tokens: Sequence[Sequence[int]]) -> LayerCounts:
        cached = self._access[self._layer.key_part].resident
        missing = set(self._missing)
        activations = hits = ready = 0
        for experts in tokens:
            activations += len(experts)
            for expert in experts:
                hits += expert in cached
                ready += expert not in missing
        return LayerCounts(activations, hits, ready)

    def _start_fetches(self) -> None:
        memory, layer = self._memory, self._layer
        while self._missing and memory._free:
            expert = self._missing.popleft()
            frame = memory._free.popleft()
            tickets: dict[Part, Ticket] = {}
            for part, access in self._access.items():
                if expert not in access.resident:
                    destination = self._frame_slice(frame, part)
                    segment = SegmentId(layer.number, expert, part)
                    tickets[part] = memory._transfer.start(segment, destination)
            self._fetches[expert] = _Fetch(frame, tickets)

    def _frame_slice(self, frame: int, part: Part) -> torch.Tensor:
        start = self._layer.frame_offset[part]
        return self._memory._frames[frame][start : start + self._layer.shapes[part].stored_bytes]

    def _frame_weights(self, frame: int, part: Part) -> FfnWeights:
        key = (self._layer.number, part, frame)
        view = self._memory._frame_views.get(key)
        if view is None:
            view = segment_weights(self._frame_slice(frame, part), self._layer.shapes[part])
            self._memory._frame_views[key] = view
        return view

    def __iter__(self) -> Iterator[Arrival]:
        """Yield each needed segment once; it stays valid until the next one is asked for."""
        for expert in self._needed:
            for part, pool in self._layer.pools.items():
                slot = self._access[part].resident.get(expert)
                if slot is not None:
                    yield Arrival(expert, pool.views[slot])
                else:
                    fetch = self._fetches[expert]
                    self._wait(fetch.tickets[part])
                    yield Arrival(expert, self._frame_weights(fetch.frame, part))
            if expert in self._fetches:
                self._settle(expert)

    def _wait(self, ticket: Ticket) -> None:
        began_s = perf_counter()
        self._memory._transfer.wait(ticket)
        self._memory.wait_s += perf_counter() - began_s

    def _settle(self, expert: int) -> None:
        """Copy what is admitted into its slot, give the frame back, fetch on."""
        fetch = self._fetches.pop(expert)
        for part in fetch.tickets:
            slot = self._access[part].admitted.get(expert)
            if slot is not None:
                self._layer.pools[part].slots[slot].copy_(self._frame_slice(fetch.frame, part))
        self._memory._free.append(fetch.frame)
        self._start_fetches()
