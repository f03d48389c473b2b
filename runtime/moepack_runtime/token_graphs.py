"""One token's way to a layer's experts, recorded once and replayed by a single launch.

Between two layers' experts lie some 60 launches (norms, projections, rotation, attention, router),
each of which takes the processor longer than the device: 0.9 ms on an H100 whose kernels run for
0.07. CUDA records them once for each layer and each length up to which the cache is read; replaying
them is one launch. What changes from token to token lies in memory that the recorded kernels read:
the residual stream, the position, what it may see, and its rotations.

Which tokens come this way is a matter of shape alone (one token by itself, on a device), so the
bits do not depend on the placement, but for the length of its context: the last recorded length.
Layers whose cache has a window or sinks are launched as ever: where their rows lie is known to the
processor only.

Recorded kernels read all rows of the cache up to the recorded length: those that nobody wrote are
zero, those of a longer sequence before are finite, and both are masked.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from moepack.errors import DeviceError
from moepack.model_spec import ModelSpec
from moepack_runtime.attention import Here
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.look_ahead import Ranking
from moepack_runtime.model import Decoder, DecoderLayer
from moepack_runtime.rope import Rotation
from moepack_runtime.router import Routing
from moepack_runtime.weights import TORCH_DTYPE

#: Nothing is fetched ahead.
NO_RANKINGS: Mapping[int, Ranking] = MappingProxyType({})

# The shortest length that is recorded; each further one is twice as long.
_FEWEST_ROWS = 512


class Reached(NamedTuple):
    """What lies before the experts of a layer; all of it is overwritten by the next layer.

    Attributes
    ----------
    residual : Tensor
        [1, hidden]: the residual stream; of a layer without experts, behind it.
    inputs, routing
        The normed [1, hidden] and the choice; None in a layer without experts.
    named : Tensor or None
        The ids of the routing and behind them those of the next layer's ranking, int64 [1, ids]:
        together, since each copy to the host waits for the device. None where they are not.
    """

    residual: torch.Tensor
    inputs: torch.Tensor | None
    routing: Routing | None
    named: torch.Tensor | None = None


class TokenStep:
    """One token in memory that stays where it is, and its way through the layers.

    Parameters
    ----------
    rows
        The most rows of the cache that a step reads.
    rankings
        By number of the layer, what ranks the experts of the next one meanwhile.
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        rows: int,
        device: torch.device,
        rankings: Mapping[int, Ranking] = NO_RANKINGS,
    ) -> None:
        dtype = TORCH_DTYPE[spec.dtype]
        self._ropes = tuple(decoder.ropes)
        self._hidden = torch.zeros(1, spec.hidden_size, dtype=dtype, device=device)
        self._inputs = torch.zeros_like(self._hidden)
        most = max(layer.moe.num_experts for layer in spec.layers if layer.moe is not None)
        self._rankings = rankings
        self._named = torch.zeros(1, 2 * most, dtype=torch.int64, device=device)
        self._routings = {
            count: Routing(self._named[:, :count], torch.zeros(1, count, device=device))
            for count in {spec.moe(number).top_k for number in spec.moe_layers}
        }
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._mask = torch.zeros(1, rows, dtype=dtype, device=device)
        # A run of it is the mask of any position.
        self._masks = torch.zeros(2 * rows, dtype=dtype, device=device)
        self._masks[rows:] = -torch.inf
        self._rotations = {
            rope: Rotation(*(kept.clone() for kept in rope.rotation(0, 1))) for rope in self._ropes
        }
        self.move_to(0)

    def move_to(self, start: int) -> None:
        """A token at position ``start`` comes."""
        rows = self._mask.shape[1]
        self._position.fill_(start)
        self._mask.copy_(self._masks[rows - 1 - start : 2 * rows - 1 - start])
        for rope in self._ropes:
            for kept, new in zip(self._rotations[rope], rope.rotation(start, 1), strict=True):
                kept.copy_(new)

    def take(self, hidden: torch.Tensor) -> None:
        """The residual stream before the next layer, [1, hidden]: unless it is here already."""
        if hidden is not self._hidden:
            self._hidden.copy_(hidden)

    def reach(self, number: int, layer: DecoderLayer, rows: int) -> Reached:
        """One layer up to its experts; it reads so many rows of its cache.

        What is launched depends on ``number`` and ``rows`` alone.
        """
        here = Here(self._position, self._mask[:, :rows], self._rotations)
        residual = layer.attend_at(self._hidden, here)
        inputs = layer.mlp_norm(residual)
        if not layer.has_experts:
            self._hidden.copy_(residual + layer.dense(inputs))
            return Reached(self._hidden, None, None)
        found = layer.route(inputs)
        count = found.ids.shape[1]
        routing = self._routings[count]
        kept = (self._hidden, self._inputs, *routing)
        for place, new in zip(kept, (residual, inputs, *found), strict=True):
            place.copy_(new)
        ranking = self._rankings.get(number)
        if ranking is not None:
            ranked = ranking(residual)
            last = count + ranked.shape[1]
            self._named[:, count:last].copy_(ranked)
            count = last
        return Reached(self._hidden, self._inputs, routing, self._named[:, :count])


#: What graphs that run one after the other may share for their temporaries; torch's own handle.
_Pool = Any


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    reached: Reached


class TokenGraphs:
    """The recorded steps of a decoder over an empty cache.

    Recording runs each step once, on a stream of its own, as the token at position 0: nothing may
    be in the cache.

    Parameters
    ----------
    stream
        To record on; see :func:`moepack_runtime.device.prepare_device`.
    rankings
        See :class:`TokenStep`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        kv: KvCache,
        stream: torch.cuda.Stream,
        rankings: Mapping[int, Ranking] = NO_RANKINGS,
    ) -> None:
        self._caches = kv.layers
        self._lengths = recorded_lengths(kv.context_tokens)
        self._start = 0
        with torch.inference_mode():
            self._token = TokenStep(spec, decoder, self._lengths[-1], stream.device, rankings)
            self._recorded = self._record(decoder.layers, stream)

    def _record(
        self, layers: Sequence[DecoderLayer], stream: torch.cuda.Stream
    ) -> dict[tuple[int, int], _Recorded]:
        recorded = {}
        pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for rows in self._lengths:
                for number, layer in enumerate(layers):
                    if layer.is_recordable:
                        recorded[number, rows] = self._record_one(number, layer, rows, pool)
        stream.synchronize()
        return recorded

    def _record_one(self, number: int, layer: DecoderLayer, rows: int, pool: _Pool) -> _Recorded:
        self._token.reach(number, layer, rows)  # what is loaded at first use, is so now
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may call CUDA meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                reached = self._token.reach(number, layer, rows)
            except BaseException:
                with suppress(RuntimeError):  # what led to it says more
                    graph.capture_end()
                raise
            graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:
            raise DeviceError(
                f"CUDA does not record layer {number} over {rows} rows of the cache "
                f"({str(failure).splitlines()[0]}); expected a graph; update torch and the driver, "
                "or profile and plan with --device cpu"
            ) from failure
        return _Recorded(graph, reached)

    def move_to(self, start: int) -> None:
        """A token at position ``start`` comes: before its first layer."""
        self._start = start
        self._token.move_to(start)

    def run(self, number: int, hidden: torch.Tensor) -> Reached | None:
        """One layer, from the residual stream [1, hidden] before it to its experts.

        Returns
        -------
        Reached or None
            None where the layer is not recorded.
        """
        rows = self._lengths[bisect.bisect_right(self._lengths, self._start)]
        recorded = self._recorded.get((number, rows))
        if recorded is None:
            return None
        self._token.take(hidden)
        recorded.graph.replay()
        self._caches[number].count(self._start)
        return recorded.reached


def recorded_lengths(context_tokens: int) -> Sequence[int]:
    """Up to how many rows the cache is read, ascending: the last covers the whole context."""
    lengths = [min(_FEWEST_ROWS, context_tokens)]
    while lengths[-1] < context_tokens:
        lengths.append(min(2 * lengths[-1], context_tokens))
    return lengths
