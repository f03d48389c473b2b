"""How many (layer, token) events a second the replay takes, on a large model.

    python -m benchmarks.replay_speed --layers 94 --experts 128 --top-k 8 --tokens 4096

The routing is drawn from a preset, every token of it is decoded, and each placement is replayed a
few times over tables of the routing that are ready; what it takes to make these is told first.
Printed are medians; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from benchmarks.options import at_least
from moepack.footprint import MemoryBreakdown
from moepack.hardware import find_hardware
from moepack.layout import Layout
from moepack.layouts import uniform_layout
from moepack.model_spec import AttentionSpec, ModelSpec, MoeSpec, RouterSpec
from moepack.paper.settings import decoder
from moepack.plan import LayerPlacement, Placement
from moepack.presets import preset_path
from moepack.replay import Replayer
from moepack.replayed import Replayed
from moepack.roofline import derive_compute
from moepack.routing_model import load_routing_model
from moepack.routing_presets import synthetic_profile
from moepack.routing_tables import RoutingTables
from moepack.trace import ROUTING_PARTS

MACHINE = "rtx-4090"

T = TypeVar("T")


class Case(NamedTuple):
    """A placement, and the engine that it is for."""

    name: str
    layout: Layout
    placement: Placement
    as_ready: bool


def main(arguments: Sequence[str] | None = None) -> None:
    """Time it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=at_least(1), default=94)
    parser.add_argument("--experts", type=at_least(1), default=128)
    parser.add_argument("--top-k", type=at_least(1), default=8)
    parser.add_argument("--tokens", type=at_least(1), default=4096)
    parser.add_argument("--routing", default="qwen3-30b-a3b")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    asked = parser.parse_args(arguments)
    moe = MoeSpec(asked.experts, asked.top_k, 1536, RouterSpec())
    heads = AttentionSpec(64, 4, 128, 128, 128, 128**-0.5)
    spec = decoder("Drawn", "qwen3_moe", asked.layers, heads, moe, hidden=4096, vocab=151936)
    tables, tables_s = timed(lambda: tabulate(spec, asked.routing, asked.tokens))
    hardware = find_hardware(MACHINE)
    replayer = Replayer(
        spec,
        derive_compute(spec, hardware),
        tables,
        hardware.link_seconds,
        prompt_tokens=512,
        part="test",
    )
    print(
        f"{asked.layers} layers of {asked.experts} experts, {asked.top_k} for a token; "
        f"{asked.tokens} tokens; routing {asked.routing} drawn and ranked in {tables_s:.1f} s"
    )
    print(f"{'placement':42}{'seconds':>9}{'events/s':>12}{'per token':>12}")
    speeds = {}
    for case in cases(spec, tables):
        seconds = []
        for _ in range(asked.rounds):
            found, took_s = timed(functools.partial(replay, replayer, case))
            seconds.append(took_s)
        speeds[case.name] = found.events / statistics.median(seconds)
        print(
            f"{case.name:42}{statistics.median(seconds):9.2f}{speeds[case.name]:12,.0f}"
            f"{1e3 * found.tpot_s:9.1f} ms"
        )
    print(json.dumps({"events": found.events, "tables_s": tables_s, "events_per_s": speeds}))


def replay(replayer: Replayer, case: Case) -> Replayed:
    """One placement over every token."""
    return replayer.replay(case.layout, case.placement, as_ready=case.as_ready)


def tabulate(spec: ModelSpec, routing: str, tokens: int) -> RoutingTables:
    """Draw the routing, all of it *test*, and rank it."""
    model = load_routing_model(preset_path(routing, "routing"))
    profile = synthetic_profile(model, spec, tokens=tokens, texts=8)
    test = np.full_like(profile.trace.part, ROUTING_PARTS.index("test"))
    trace = dataclasses.replace(profile.trace, part=test)
    tables = RoutingTables(dataclasses.replace(profile, trace=trace))
    tables.ranks("lcp")
    return tables


def cases(spec: ModelSpec, tables: RoutingTables) -> Iterator[Case]:
    """On demand and prefetching, whole and cut: a quarter of the experts' bytes in slots."""
    whole, half = uniform_layout(spec, 1.0), uniform_layout(spec, 0.5)
    quarter, top_k = spec.moe(0).num_experts // 4, spec.moe(0).top_k

    def case(name: str, layout: Layout, tops: int, depth: int, staging: int, ready: bool) -> Case:
        layers = tuple(
            LayerPlacement(
                cut.layer, 0, tops, 0, "lcp", hot, "all" if depth else "off", prefetch_depth=depth
            )
            for cut, hot in zip(layout.layers, tables.hot, strict=True)
        )
        placement = Placement(
            device="cuda",
            fast_budget_bytes=0,
            staging_experts=staging,
            context_tokens=4096,
            prompt_tokens=512,
            new_tokens=128,
            memory=MemoryBreakdown(0, 0, 0, 0, 0, 0),
            layers=layers,
        )
        return Case(name, layout, placement, ready)

    yield case("whole, on demand, two in flight", whole, quarter, 0, 2, False)
    yield case("whole, on demand, as ready", whole, quarter, 0, top_k, True)
    yield case("halves, on demand, two in flight", half, 2 * quarter, 0, 2, False)
    yield case("whole, prefetching top-k", whole, quarter, top_k, 2 * top_k, True)
    yield case("whole, prefetching twice top-k", whole, quarter, 2 * top_k, 3 * top_k, True)
    yield case("halves, prefetching top-k", half, 2 * quarter, top_k, 2 * top_k, True)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What work gives, and the seconds that it takes."""
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


if __name__ == "__main__":
    main()
