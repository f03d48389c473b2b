"""Measuring the routed experts of a layer: one more of them, the pass around them, their transfers.

Peak memory beyond the engine's: the experts of one token, twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moepack.atomic import output_error
from moepack.budget import layer_segment
from moepack.compute import Curve
from moepack.cost import Held, LayerTimes, Parts
from moepack.decode_cost import decode_layer_s
from moepack.hardware import HardwareProfile
from moepack.layouts import layer_layout
from moepack.plan import LayerPlacement, Layout

if TYPE_CHECKING:
    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.store import ExpertSource, SegmentStore

#: Times a call with 1, 2, 4 ... tokens of a sample.
MeasureCurve = Callable[[Callable[["torch.Tensor"], object]], Curve]


class Probe(NamedTuple):
    """What is measured, and where."""

    source: ExpertSource
    engine: Engine
    hardware: HardwareProfile
    scratch: Path


class ExpertCurves(NamedTuple):
    """Seconds over tokens: of a pass without its experts, and of each expert in it."""

    fixed: Curve
    whole: Curve
    split: Curve


def measure_experts(probe: Probe, number: int, curve: MeasureCurve) -> ExpertCurves:
    """Passes in which every token uses the same experts: as many as a token has, and one alone.

    What one expert adds is the difference; what is left is the pass itself.
    """
    many = max(2, probe.engine.spec.moe(number).top_k)
    with _resident_layer(probe, number, 1.0, many) as run:
        all_whole = curve(lambda hidden: run(hidden, many))
        one_whole = curve(lambda hidden: run(hidden, 1))
    with _resident_layer(probe, number, 0.5, many) as run:
        all_split = curve(lambda hidden: run(hidden, many))
    tokens = all_whole.tokens
    fixed_s = tuple(
        _fixed_s(one_s, all_s, many)
        for one_s, all_s in zip(one_whole.seconds, all_whole.seconds, strict=True)
    )

    def each(passes: Curve) -> Curve:
        pairs = zip(passes.seconds, fixed_s, strict=True)
        return Curve(tokens, tuple(max(0.0, all_s - rest_s) / many for all_s, rest_s in pairs))

    return ExpertCurves(Curve(tokens, fixed_s), each(all_whole), each(all_split))


def _fixed_s(one_s: float, all_s: float, many: int) -> float:
    """Where the line through (1, one_s) and (many, all_s) begins; 0 where noise makes it fall."""
    return max(0.0, (many * one_s - all_s) / (many - 1)) if one_s < all_s else 0.0


@contextmanager
def _resident_layer(
    probe: Probe, number: int, ratio: float, slots: int
) -> Iterator[Callable[[torch.Tensor, int], torch.Tensor]]:
    from moepack_runtime.store import CheckpointStore

    spec = probe.engine.spec
    layout = Layout(spec.digest, (layer_layout(spec, number, ratio),))
    store = CheckpointStore(probe.source, spec, layout)
    with _open_layer(probe, layout, store, slots=slots) as run:
        yield run


def measure_transfer(
    probe: Probe,
    number: int,
    token: torch.Tensor,
    curves: ExpertCurves,
    beside: Callable[[], object],
    median_s: Callable[[Callable[[], object]], float],
) -> float:
    """What a pass with every expert missing takes beyond the cost model, for each transfer.

    The interpreter's lock, waking threads, weights that are in no processor cache: none of it is
    the link's, all of it is there for each transfer.

    Parameters
    ----------
    beside
        What a model computes between two such passes: meanwhile readers fall asleep and caches
        fill with other things, as they do when tokens are generated.
    """
    import torch
    from moepack_runtime.scratch_store import ScratchStore

    spec = probe.engine.spec
    top_k = spec.moe(number).top_k
    cut = layer_layout(spec, number, 1.0)
    shape = layer_segment(spec, cut, "top")
    assert shape is not None
    with tempfile.TemporaryDirectory(dir=probe.scratch, prefix=".probe.") as folder:
        path = Path(folder) / "experts"
        try:
            store = ScratchStore(path, probe.source, number, shape, top_k)
        except OSError as failure:
            raise output_error(path, failure) from failure
        layout = Layout(spec.digest, (cut,))
        with (
            _open_layer(probe, layout, store, slots=0) as run,
            torch.inference_mode(),
        ):
            missing_s = median_s(lambda: (beside(), run(token, top_k))) - median_s(beside)
    priced_s = decode_layer_s(
        LayerTimes(curves.fixed.at(1), curves.whole.at(1)),
        top_k,
        Parts(probe.hardware.link_seconds(shape.stored_bytes), 0.0, 1.0),
        Held(top=0.0, bottom=1.0),
        staging_experts=top_k,
        as_ready=True,
    )
    return max(0.0, missing_s - priced_s.item()) / top_k


@contextmanager
def _open_layer(
    probe: Probe, layout: Layout, store: SegmentStore, *, slots: int
) -> Iterator[Callable[[torch.Tensor, int], torch.Tensor]]:
    """The expert half of one layer, of which the first experts are resident.

    Yields a pass over some tokens, all of which choose as many of the first experts as is asked.
    """
    import torch
    from moepack_runtime.experts import ExpertMemory
    from moepack_runtime.loading import open_transfer
    from moepack_runtime.moe import Block, add_experts
    from moepack_runtime.router import Routing

    spec, number = probe.engine.spec, layout.layers[0].layer
    moe = spec.moe(number)
    chosen = torch.arange(moe.num_experts, device=probe.engine.device)
    everyone = tuple(range(moe.num_experts))
    placement = LayerPlacement(number, 0, slots, slots, "lru", everyone)
    with open_transfer(spec, layout, store, probe.hardware.device) as transfer:
        memory = ExpertMemory(
            spec, layout, [placement], staging_experts=moe.top_k, transfer=transfer
        )
        memory.warm()

        def run(hidden: torch.Tensor, experts: int) -> torch.Tensor:
            ids = chosen[:experts].expand(len(hidden), experts)
            weights = torch.full(ids.shape, 1 / experts, device=hidden.device)
            total = torch.zeros_like(hidden, dtype=torch.float32)
            block = Block(hidden, Routing(ids, weights))
            add_experts(moe, [block], [total], memory.step(number, ids.tolist()))
            return hidden + total.to(hidden.dtype)

        yield run
