"""The walk through the layers: attention, router, experts, over all blocks of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch

from moepack.model_spec import ModelSpec, MoeSpec
from moepack_runtime.experts import ExpertMemory
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.live_routing import RoutingWindow
from moepack_runtime.look_ahead import LookAhead
from moepack_runtime.model import Decoder, DecoderLayer
from moepack_runtime.moe import Block, join_experts
from moepack_runtime.observers import Observer, PassObserver, Timeline
from moepack_runtime.progress import Progress, working
from moepack_runtime.stats import Meter
from moepack_runtime.token_graphs import Reached, TokenGraphs


class Hidden(NamedTuple):
    """A block of the residual stream: its first position, and [tokens, hidden]."""

    start: int
    hidden: torch.Tensor


@dataclass
class Watching:
    """Who is shown what happens; nobody where None."""

    routing: Observer | None = None
    passes: PassObserver | None = None
    time: Timeline | None = None
    live: RoutingWindow | None = None


class LayerLoop:
    """Runs every layer of a decoder over blocks of tokens, one layer after the other.

    Attributes
    ----------
    look_ahead : LookAhead
        Asks for the next layer's experts while one runs.
    watching : Watching
    meter : Meter
        Is told what every pass over a layer's experts found.
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        kv: KvCache,
        experts: ExpertMemory,
        look_ahead: LookAhead,
        meter: Meter,
        graphs: TokenGraphs | None = None,
    ) -> None:
        self._spec = spec
        self._decoder = decoder
        self._kv = kv
        self._experts = experts
        self.look_ahead = look_ahead
        self.meter = meter
        self._graphs = graphs
        self._is_one_token = False
        self.watching = Watching()

    def run(self, stream: list[Hidden], progress: Progress) -> list[Hidden]:
        """All layers. Empties ``stream``, and returns the residual stream behind the last one."""
        layers = len(self._spec.layers)
        self._is_one_token = len(stream) == 1 and len(stream[0].hidden) == 1
        if self._graphs is not None and self._is_one_token:
            self._graphs.move_to(stream[0].start)
        with working(progress, "run the prompt (layers)", layers, "items"):
            for number in range(layers):
                stream = self._run_layer(number, stream)
                progress.advance(1)
        return stream

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head makes of [tokens, hidden]: float32 [tokens, vocab]."""
        slices = _Slices(self.watching.time, len(self._spec.layers))
        logits = self._decoder.logits(hidden)
        slices.end("head")
        return logits

    def _run_layer(self, number: int, stream: list[Hidden]) -> list[Hidden]:
        """One layer over all blocks. Empties ``stream``: the residual exists once at a time."""
        whole = _Slices(self.watching.time, number)
        layer = self._decoder.layers[number]
        moe = self._spec.layers[number].moe
        residuals: list[Hidden] = []
        blocks: list[Block] = []
        named: torch.Tensor | None = None
        stream.reverse()
        while stream:
            start, hidden = stream.pop()
            slices = _Slices(self.watching.time, number)
            if start == 0:
                self._kv.layers[number].truncate(0)  # a survey passes from sequence to sequence
            residual, inputs, routing, named = self._reach(number, layer, hidden, start, slices)
            residuals.append(Hidden(start, residual))
            if inputs is None or routing is None:
                continue
            if self.watching.routing is not None:
                self.watching.routing.routed(number, residual, routing)
            blocks.append(Block(inputs, routing))
        if moe is not None:
            self._add_experts(number, moe, layer, residuals, blocks, named)
        whole.end("layer")
        return residuals

    def _reach(
        self,
        number: int,
        layer: DecoderLayer,
        hidden: torch.Tensor,
        start: int,
        slices: _Slices,
    ) -> Reached:
        """One block up to the experts of a layer, or through a layer that has none."""
        if self._graphs is not None and self._is_one_token:
            reached = self._graphs.run(number, hidden)
            if reached is not None:
                slices.end("attention and router")
                return reached
        residual = layer.attend(hidden, start)
        slices.end("attention")
        inputs = layer.mlp_norm(residual)
        if not layer.has_experts:
            whole = residual + layer.dense(inputs)
            slices.end("dense")
            return Reached(whole, None, None)
        routing = layer.route(inputs)
        slices.end("route")
        return Reached(residual, inputs, routing)

    def _add_experts(
        self,
        number: int,
        moe: MoeSpec,
        layer: DecoderLayer,
        stream: Sequence[Hidden],
        blocks: Sequence[Block],
        named: torch.Tensor | None,
    ) -> None:
        """Add the second half of a layer to the residual stream, in place.

        ``named`` is that of a recorded step (:class:`Reached`).
        """
        slices = _Slices(self.watching.time, number)
        residuals = [hidden for _, hidden in stream]
        ranking: list[int] | None = None
        if named is None:
            tokens = [row for block in blocks for row in block.routing.ids.tolist()]
        else:
            (ids,) = named.tolist()
            tokens, ranking = [ids[: moe.top_k]], ids[moe.top_k :] or None
        weights = None
        # Prompts are exact: what they leave in the KV cache all later tokens look at, and their
        # experts cross the link once for many tokens.
        if self._experts.on_miss is not None and len(tokens) == 1 and stream[0].start > 0:
            weights = blocks[0].routing.weights[0].tolist()
        layer_pass = self._experts.step(number, tokens, weights)
        slices.end("route")
        # Behind the demands, before anything else: the link is to have work from now on.
        if self.look_ahead.looks_from(number):
            self.look_ahead.look(number, residuals, ranking)
            layer_pass.fetch_ahead()
            slices.end("predict")
        shared = [layer.shared(block.inputs) for block in blocks]
        slices.end("shared")
        join_experts(moe, blocks, residuals, shared, layer_pass)
        self.meter.count(number, layer_pass.report())
        if self.watching.live is not None:
            self.watching.live.record(number, tokens)
        if self.watching.passes is not None:
            self.watching.passes.passed(number, tokens, layer_pass.found())


class _Slices:
    """Cuts the time of a layer into pieces for a timeline, if there is one."""

    __slots__ = ("_began_s", "_layer", "_timeline")

    def __init__(self, timeline: Timeline | None, layer: int) -> None:
        self._timeline = timeline
        self._layer = layer
        self._began_s = perf_counter()

    def end(self, what: str) -> None:
        """End a piece; the next one begins."""
        if self._timeline is not None:
            now_s = perf_counter()
            self._timeline.computed(what, self._layer, self._began_s, now_s)
            self._began_s = now_s
