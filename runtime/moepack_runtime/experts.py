"""How a layer's experts get to where they are computed: from their slots, or in flight.

All memory is allocated once, from the transfer that will fill it: the slots, and one ring of
*frames* that all layers share, each of which holds one expert in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch

from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Layout, SharedPool
from moepack.residency import Access
from moepack.segments import Part, SegmentId
from moepack_runtime.ffn import FfnWeights
from moepack_runtime.slots import LayerSlots, allocate_slots, pieces, segment_weights
from moepack_runtime.transfer import Ticket, Transfer


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
    pool
        Slots that all layers share, instead of their own.

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
        pool: SharedPool | None = None,
    ) -> None:
        if staging_experts < 1:
            raise ValueError(f"staging of {staging_experts} experts; expected at least one")
        self._transfer = transfer
        self._layers, slots_bytes = allocate_slots(spec, layout, placement, pool, transfer)
        frame_bytes = max(layer.frame_bytes for layer in self._layers.values())
        memory = transfer.allocate(staging_experts * frame_bytes)
        self._frames = pieces(memory, frame_bytes)
        self._free = deque(range(staging_experts))
        self._frame_views: dict[tuple[int, Part, int], FfnWeights] = {}
        self.wait_s = 0.0
        self.allocated_bytes = staging_experts * frame_bytes + slots_bytes

    def warm(self) -> None:
        """Fill every slot with what its cache begins with."""
        tickets = []
        for layer in self._layers.values():
            for part, slots in layer.slots.items():
                for expert, slot in slots.cache.resident.items():
                    segment = SegmentId(layer.number, expert, part)
                    tickets.append(self._transfer.start(segment, slots.memory[slot]))
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
        self, memory: ExpertMemory, layer: LayerSlots, tokens: Sequence[Sequence[int]]
    ) -> None:
        self._memory = memory
        self._layer = layer
        self._access: dict[Part, Access] = {
            part: slots.cache.step(tokens) for part, slots in layer.slots.items()
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

    @property
    def hits(self) -> Collection[int]:
        """The needed experts whose cached part was resident when the pass began."""
        return self._access[self._layer.key_part].resident.keys()

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
            for part, slots in self._layer.slots.items():
                slot = self._access[part].resident.get(expert)
                if slot is not None:
                    yield Arrival(expert, slots.views[slot])
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
                self._layer.slots[part].memory[slot].copy_(self._frame_slice(fetch.frame, part))
        self._memory._free.append(fetch.frame)
        self._start_fetches()
