"""Layers for the optimiser, said in a few words."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moepack.cost import Array, LayerTimes, distinct_experts
from moepack.layer_problem import Cuts, LayerProblem, PromptTimes
from moepack.plan import EngineCapabilities, Policy
from moepack.segments import align_up

ON_DEMAND = EngineCapabilities(policies=("lru", "lfu", "lcp", "pinned"), devices=("cpu",))
STREAMING = dataclasses.replace(
    ON_DEMAND, prefetch=("off", "bottoms", "all"), max_prefetch_depth=16, as_ready=True
)


def even_cuts(width: int, step: int, neuron_bytes: int) -> Cuts:
    """Uncut, and every ``step`` neurons."""
    splits = np.array([width, *range(width - step, 0, -step)])
    sizes = ([align_up(int(n) * neuron_bytes) for n in part] for part in (splits, width - splits))
    return Cuts(splits, width, *(np.array(part_bytes) for part_bytes in sizes))


def power_curve(experts: int, exponent: float) -> Array:
    """A hit rate that grows as a power of the share of experts that is held."""
    return np.asarray(np.linspace(0.0, 1.0, experts + 1) ** exponent)


def layer_problem(
    *,
    layer: int = 0,
    experts: int = 8,
    top_k: int = 2,
    cuts: Cuts | None = None,
    bytes_per_s: float = 1e9,
    exponent: float = 0.7,
    skew: float = 0.4,
    engine: EngineCapabilities = ON_DEMAND,
    accuracy: Array | None = None,
    **changes: Any,
) -> LayerProblem:
    """A layer whose hit rates are powers and whose link takes 10 us and its bytes."""
    shares = np.arange(1.0, experts + 1.0) ** -skew
    curves: dict[Policy, Array] = {
        "lru": power_curve(experts, exponent + 0.1),
        "lcp": power_curve(experts, exponent),
    }
    if accuracy is None:
        accuracy = np.linspace(0.9, 0.1, 2 * top_k)
    made = LayerProblem(
        layer=layer,
        top_k=top_k,
        cuts=cuts or even_cuts(256, 64, 4096),
        link=lambda size: 1e-5 + size / bytes_per_s,
        token=LayerTimes(
            other_s=4e-4,
            expert_s=3e-4,
            transfer_s=1e-6,
            shared_s=1e-4,
            burst_s=2e-6,
            ahead_transfer_s=1e-6,
            ahead_burst_s=2e-6,
        ),
        split_s=3.3e-4,
        prompt=PromptTimes(other_s=2e-3, experts_s=8e-3, split_s=8.5e-3),
        used=distinct_experts(shares / shares.sum(), 64, top_k),
        new_tokens=64,
        hits=curves,
        staging_experts=2 * top_k,
        engine=engine,
        gap_s=4e-4,
        accuracy=accuracy,
        predicted_held={policy: np.tile(c, (len(accuracy), 1)) for policy, c in curves.items()},
    )
    return dataclasses.replace(made, **changes)
