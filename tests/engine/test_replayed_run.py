"""What the replay says of a run that an engine recorded: each of its hits, and its bytes."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from moepack_runtime.tokenizer import Tokenizer

from moepack.activations import activations
from moepack.checkpoint import Checkpoint
from moepack.hardware import find_hardware
from moepack.layout import Layout
from moepack.passes import decode_passes
from moepack.plan import POLICIES, POOL_POLICIES, Placement, Policy, SharedPool
from moepack.replay import Replayer
from moepack.residency import ExpertCache
from moepack.roofline import derive_compute
from moepack.routing import make_profile
from moepack.routing_tables import RoutingTables
from moepack.segment_times import segments_of
from moepack.shipped import shipped_model, shipped_texts
from moepack.stack_ranks import stack_ranks
from moepack.trace import NO_PREDICTION, LayerShape, Trace
from tests.support.caches import half_life_of
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.recorded_run import RecordedRun, record_run

TOP_K = 4
NEW_TOKENS = 64


@functools.cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(shipped_model())


def run(
    ratio: float, prompt_tokens: int, **options: object
) -> tuple[Layout, Placement, RecordedRun]:
    text = shipped_texts()[0].read_text("utf-8")
    prompt = Tokenizer.load(shipped_model()).encode(text)[:prompt_tokens]
    layout = mixed_layout(checkpoint().spec, (ratio,), block_tokens=16)
    place = placement(
        checkpoint().spec,
        layout,
        staging=4,
        context=prompt_tokens + NEW_TOKENS,
        coldest_first=True,
        **options,  # type: ignore[arg-type]
    )
    with open_engine(checkpoint(), layout, place) as engine:
        return layout, place, record_run(engine, prompt, NEW_TOKENS)


@functools.cache
def run_after_a_prompt() -> RecordedRun:
    return run(1.0, 64, tops=9, bottoms=0, policy="lru")[2]


def trace_of(recorded: RecordedRun) -> tuple[Trace, tuple[LayerShape, ...]]:
    """The run as a trace: its prompt is *fit*, what was decoded is *test*."""
    ids = np.stack(recorded.ids, axis=1)
    tokens, layers, top_k = ids.shape
    part = np.full(tokens, 2, dtype=np.uint8)
    part[: recorded.passes[0]] = 0
    trace = Trace(
        ids=ids,
        weights=np.ones(ids.shape, dtype=np.float16),
        predicted=np.full((tokens, layers, 2 * top_k), NO_PREDICTION, dtype=np.uint16),
        sequence=np.zeros(tokens, dtype=np.uint32),
        part=part,
    )
    spec = checkpoint().spec
    return trace, tuple(LayerShape(n, spec.moe(n).num_experts, top_k) for n in recorded.layers)


def check(layout: Layout, place: Placement, recorded: RecordedRun) -> None:
    """Every hit of every decoded token, and what follows from them."""
    spec = checkpoint().spec
    trace, shapes = trace_of(recorded)
    profile = make_profile(
        trace,
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="",
        how="recorded",
        sources=(),
        layers=shapes,
    )
    tables = RoutingTables(profile)
    hardware = find_hardware("cpu-nvme4")
    compute = derive_compute(spec, hardware)
    found = activations(tables, tables.tokens("test"))
    segments = segments_of(spec, compute, layout, hardware.link_seconds)
    started = tables.starting(tuple(layer.hot for layer in place.layers))
    passes = decode_passes(started, found, place, segments, "none")
    hits = np.stack(recorded.hits, axis=1)[recorded.passes[0] :]
    assert np.array_equal(passes.hits, np.take_along_axis(hits, found.order, axis=2))
    told = Replayer(
        spec, compute, tables, hardware.link_seconds, prompt_tokens=1, part="test"
    ).replay(layout, place, as_ready=False)
    assert told.hit_rate == pytest.approx(recorded.stats.hit_rate)
    assert told.ready_rate == pytest.approx(recorded.stats.ready_rate)
    assert told.link_bytes_per_token == pytest.approx(recorded.stats.link_bytes_per_token)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("slots", "bottoms", "ratio"),
    [(TOP_K - 1, 0, 1.0), (9, 0, 1.0), (12, 0, 0.5), (32, 7, 0.5), (0, 10, 0.0)],
)
def test_a_run_is_found_again_event_by_event(
    policy: Policy, slots: int, bottoms: int, ratio: float
) -> None:
    check(*run(ratio, 1, tops=slots, bottoms=bottoms, policy=policy))


@pytest.mark.parametrize("policy", POOL_POLICIES)
@pytest.mark.parametrize("slots", [TOP_K - 1, 60])
def test_a_run_on_a_shared_pool_is_found_again_event_by_event(policy: Policy, slots: int) -> None:
    check(*run(1.0, 1, tops=0, bottoms=0, pool=SharedPool(slots, policy)))


@pytest.mark.parametrize("policy", POLICIES)
def test_after_a_whole_prompt_in_one_pass_the_hit_rate_is_found_within_a_point(
    policy: Policy,
) -> None:
    """Ranks account for one token after the other, an engine for a prompt at once."""
    recorded = run_after_a_prompt()
    trace, shapes = trace_of(recorded)
    rng = np.random.default_rng(0)
    hot = [tuple(rng.permutation(shape.num_experts).tolist()) for shape in shapes]
    half_life = half_life_of(policy)
    each = [half_life] * len(hot) if half_life else []
    ranks = stack_ranks(trace, shapes, hot, policy, each).ids[recorded.passes[0] :]
    edges = [0, *itertools.accumulate(recorded.passes)]
    for slots in (6, 9, 15, 22):
        engine = np.zeros(trace.ids.shape, dtype=np.bool_)
        for index, ranking in enumerate(hot):
            cache = ExpertCache(slots, ranking, policy, half_life_tokens=half_life)
            for begin, end in itertools.pairwise(edges):
                tokens = trace.ids[begin:end, index]
                engine[begin:end, index] = np.isin(
                    tokens, list(cache.step(tokens.tolist()).resident)
                )
        engines = engine[recorded.passes[0] :]
        assert abs((ranks < slots).mean() - engines.mean()) < 0.01
        assert ((ranks < slots) != engines).mean() < 0.025
        if policy == "pinned":
            assert np.array_equal(ranks < slots, engines)
