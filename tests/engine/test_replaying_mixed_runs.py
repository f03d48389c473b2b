"""A run over layers whose experts are stored in several encodings, recorded again and replayed."""

from __future__ import annotations

from typing import Any

import pytest

from moepack.checkpoint import Checkpoint
from moepack.hardware import find_hardware
from moepack.layout import Layout
from moepack.measuring import measure
from moepack.plan import Placement
from moepack.replayed_run import mean_of, record_run, replay_run
from moepack.roofline import derive_compute
from moepack.trace import Trace
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.mixed import layout_by_expert, with_layers, with_slots
from tests.support.plans import placement

NAMES = (("F32", "INT8", "INT4_G32"), ("INT8", "INT4_G32"), ("INT8",))
PROMPTS = [
    [(7 * place * place + 3 * place + turn) % 250 + 3 for place in range(20)] for turn in range(3)
]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("mixtral", "plain"))


@pytest.fixture(scope="module")
def layout(checkpoint: Checkpoint) -> Layout:
    return layout_by_expert(checkpoint.spec, NAMES, bottoms=(1,))


@pytest.fixture(scope="module")
def recorded(checkpoint: Checkpoint, layout: Layout) -> Trace:
    """Of any placement: they all compute the same."""
    with open_engine(checkpoint, layout, some_slots(checkpoint, layout, 99)) as engine:
        return record_run(engine, PROMPTS, NEW_TOKENS)


def some_slots(checkpoint: Checkpoint, layout: Layout, slots: int, **options: Any) -> Placement:
    """So many slots for the experts of each encoding at most."""
    spec = checkpoint.spec
    place = placement(spec, layout, tops=0, bottoms=0, staging=4, context=64, **options)
    layers = [
        with_slots(cut, each, [min(slots, size) for size in cut.class_sizes(8).values()])
        for cut, each in zip(layout.layers, place.layers, strict=True)
    ]
    return with_layers(spec, layout, place, layers)


@pytest.mark.parametrize(
    ("slots", "options"),
    [
        (0, {}),
        (1, {"policy": "lru"}),
        (2, {"policy": "lcp", "coldest_first": True}),
        (1, {"policy": "lfu_decay", "prefetch": "all", "depth": 3}),
        (2, {"policy": "pinned", "prefetch": "all", "depth": 2}),
    ],
)
def test_what_a_run_hit_and_fetched_is_found_again(
    checkpoint: Checkpoint, layout: Layout, recorded: Trace, slots: int, options: dict[str, Any]
) -> None:
    """Hits, and bytes over the link: of each expert as many as it is stored in."""
    spec = checkpoint.spec
    place = some_slots(checkpoint, layout, slots, **options)
    with open_engine(checkpoint, layout, place) as engine:
        stats, _ = measure(engine, PROMPTS, NEW_TOKENS)
    hardware = find_hardware("cpu-nvme4")
    compute = derive_compute(spec, hardware)
    replays = replay_run(spec, compute, hardware.link_seconds, layout, place, recorded)
    told = mean_of(replays[len(PROMPTS) :])
    assert told.hit_rate == pytest.approx(stats.hit_rate)
    assert told.demand_bytes + told.ahead_used_bytes == pytest.approx(
        (stats.demand_bytes_per_token or 0) + (stats.ahead_used_bytes_per_token or 0)
    )
