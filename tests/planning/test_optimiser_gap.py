"""How much the exchange loses against the exact division on shapes and routing of real models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moepack.cache_curves import hit_curves
from moepack.cost import Array, LayerTimes, distinct_experts
from moepack.layer_problem import LayerProblem, PromptTimes
from moepack.layer_tables import LayerTable, tabulate
from moepack.optimiser import optimise
from moepack.plan import EngineCapabilities
from moepack.presets import preset_path
from moepack.routing_model import load_routing_model
from moepack.routing_sampler import sample_trace
from moepack.stack_ranks import stack_ranks
from moepack.trace import LayerShape, Trace, activation_counts, hot_rankings
from tests.support.layer_problems import ON_DEMAND, STREAMING, even_cuts
from tests.support.recordings import load_recording, trace_of

BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)

#: Of the models that were recorded: intermediate and hidden size.
SIZES = {"olmoe": (1024, 2048), "qwen": (1408, 2048)}


def problems_of(
    trace: Trace,
    layers: Sequence[LayerShape],
    sizes: tuple[int, int],
    engine: EngineCapabilities,
) -> list[LayerProblem]:
    """Layers on a link of 10 GB/s; an expert's transfer takes four times its compute.

    Recordings have no predictions: accuracy falls from 0.95, and what is predicted is held as often
    as what is used.
    """
    width, hidden = sizes
    cuts = even_cuts(width, max(16, -(-width // 32 // 16) * 16), 6 * hidden)
    transfer_s = int(cuts.top_bytes[0]) / 1e10
    hot = hot_rankings(trace, layers)
    curves: dict[str, Array] = {
        policy: hit_curves(stack_ranks(trace, layers, hot, policy), trace, layers, "select")
        for policy in ("lru", "lfu", "lcp")
    }
    made = []
    for index, shape in enumerate(layers):
        counts = activation_counts(trace, index, shape.num_experts, shape.top_k, "fit") + 1.0
        hits = {policy: curve[index, : shape.num_experts + 1] for policy, curve in curves.items()}
        ranks = 2 * shape.top_k
        made.append(
            LayerProblem(
                layer=index,
                top_k=shape.top_k,
                cuts=cuts,
                link=lambda size: 1e-5 + size / 1e10,
                token=LayerTimes(other_s=2 * transfer_s, expert_s=transfer_s / 4),
                split_s=transfer_s / 3.8,
                prompt=PromptTimes(20 * transfer_s, 40 * transfer_s, 42 * transfer_s),
                used=distinct_experts(counts / counts.sum(), 256, shape.top_k)[list(hot[index])],
                new_tokens=128,
                hits=hits,  # type: ignore[arg-type]
                staging_experts=ranks,
                engine=engine,
                gap_s=2 * transfer_s,
                accuracy=np.linspace(0.95, 0.05, ranks),
                predicted_held={p: np.tile(h, (ranks, 1)) for p, h in hits.items()},  # type: ignore[misc]
            )
        )
    return made


def gaps(tables: list[LayerTable]) -> list[float]:
    full_bytes = sum(table.full_bytes for table in tables)
    found = [optimise(tables, int(full_bytes * share)) for share in BUDGETS]
    for optimum in found:  # whatever was left out of the search: nothing is better by more
        assert optimum.seconds <= optimum.bound_s * 1.001
        assert optimum.seconds <= optimum.in_quanta.exact_s * (1 + 1e-12)
    return [optimum.in_quanta.gap_to_exact for optimum in found]


@pytest.mark.parametrize("engine", [ON_DEMAND, STREAMING], ids=["on demand", "streaming"])
@pytest.mark.parametrize("model", SIZES)
def test_the_gap_is_below_a_hundredth_on_recorded_routing(
    model: str, engine: EngineCapabilities
) -> None:
    recording = load_recording(model)
    trace = trace_of(recording.texts)
    tables = [tabulate(p) for p in problems_of(trace, recording.layers, SIZES[model], engine)]
    assert max(gaps(tables)) < 0.01


@pytest.mark.parametrize("engine", [ON_DEMAND, STREAMING], ids=["on demand", "streaming"])
@pytest.mark.parametrize(
    ("preset", "shape", "sizes"),
    [
        ("mixtral-8x7b", (32, 8, 2), (14336, 4096)),
        ("qwen1.5-moe-a2.7b", (24, 60, 4), (1408, 2048)),
        ("olmoe-1b-7b", (16, 64, 8), (1024, 2048)),
        ("qwen3-30b-a3b", (94, 128, 8), (1536, 4096)),
    ],
)
def test_the_gap_is_below_a_hundredth_on_shapes_of_real_models(
    preset: str,
    shape: tuple[int, int, int],
    sizes: tuple[int, int],
    engine: EngineCapabilities,
) -> None:
    layers = [LayerShape(number, *shape[1:]) for number in range(shape[0])]
    model = load_routing_model(preset_path(preset, "routing"))
    trace = sample_trace(model, layers, tokens=400, sequences=2, seed=1)
    tables = [tabulate(problem) for problem in problems_of(trace, layers, sizes, engine)]
    assert max(gaps(tables)) < 0.01
