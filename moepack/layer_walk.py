"""Walking through the layers of a kind, as a pass over the model does, and timing each piece.

What a piece takes depends on what ran before it: a layer's weights that were just used are in a
processor's cache, and in a run they are not, since every other layer was used in between. So no
piece is repeated by itself: the layers take turns, each with its attention, its router and its
experts, and the head comes after them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, Protocol

from moepack.timing import Stopwatch

if TYPE_CHECKING:
    import torch
    from moepack_runtime.kv_cache import KvCache
    from moepack_runtime.model import Decoder
    from moepack_runtime.router import Routing
    from moepack_runtime.token_graphs import TokenGraphs

    from moepack.model_spec import ModelSpec

#: Runs the routed experts of a layer on [tokens, hidden], with so many experts for every token.
ExpertPass = Callable[[int, "torch.Tensor", int], "torch.Tensor"]


class Experts(NamedTuple):
    """A way for the experts of a walk: what runs them, and how many of them each token has.

    ``lead_in``: walks that go before the one that counts, in which something is under way from one
    to the next; ``begin`` and ``end`` are called around all of them.
    """

    run: ExpertPass
    each: int
    lead_in: int = 0
    begin: Callable[[], None] | None = None
    end: Callable[[], None] | None = None


class Laps(NamedTuple):
    """Seconds of each piece of one layer, in a walk over several: their mean.

    ``head_s`` is that of the whole walk. Of a device's recorded steps ``attention_s`` is all of the
    step, up to the experts, and ``router_s`` what it takes to know their ids.
    """

    attention_s: float
    router_s: float
    ffn_s: float
    experts_s: float
    head_s: float

    @property
    def around_s(self) -> float:
        """Everything in the layer but its experts."""
        return self.attention_s + self.router_s + self.ffn_s


class Walkable(Protocol):
    """What is walked through: an engine, or layers like a model's."""

    @property
    def spec(self) -> ModelSpec:
        """What it is."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def kv(self) -> KvCache:
        """Its cache."""

    @property
    def decoder(self) -> Decoder:
        """Its layers."""

    @property
    def token_graphs(self) -> TokenGraphs | None:
        """Their recorded steps, on a device."""


class LayerWalk:
    """Walks through some layers of one kind.

    Parameters
    ----------
    engine
        Open, with an empty cache; what is walked fills it.
    numbers
        Layers of one kind, in their order.
    context_tokens
        The longest sequence that is walked with; one token comes behind so many.
    stopwatch
        Tells one piece from the next.
    """

    def __init__(
        self, engine: Walkable, numbers: Sequence[int], context_tokens: int, stopwatch: Stopwatch
    ) -> None:
        import torch
        from moepack_runtime.sampling import Sampler, SamplingParams

        self._engine = engine
        self._numbers = numbers
        self._stopwatch = stopwatch
        ids = torch.arange(context_tokens, device=engine.device) % engine.spec.vocab_size
        self._sample = engine.decoder.embed(ids)
        self._first_id = ids[:1]
        self._sampler = Sampler(SamplingParams(temperature=1.0))
        self._positions = itertools.count()  # from the context's end on: see fill_context

    def fill_context(self) -> None:
        """Run the whole sample through the attention of every layer: what one token looks at."""
        self._positions = itertools.count(len(self._sample))
        for number in self._numbers:
            self._engine.kv.layers[number].truncate(0)
            self._engine.decoder.layers[number].attend(self._sample, 0)

    def walk(self, tokens: int, experts: Experts | None) -> Laps:
        """All layers once: a prompt of some tokens, or one token behind the context.

        Parameters
        ----------
        experts
            None for layers that have none.
        """
        if experts is None:
            return self._walk(tokens, None)
        if experts.begin is not None:
            experts.begin()
        for _ in range(experts.lead_in):
            self._walk(tokens, experts)
        laps = self._walk(tokens, experts)
        if experts.end is not None:
            experts.end()
        return laps

    def _walk(self, tokens: int, experts: Experts | None) -> Laps:
        decoder = self._engine.decoder
        hidden = self._sample[:tokens]
        start = next(self._positions) if tokens == 1 else 0
        attention_s = router_s = ffn_s = experts_s = 0.0
        lap = self._stopwatch.lap
        lap()
        head_s = 0.0
        graphs = self._engine.token_graphs if tokens == 1 else None
        if graphs is not None:
            graphs.move_to(start)
            head_s += lap()
        for number in self._numbers:
            layer = decoder.layers[number]
            if start == 0:
                self._engine.kv.layers[number].truncate(0)
            reached = None if graphs is None else graphs.run(number, hidden)
            residual = layer.attend(hidden, start) if reached is None else reached.residual
            attention_s += lap()
            if experts is None:
                if reached is None:
                    residual.add_(layer.dense(layer.mlp_norm(residual)))
                ffn_s += lap()
                continue
            if reached is None or reached.inputs is None or reached.routing is None:
                inputs = layer.mlp_norm(residual)
                _on_host(layer.route(inputs))
            else:
                inputs = reached.inputs
                _on_host(reached.routing)
            router_s += lap()
            layer.shared(inputs)
            ffn_s += lap()
            residual.add_(experts.run(number, inputs, experts.each))
            experts_s += lap()
        self._sampler.draw(decoder.logits(decoder.embed(self._first_id))[-1])
        head_s += lap()
        many = len(self._numbers)
        return Laps(attention_s / many, router_s / many, ffn_s / many, experts_s / many, head_s)


def _on_host(routing: Routing) -> None:
    """As the engine needs it: who is missing is decided there."""
    routing.ids.tolist()


def median_laps(laps: Sequence[Laps]) -> Laps:
    """Piece by piece."""
    return Laps(*(median(piece) for piece in zip(*laps, strict=True)))
