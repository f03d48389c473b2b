"""Hit rates on recorded routing of real models are those that others found on it.

The figures are of caches that are empty before each text. Ours are never empty: they start from
the hot ranking of *fit* and go on from text to text, as the runtime's do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moepack.belady import belady_ranks
from moepack.plan import Policy
from moepack.stack_ranks import Ranks, stack_ranks
from moepack.trace import ROUTING_PARTS, LayerShape, Trace, hot_rankings
from tests.support.recordings import Recording, load_recording, trace_of

SHARES = (0.25, 0.5)

#: What those figures of a count that decays are of.
HALF_LIFE = 64.0

#: A quarter and half of the experts cached. Belady's were told to two digits.
FOUND = {
    ("olmoe", "lru"): (0.582, 0.816),
    ("olmoe", "lfu"): (0.617, 0.838),
    ("olmoe", "lcp"): (0.620, 0.841),
    ("olmoe", "lfu_decay"): (0.622, 0.841),
    ("olmoe", "belady"): (0.76, 0.91),
    ("qwen", "lru"): (0.373, 0.627),
    ("qwen", "lfu"): (0.443, 0.694),
    ("qwen", "lcp"): (0.443, 0.692),
    ("qwen", "lfu_decay"): (0.445, 0.693),
    ("qwen", "belady"): (0.64, 0.83),
}

#: What ours hit more, or less, on the *test* parts of the texts: nothing where only the last
#: tokens matter, and less where counts are carried into a text that uses other experts; little
#: less where they decay.
DIFFERENCE = {
    ("olmoe", "lru"): (0.000, 0.000),
    ("olmoe", "lfu"): (-0.028, -0.039),
    ("olmoe", "lcp"): (-0.020, -0.020),
    ("olmoe", "lfu_decay"): (-0.004, -0.006),
    ("olmoe", "belady"): (0.000, 0.000),
    ("qwen", "lru"): (0.000, 0.000),
    ("qwen", "lfu"): (-0.033, -0.035),
    ("qwen", "lcp"): (-0.025, -0.020),
    ("qwen", "lfu_decay"): (-0.001, -0.003),
    ("qwen", "belady"): (0.000, 0.000),
}


def ranks_of(
    policy: str, trace: Trace, layers: Sequence[LayerShape], hot: Sequence[Sequence[int]]
) -> Ranks:
    if policy == "belady":
        return belady_ranks(trace, layers, hot)
    online: Policy = policy  # type: ignore[assignment]
    half_lives = [HALF_LIFE] * len(layers) if policy == "lfu_decay" else []
    return stack_ranks(trace, layers, hot, online, half_lives).ids


def cold_ranks(recording: Recording, policy: str) -> list[Ranks]:
    """Of each text by itself. A cache is empty that is full of experts that nobody ever uses."""
    layers = [layer._replace(num_experts=2 * layer.num_experts) for layer in recording.layers]
    hot = [[*range(experts // 2, experts), *range(experts // 2)] for _, experts, _ in layers]
    return [ranks_of(policy, trace_of([text]), layers, hot) for text in recording.texts]


def hit_rates(ranks: Ranks, recording: Recording) -> list[float]:
    experts = recording.layers[0].num_experts
    return [float((ranks < round(share * experts)).mean()) for share in SHARES]


@pytest.mark.parametrize(("model", "policy"), FOUND)
def test_hit_rates_of_empty_caches_are_those_found_before(model: str, policy: str) -> None:
    recording = load_recording(model)
    ranks = np.concatenate(cold_ranks(recording, policy))
    digits = 2 if policy == "belady" else 3
    assert hit_rates(ranks, recording) == pytest.approx(
        FOUND[model, policy], abs=0.51 * 10**-digits
    )


@pytest.mark.parametrize(("model", "policy"), FOUND)
def test_counts_carried_from_text_to_text_cost_hits(model: str, policy: str) -> None:
    recording = load_recording(model)
    trace = trace_of(recording.texts)
    test = trace.part == ROUTING_PARTS.index("test")
    cold = np.concatenate(cold_ranks(recording, policy))[test]
    hot = hot_rankings(trace, recording.layers)
    ours = ranks_of(policy, trace, recording.layers, hot)[test]
    difference = np.subtract(hit_rates(ours, recording), hit_rates(cold, recording))
    assert difference == pytest.approx(DIFFERENCE[model, policy], abs=0.001)
