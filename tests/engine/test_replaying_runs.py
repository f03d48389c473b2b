"""A run, recorded again and replayed: the caches of the engine, from one text to the next."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.direct_io import Buffer, Wanted
from moepack_runtime.store import CheckMode
from moepack_runtime.tokenizer import Tokenizer
from typing_extensions import override

from moepack.checkpoint import Checkpoint
from moepack.hardware import find_hardware
from moepack.layout import Layout
from moepack.measuring import measure, shipped_prompts
from moepack.plan import OnMiss, SharedPool
from moepack.replayed_run import mean_of, record_run, replay_run
from moepack.roofline import derive_compute
from moepack.segments import SegmentId
from moepack.shipped import shipped_model
from moepack.trace import Trace
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement

NEW_TOKENS = 24
PLANS: list[tuple[float, dict[str, Any]]] = [
    (1.0, {"tops": 9, "bottoms": 0}),
    (1.0, {"tops": 3, "bottoms": 0, "policy": "lcp"}),
    (0.5, {"tops": 32, "bottoms": 7, "policy": "lfu"}),
    (1.0, {"tops": 0, "bottoms": 0, "pool": SharedPool(60, "lcp")}),
    (1.0, {"tops": 9, "bottoms": 0, "prefetch": "all", "depth": 4}),
    (0.5, {"tops": 15, "bottoms": 0, "prefetch": "bottoms", "depth": 4}),
    (0.0, {"tops": 0, "bottoms": 9, "prefetch": "all", "depth": 8}),
]


@functools.cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(shipped_model())


@functools.cache
def prompts() -> list[list[int]]:
    return shipped_prompts(Tokenizer.load(shipped_model()), 40)


class Kept(CheckpointStore):
    """Cuts and rounds each segment once, whatever engines read it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(checkpoint(), checkpoint().spec, layout)
        self._kept: dict[SegmentId, bytes] = {}

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        if segment in self._kept:
            destination[:] = np.frombuffer(self._kept[segment], np.uint8)
            return destination.nbytes
        read_bytes = super().read_into(segment, destination, check, wanted)
        self._kept[segment] = destination.tobytes()
        return read_bytes


@functools.cache
def with_low_copies(ratio: float) -> tuple[Layout, Kept]:
    """A layout whose experts have copies in few bits, and its segments."""
    spec = checkpoint().spec
    cut = mixed_layout(spec, (ratio,), block_tokens=16, encodings=("INT4_G32",))
    layers = tuple(replace(each, encoding=spec.dtype) for each in cut.layers)
    layout = replace(cut, layers=layers, low="INT4_G32")
    return layout, Kept(layout)


@functools.cache
def recorded(ratio: float) -> Trace:
    """Of one layout, under any of its plans: they all compute the same."""
    layout = mixed_layout(checkpoint().spec, (ratio,), block_tokens=16)
    place = placement(checkpoint().spec, layout, tops=99, bottoms=99, staging=1, context=128)
    with open_engine(checkpoint(), layout, place) as engine:
        return record_run(engine, prompts(), NEW_TOKENS)


@pytest.mark.parametrize(("ratio", "options"), PLANS)
def test_what_a_run_hit_and_fetched_is_found_again(ratio: float, options: dict[str, Any]) -> None:
    spec = checkpoint().spec
    layout = mixed_layout(spec, (ratio,), block_tokens=16)
    place = placement(spec, layout, staging=8, context=128, coldest_first=True, **options)
    with open_engine(checkpoint(), layout, place) as engine:
        stats, _ = measure(engine, prompts(), NEW_TOKENS)
    hardware = find_hardware("cpu-nvme4")
    compute = derive_compute(spec, hardware)
    replays = replay_run(spec, compute, hardware.link_seconds, layout, place, recorded(ratio))
    warm_up, found = replays[: len(prompts())], replays[len(prompts()) :]
    assert all(each.events == len(spec.moe_layers) for each in warm_up)
    told = mean_of(found)
    assert told.hit_rate == pytest.approx(stats.hit_rate)
    assert told.demand_bytes + told.ahead_used_bytes == pytest.approx(
        (stats.demand_bytes_per_token or 0) + (stats.ahead_used_bytes_per_token or 0)
    )


REPLACED: list[tuple[float, dict[str, Any]]] = [
    (1.0, {"tops": 9, "bottoms": 0}),
    (1.0, {"tops": 3, "bottoms": 0, "policy": "lcp"}),
    (0.33, {"tops": 32, "bottoms": 7, "policy": "lfu"}),
    (1.0, {"tops": 0, "bottoms": 0, "pool": SharedPool(60, "lcp")}),
]

#: Weights are recorded in half precision: one that is near a threshold may come to lie beyond it.
TOLERANCE = 0.01


@pytest.mark.parametrize(("ratio", "options"), REPLACED)
def test_what_a_run_replaced_and_left_out_is_found_again(
    ratio: float, options: dict[str, Any]
) -> None:
    """What is computed depends on what is resident: so it is recorded under the same plan.

    Of plans that fetch nothing ahead: of others the replay expects fewer to be replaced.
    """
    spec = checkpoint().spec
    layout, store = with_low_copies(ratio)
    place = placement(spec, layout, staging=8, context=128, coldest_first=True, **options)
    place = replace(place, on_miss=OnMiss(0.5, 0.8))
    with open_engine(checkpoint(), layout, place, store=store) as engine:
        stats, _ = measure(engine, prompts(), NEW_TOKENS)
    with open_engine(checkpoint(), layout, place, store=store) as engine:
        run = record_run(engine, prompts(), NEW_TOKENS)
    hardware = find_hardware("cpu-nvme4")
    compute = derive_compute(spec, hardware)
    replays = replay_run(spec, compute, hardware.link_seconds, layout, place, run)
    found = replays[len(prompts()) :]
    told = mean_of(found)
    assert stats.substituted_rate
    assert stats.skipped_rate
    assert told.substituted_rate == pytest.approx(stats.substituted_rate, rel=TOLERANCE)
    assert told.skipped_rate == pytest.approx(stats.skipped_rate, rel=TOLERANCE)
    assert told.hit_rate == pytest.approx(stats.hit_rate, rel=TOLERANCE)
    assert told.ready_rate == pytest.approx(stats.ready_rate, rel=TOLERANCE)
    assert told.demand_bytes + told.ahead_used_bytes == pytest.approx(
        (stats.demand_bytes_per_token or 0) + (stats.ahead_used_bytes_per_token or 0),
        rel=TOLERANCE,
    )
