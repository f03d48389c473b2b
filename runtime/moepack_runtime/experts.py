"""Where a placement's experts lie on the fast tier: in their slots, or in flight.

All memory is allocated once, from the transfer that will fill it: the slots, and one ring of
*frames* that all layers share, each of which holds one expert in flight. How a layer's experts get
from there to where they are computed is in :mod:`moepack_runtime.layer_pass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, OnMiss, SharedPool
from moepack.segments import Part, SegmentId
from moepack_runtime.ahead import Ahead, Guess
from moepack_runtime.frames import Frames
from moepack_runtime.fused import prepare
from moepack_runtime.fused_check import has_kernels
from moepack_runtime.layer_pass import LayerPass
from moepack_runtime.observers import Timeline
from moepack_runtime.pieces import Piece, pieces
from moepack_runtime.progress import NO_PROGRESS, Progress, working
from moepack_runtime.slots import LayerSlots, allocate_slots
from moepack_runtime.transfer import Transfer
from moepack_runtime.weights import TORCH_DTYPE


class Load(NamedTuple):
    """What is to be loaded into slots of one layer: expert -> slot."""

    layer: LayerSlots
    part: Part
    experts: Mapping[int, int]


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
    on_miss
        Which experts are replaced by low copies, or left out; None: none.

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
        on_miss: OnMiss | None = None,
    ) -> None:
        if staging_experts < 1:
            raise ValueError(f"staging of {staging_experts} experts; expected at least one")
        self.transfer = transfer
        self.on_miss = on_miss
        self.layers, slots_bytes = allocate_slots(spec, layout, placement, pool, transfer)
        frame_bytes = max(layer.frame_bytes for layer in self.layers.values())
        memory = transfer.allocate(staging_experts * frame_bytes)
        self.frames = Frames(pieces(memory, frame_bytes), transfer)
        self.ahead = Ahead(self.frames, transfer)
        self.allocated_bytes = staging_experts * frame_bytes + slots_bytes
        #: Memory of slots that no layer has any more.
        self.spare: list[Piece] = []
        self._timeline: Timeline | None = None

    def observe_time(self, timeline: Timeline | None) -> None:
        """Show ``timeline`` what crosses the link, what is computed with, what is waited for."""
        self._timeline = self.frames.timeline = timeline

    @property
    def timeline(self) -> Timeline | None:
        """Who is shown."""
        return self._timeline

    def warm(self, progress: Progress = NO_PROGRESS) -> None:
        """Fill every slot with what its cache begins with."""
        loads = [
            Load(layer, part, slots.cache.resident)
            for layer in self.layers.values()
            for part, slots in layer.slots.items()
        ]
        self.fill(loads, progress)

    def prepare(self, spec: ModelSpec) -> None:
        """On the present device, have what computes one token's experts compiled."""
        device = torch.device("cuda", torch.cuda.current_device())
        if not has_kernels(device):
            return
        for number, layer in self.layers.items():
            of_parts = (*layer.shapes.values(), *layer.low_shapes.values())
            shapes = {shape for of_experts in of_parts for shape in of_experts}
            prepare(shapes, spec.moe(number), TORCH_DTYPE[spec.dtype], len(layer.shapes), device)

    def fill(self, loads: Iterable[Load], progress: Progress = NO_PROGRESS) -> None:
        """Load experts into slots, and wait for them."""
        tickets = []
        for layer, part, experts in loads:
            for expert, slot in experts.items():
                segment = SegmentId(layer.number, expert, part)
                room = layer.slot_room(slot, expert, part)
                tickets.append(self.transfer.start(segment, room))
        total_bytes = sum(ticket.stored_bytes for ticket in tickets)
        with working(progress, "fill the slots", total_bytes):
            for ticket in tickets:
                self.transfer.wait(ticket)
                progress.advance(ticket.stored_bytes)

    def step(
        self,
        layer: int,
        tokens: Sequence[Sequence[int]],
        weights: Sequence[float] | None = None,
    ) -> LayerPass:
        """Begin one pass over a layer: its routing is known, what is missing is asked for.

        Parameters
        ----------
        tokens
            For every token of the pass the ids of its experts.
        weights
            Of the one token's experts, in their order, where some may be replaced or left out;
            None: all are exact.
        """
        return LayerPass(self, self.layers[layer], tokens, weights)

    def come_to_rest(self) -> None:
        """Forget what was to be fetched ahead, and wait until no frame is written into."""
        self.ahead.forget()
        while self.frames.wait() is not None:
            pass

    def is_resident(self, layer: int) -> bool:
        """Whether a layer has a slot for every part of every expert, so that nothing is missing."""
        found = self.layers[layer]
        return not any(found.missing(expert) for expert in range(found.num_experts))

    def guess(self, layer: int, guess: Guess) -> None:
        """Fetch ahead for the next layer to run, behind what the present one demands."""
        self.ahead.ask(self.layers[layer], guess)
