"""Conditions that must not change a bit of what an engine computes, drawn at random."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

from moepack_runtime.engine import Engine
from moepack_runtime.predict import Predictor
from moepack_runtime.store import PackStore
from moepack_runtime.transfer import HostileTransfer, ThrottledTransfer, Transfer

from moepack.budget import memory_breakdown
from moepack.checkpoint import Checkpoint
from moepack.layout import Layout
from moepack.plan import (
    POLICIES,
    POOL_POLICIES,
    PREFETCH_MODES,
    LayerPlacement,
    Placement,
    SharedPool,
)
from tests.support.caches import half_life_of
from tests.support.engines import Twin, open_engine
from tests.support.mixed import slots_drawn, with_slots
from tests.support.predictors import Guesses

_CONTEXT = 96


def any_placement(
    checkpoint: Checkpoint, layout: Layout, random: Random, *, pooled: bool
) -> Placement:
    """Slots, rankings, policies, prefetching and staging, all drawn; a context of 96 tokens."""
    spec = checkpoint.spec
    layers = []
    for cut in layout.layers:
        experts = spec.moe(cut.layer).num_experts
        policy = random.choice(POLICIES)
        prefetch = random.choice(PREFETCH_MODES)
        place = LayerPlacement(
            layer=cut.layer,
            budget_bytes=0,
            top_slots=random.randint(0, experts) if cut.split and not pooled else 0,
            bottom_slots=random.randint(0, experts) if cut.split < cut.width else 0,
            policy=policy,
            hot=tuple(random.sample(range(experts), experts)),
            prefetch=prefetch,
            prefetch_depth=0 if prefetch == "off" else random.randint(1, experts),
            half_life_tokens=half_life_of(policy, random.choice((1.0, 7.3, 300.0))),
        )
        if cut.encodings:
            place = with_slots(cut, place, slots_drawn(cut, random))
        layers.append(place)
    everyone = sum(len(place.hot) for place in layers)
    pool = SharedPool(random.randint(1, everyone), random.choice(POOL_POLICIES))
    shared = pool if pooled else None
    staging = random.choice((1, 1, 2, 3, random.randint(4, 20)))
    memory = memory_breakdown(
        spec, layout, layers, staging_experts=staging, context_tokens=_CONTEXT, pool=shared
    )
    return Placement(
        device="cpu",
        fast_budget_bytes=memory.total_bytes,
        staging_experts=staging,
        context_tokens=_CONTEXT,
        prompt_tokens=1,
        new_tokens=1,
        memory=memory,
        layers=tuple(layers),
        readers=random.randint(1, 4),
        pool=shared,
    )


def plain(transfer: Transfer) -> Transfer:
    """The transfer as it is."""
    return transfer


def any_twin(random: Random) -> Twin:
    """A link that brings segments late and in another order, a slow one, or the usual one."""
    hostile = partial(HostileTransfer, seed=random.randrange(1 << 30), max_delay_s=1e-4)
    slow = partial(ThrottledTransfer, rate_bytes_per_s=2e9, latency_s=random.choice((0, 5e-5)))
    twins: list[Twin] = [hostile, hostile, slow, plain]
    return random.choice(twins)


def any_predictor(experts: int, random: Random) -> Predictor | None:
    """Guesses at random among a layer's experts; None for the engine's own."""
    return Guesses(experts, random.randrange(1000)) if random.random() < 0.5 else None


def disturbed(
    checkpoint: Checkpoint, layout: Layout, place: Placement, pack: Path, random: Random
) -> Engine:
    """An engine over a pack, with any link and any guesses."""
    experts = min(checkpoint.spec.moe(number).num_experts for number in checkpoint.spec.moe_layers)
    return open_engine(
        checkpoint,
        layout,
        place,
        store=PackStore.open(pack),
        twin=any_twin(random),
        predictor=any_predictor(experts, random),
    )
