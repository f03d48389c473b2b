"""Runs on a throttled link and a simulated clock beside their replay: every pass, every segment.

Nothing here depends on how fast the machine is: the clock moves only by what is computed, and while
something is waited for, and a transfer has arrived when the calculated link says so.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from moepack_runtime.checkpoint_store import CheckpointStore, ExpertSource
from moepack_runtime.observers import PassFound
from moepack_runtime.router import Routing
from moepack_runtime.stats import RunStats
from moepack_runtime.transfer import ThrottledTransfer, throttled

from moepack import segment_times
from moepack.budget import stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.compute import QuantisedExpert
from moepack.decoding import AnyDecoding, Seen
from moepack.lane_clock import Clock
from moepack.layout import Layout
from moepack.on_miss import EXACT, LEFT_OUT, LOWERED
from moepack.plan import (
    POLICIES,
    POOL_POLICIES,
    OnMiss,
    Placement,
    Policy,
    PrefetchMode,
    SharedPool,
)
from moepack.replayed_run import RunReplayer
from moepack.routing import make_profile
from moepack.routing_tables import RoutingTables
from moepack.segments import PARTS, Bits, SegmentId
from moepack.tier_decoding import TierDecoding
from moepack.trace import NO_PREDICTION, LayerShape, Trace
from tests.conftest import TinyFolder
from tests.support.caches import half_life_of
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.routed import compute_of, flat, layer_compute
from tests.support.simulated_time import (
    EveryPass,
    Instant,
    TimedCompute,
    TimedGuesses,
    TimedScript,
    Times,
    simulated_clock,
)

TOKENS = 16
LOW = "INT4_G32"
CONTEXT = TOKENS + 2
RECALL = 0.65
TIMES = Times(
    attention_s=3.1e-3, router_s=0.23e-3, shared_s=0.71e-3, expert_s=1.3e-3, head_s=1.9e-3
)
LATENCY_S = 1e-5

#: Window over whole-expert load. No whole numbers: what ends in the moment in which something else
#: is decided has no order.
LOADS = (0.1, 0.27, 0.61, 1.03, 1.97)


class Routed(NamedTuple):
    """A model, a text, what it chooses in every layer, and what is guessed of it.

    ``source`` is where its experts come from.
    """

    checkpoint: Checkpoint
    text: list[int]
    trace: Trace
    tables: RoutingTables
    source: ExpertSource


class Silent:
    """A checkpoint whose routed experts add nothing: whatever replaces them, the text is the same.

    Nor does leaving them out change what a router chooses.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        bits = dict(self._checkpoint.expert(layer, expert))
        return bits | {"down.weight": np.zeros_like(bits["down.weight"])}

    def trunk_tensor(self, name: str) -> Bits:
        return self._checkpoint.trunk_tensor(name)


class Weights:
    """What the routers weigh experts by, in the order of passes."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def routed(self, layer: int, residual: object, routing: Routing) -> None:  # noqa: ARG002
        self.seen.append(routing.weights.float().numpy())


@pytest.fixture(scope="module")
def routed(tiny_folder: TinyFolder) -> Routed:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    return recorded(checkpoint, checkpoint)


@pytest.fixture(scope="module")
def silent(tiny_folder: TinyFolder) -> Routed:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    return recorded(checkpoint, Silent(checkpoint))


def recorded(checkpoint: Checkpoint, source: ExpertSource) -> Routed:
    """What a text's tokens choose one after the other."""
    spec = checkpoint.spec
    rng = np.random.default_rng(0)
    text = (3 + rng.zipf(1.5, TOKENS + 1) % 40).tolist()
    layout = mixed_layout(spec, (1.0,))
    seen, weights = EveryPass(), Weights()
    everything = placement(spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)
    store = CheckpointStore(source, spec, layout)
    with open_engine(checkpoint, layout, everything, store=store) as engine:
        engine.observe_passes(seen)
        engine.observe(weights)
        for token in text[:TOKENS]:
            engine.decode(token)
    shapes = [LayerShape(n, spec.moe(n).num_experts, spec.moe(n).top_k) for n in spec.moe_layers]
    ids = np.array(seen.tokens, dtype=np.uint16).reshape(TOKENS, len(shapes), -1)
    trace = Trace(
        ids=ids,
        weights=np.concatenate(weights.seen).reshape(ids.shape).astype(np.float16),
        predicted=guesses_of(ids, shapes, rng),
        sequence=np.zeros(TOKENS, dtype=np.uint32),
        part=np.full(TOKENS, 2, dtype=np.uint8),
    )
    profile = make_profile(
        trace,
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="",
        how="recorded",
        sources=(),
        layers=tuple(shapes),
    )
    return Routed(checkpoint, text, trace, RoutingTables(profile), source)


def guesses_of(
    ids: np.ndarray, shapes: Sequence[LayerShape], rng: np.random.Generator
) -> np.ndarray:
    """Rankings that are right as often as not; nothing is guessed for the first pass."""
    predicted = np.empty((*ids.shape[:2], 2 * ids.shape[2]), dtype=np.uint16)
    for token, layer in np.ndindex(ids.shape[:2]):
        everyone = rng.permutation(shapes[layer].num_experts).tolist()
        right = [expert for expert in everyone if expert in ids[token, layer]]
        wrong = [expert for expert in everyone if expert not in right]
        for rank in range(predicted.shape[2]):
            drawn = right if right and rng.random() < RECALL else wrong
            predicted[token, layer, rank] = drawn.pop()
    predicted[0, 0] = NO_PREDICTION
    return predicted


class Slow:
    """One placement on one link; ``load``: a layer's compute over the load of a whole expert."""

    def __init__(self, routed: Routed, layout: Layout, place: Placement, load: float) -> None:
        self.routed, self.layout, self.place = routed, layout, place
        spec = routed.checkpoint.spec
        window_s = TIMES.attention_s + 2 * TIMES.router_s + TIMES.shared_s
        window_s += spec.moe(spec.moe_layers[0]).top_k * TIMES.expert_s
        self.bytes_per_s = spec.expert_bytes(spec.moe_layers[0]) / (window_s / load - LATENCY_S)

    def stored_bytes(self, layer: int, parts: int) -> list[int]:
        """Of each of so many segments of the layer's experts."""
        spec, cut = self.routed.checkpoint.spec, self.layout.layers[layer]
        sizes = [stored_bytes(spec, cut, part) for part in PARTS]
        return sizes if parts > 1 else [sum(sizes)]

    def broken_bytes(self, seen: Seen, token: int, layer: int) -> float:
        """What was not carried of what a pass found on its way for nobody."""
        parts = seen.ready.shape[2] // self.routed.trace.ids.shape[2]
        size = sum(self.stored_bytes(layer, parts))
        seconds = parts * LATENCY_S + size / self.bytes_per_s
        return float(seen.saved_s[token, layer] * size / seconds)

    def replay(self) -> AnyDecoding[Clock] | TierDecoding:
        """The replay of all tokens."""
        spec = self.routed.checkpoint.spec
        entry = layer_compute(
            spec.moe_layers,
            attention=TIMES.attention_s,
            expert=TIMES.expert_s,
            ffn=TIMES.shared_s,
        )
        low = QuantisedExpert(LOW, flat(TIMES.expert_s), flat(TIMES.expert_s))
        entry = dataclasses.replace(entry, router=flat(TIMES.router_s), quantised=(low,))
        replayer = RunReplayer(
            spec,
            compute_of(spec, [entry], head_s=TIMES.head_s),
            lambda size: LATENCY_S + size / self.bytes_per_s,
            None,
            self.layout,
            self.place,
            self.routed.tables,
        )
        return replayer.decoding(np.arange(TOKENS))

    def run(self, monkeypatch: pytest.MonkeyPatch) -> tuple[list[PassFound], float, RunStats]:
        """The same of an engine, and what it has measured."""
        clock = simulated_clock(monkeypatch)
        checkpoint, text, trace, _, source = self.routed
        rankings = dict(
            zip(checkpoint.spec.moe_layers, trace.predicted.swapaxes(0, 1), strict=True)
        )
        seen = EveryPass()
        with open_engine(
            checkpoint,
            self.layout,
            self.place,
            store=CheckpointStore(source, checkpoint.spec, self.layout),
            twin=lambda inner: ThrottledTransfer(Instant(inner), self.bytes_per_s, LATENCY_S),
            predictor=TimedGuesses(clock, TIMES.router_s, rankings),
        ) as engine:
            engine.observe_passes(seen)
            engine.observe_time(TimedCompute(clock, TIMES, self.layout))
            began_s = clock.now_s
            sampler = TimedScript(clock, TIMES.head_s, text[1:])
            list(engine.generate(text[:1], max_new_tokens=TOKENS, sampler=sampler))
            assert np.array_equal(np.reshape(seen.tokens, trace.ids.shape), trace.ids)
            return seen.found, clock.now_s - began_s, engine.stats()


class Told(NamedTuple):
    """What a pass found: experts, and segments."""

    ready: set[int]
    demanded: set[tuple[int, int]]
    ahead: set[tuple[int, int]]


def told_by_engine(found: PassFound, parts: int) -> Told:
    def named(segments: Sequence[SegmentId]) -> set[tuple[int, int]]:
        return {(each.expert, PARTS.index(each.part) if parts > 1 else 0) for each in segments}

    once = len(found.demanded) + len(found.ahead)
    assert len(named(found.demanded) | named(found.ahead)) == once
    return Told(set(found.ready), named(found.demanded), named(found.ahead))


def told_by_replay(seen: Seen, trace: Trace, token: int, layer: int) -> Told:
    """Its places are those of the experts in ascending order, and of the guesses by rank."""
    needed = np.sort(trace.ids[token, layer]).tolist()
    guessed = trace.predicted[token, layer].tolist()
    parts = seen.ready.shape[2] // len(needed)

    def named(flags: np.ndarray, experts: Sequence[int]) -> set[tuple[int, int]]:
        places = (divmod(place, parts) for place in np.flatnonzero(flags).tolist())
        return {(experts[number], part) for number, part in places}

    ready = seen.ready[token, layer].reshape(-1, parts).all(axis=1)
    return Told(
        {expert for expert, there in zip(needed, ready, strict=True) if there},
        named(seen.demanded[token, layer], needed),
        named(seen.begun[token, layer], guessed),
    )


def check(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass by pass, and what the run's statistics make of it."""
    seen, seconds = slow.replay().run()
    found, took_s, stats = slow.run(monkeypatch)
    trace = slow.routed.trace
    parts = seen.ready.shape[2] // trace.ids.shape[2]
    passes = itertools.product(range(TOKENS), range(trace.ids.shape[1]))
    told = [told_by_replay(seen, trace, *place) for place in passes]
    assert [told_by_engine(each, parts) for each in found] == told
    assert took_s == pytest.approx(seconds)
    assert stats.wait_s == pytest.approx(seen.wait_s[1:].sum(), abs=1e-9)
    # The first token was the prompt: statistics begin behind it.
    ready = demand_bytes = 0
    ahead_bytes = 0.0
    for number, each in list(enumerate(told))[trace.ids.shape[1] :]:
        sizes = slow.stored_bytes(number % trace.ids.shape[1], parts)
        ready += len(each.ready)
        demand_bytes += sum(sizes[part] for _, part in each.demanded)
        ahead_bytes += sum(sizes[part] for _, part in each.ahead)
        ahead_bytes -= slow.broken_bytes(seen, *divmod(number, trace.ids.shape[1]))
    assert stats.ready_rate == pytest.approx(ready / trace.ids[1:].size)
    assert stats.demand_bytes_per_token == demand_bytes / (TOKENS - 1)
    assert stats.link_bytes_per_token == pytest.approx((demand_bytes + ahead_bytes) / (TOKENS - 1))


def placed(
    routed: Routed,
    ratios: Sequence[float],
    policies: Sequence[Policy],
    *,
    low: str = "",
    **options: Any,
) -> tuple[Layout, Placement]:
    """Each layer with its own policy, in turn."""
    spec = routed.checkpoint.spec
    layout = dataclasses.replace(mixed_layout(spec, ratios), low=low)
    place = placement(spec, layout, context=CONTEXT, coldest_first=True, **options)
    layers = tuple(
        dataclasses.replace(layer, policy=policy, half_life_tokens=half_life_of(policy))
        for layer, policy in zip(place.layers, itertools.cycle(policies), strict=False)
    )
    return layout, dataclasses.replace(place, layers=layers)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(("ratio", "tops", "bottoms"), [(1.0, 5, 0), (0.5, 7, 2)])
def test_the_replay_knows_of_every_pass_what_was_ready(
    routed: Routed,
    monkeypatch: pytest.MonkeyPatch,
    load: float,
    depth: int,
    ratio: float,
    tops: int,
    bottoms: int,
) -> None:
    """Over all loads each layer has had each policy; staging is what a plan would have."""
    turn = LOADS.index(load)
    policies = POLICIES[turn:] + POLICIES[:turn]
    layout, place = placed(
        routed,
        (ratio,),
        policies,
        tops=tops,
        bottoms=bottoms,
        staging=4 + depth,
        prefetch="all" if depth else "off",
        depth=depth,
    )
    check(Slow(routed, layout, place, load), monkeypatch)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("pieces", [1.7, 3.3])
def test_nor_does_breaking_off_what_is_wrong(
    routed: Routed, monkeypatch: pytest.MonkeyPatch, load: float, pieces: float
) -> None:
    size = routed.checkpoint.spec.expert_bytes(routed.checkpoint.spec.moe_layers[0])
    for module in (throttled, segment_times):
        monkeypatch.setattr(module, "PIECE_BYTES", round(size / pieces))
    options: dict[str, Any] = {"tops": 5, "bottoms": 0, "staging": 7, "prefetch": "all", "depth": 3}
    slow = Slow(routed, *placed(routed, (1.0,), POLICIES, **options), load)
    seen, _ = slow.replay().run()
    assert seen.saved_s.any()
    check(slow, monkeypatch)


@pytest.mark.parametrize("policy", POOL_POLICIES)
@pytest.mark.parametrize("load", [0.27, 1.03])
def test_nor_does_a_shared_pool_make_a_difference(
    routed: Routed, monkeypatch: pytest.MonkeyPatch, load: float, policy: Policy
) -> None:
    pool = SharedPool(17, policy)
    options: dict[str, Any] = {"pool": pool, "staging": 6, "prefetch": "all", "depth": 2}
    layout, place = placed(routed, (1.0,), ("lru",), tops=0, bottoms=0, **options)
    check(Slow(routed, layout, place, load), monkeypatch)


@pytest.mark.parametrize("load", LOADS)
def test_nor_do_layers_that_are_cut_and_guessed_differently(
    routed: Routed, monkeypatch: pytest.MonkeyPatch, load: float
) -> None:
    layout, place = placed(
        routed, (0.3, 1.0, 0.0), ("lcp",), tops=4, bottoms=3, staging=6, prefetch="all", depth=2
    )
    modes: tuple[PrefetchMode, ...] = ("bottoms", "off", "all")
    layers = tuple(
        dataclasses.replace(layer, prefetch=mode, prefetch_depth=depth)
        for layer, mode, depth in zip(place.layers, modes, (2, 0, 1), strict=True)
    )
    check(Slow(routed, layout, dataclasses.replace(place, layers=layers), load), monkeypatch)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_misses_that_are_replaced_unless_they_come_are_found_again(
    silent: Routed, monkeypatch: pytest.MonkeyPatch, load: float, depth: int
) -> None:
    """Begun ahead, an expert comes as it is; still in the queue, it falls under the rule."""
    prefetch: PrefetchMode = "all" if depth else "off"
    layout, place = placed(
        silent,
        (1.0,),
        ("lru",),
        low=LOW,
        tops=5,
        bottoms=0,
        staging=4 + depth,
        prefetch=prefetch,
        depth=depth,
    )
    # The first token is a prompt, which is exact: its experts are there.
    layers = tuple(
        dataclasses.replace(layer, hot=tuple(dict.fromkeys([*first.tolist(), *layer.hot])))
        for layer, first in zip(place.layers, silent.trace.ids[0], strict=True)
    )
    slow = Slow(
        silent,
        layout,
        dataclasses.replace(place, layers=layers, on_miss=OnMiss(0.4, 0.8)),
        load,
    )
    run = slow.replay()
    seen, seconds = run.run()
    lost = run.fates(seen)
    assert lost is not None
    found, took_s, stats = slow.run(monkeypatch)
    exact = lost == EXACT
    ready = seen.ready & exact
    for token, layer in np.ndindex(lost.shape[:2]):
        told = told_by_replay(seen._replace(ready=ready), silent.trace, token, layer)
        assert told_by_engine(found[token * lost.shape[1] + layer], 1) == told
    assert took_s == pytest.approx(seconds)
    lowered, left_out = ((lost[1:] == fate).mean() for fate in (LOWERED, LEFT_OUT))
    assert 0 < lowered == pytest.approx(stats.substituted_rate)
    assert 0 < left_out == pytest.approx(stats.skipped_rate)


@pytest.mark.parametrize("staging", [1, 2, 3])
def test_with_few_frames_an_engine_is_hardly_slower(
    routed: Routed, monkeypatch: pytest.MonkeyPatch, staging: int
) -> None:
    """A frame that something unwanted arrives in is free when the engine looks next.

    To the replay it is as soon as that has arrived. No plan has so few frames and fetches ahead.
    """
    layout, place = placed(
        routed, (0.5,), ("lru",), tops=5, bottoms=2, staging=staging, prefetch="all", depth=2
    )
    for load in LOADS:
        slow = Slow(routed, layout, place, load)
        _, seconds = slow.replay().run()
        _, took_s, _ = slow.run(monkeypatch)
        assert seconds * (1 - 1e-9) <= took_s <= 1.05 * seconds
