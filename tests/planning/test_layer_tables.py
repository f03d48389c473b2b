"""The inner solve: every entry is the price of that option, and none that fits is better."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.checkpoint import Checkpoint
from moepack.cost import Held, Parts, missing_after, prefill_layer_s
from moepack.decode_cost import decode_ahead_s, decode_layer_s
from moepack.layer_problem import LEAST_CUTS, MAX_CUTS, Cuts, LayerProblem, cut_options, kept_cut
from moepack.layer_tables import Choice, LayerTable, tabulate, tabulate_all
from moepack.layouts import layer_layout
from moepack.plan import EngineCapabilities
from moepack.prefetching import Ahead
from moepack.segments import cuts
from tests.conftest import TinyFolder
from tests.support.layer_problems import (
    ON_DEMAND,
    STREAMING,
    even_cuts,
    layer_problem,
    power_curve,
)


def price_s(problem: LayerProblem, choice: Choice) -> float:
    """An option priced by itself, from its slots."""
    place = problem.cuts.splits.tolist().index(choice.split)
    sizes = int(problem.cuts.top_bytes[place]), int(problem.cuts.bottom_bytes[place])
    two = all(sizes)
    top_s, bottom_s = (problem.link(size) if size else 0.0 for size in sizes)
    parts = Parts(top_s, bottom_s, choice.split / problem.cuts.width)
    slots = choice.tops, choice.bottoms
    curve = problem.hits[choice.policy]
    top, bottom = (float(curve[n]) if size else 1.0 for n, size in zip(slots, sizes, strict=True))
    held = Held(top, bottom)
    missing = missing_after(problem.used)
    lacking = tuple(
        float(missing[n]) if size else 0.0 for n, size in zip(slots, sizes, strict=True)
    )
    first_s = prefill_layer_s(
        problem.prompt.other_s,
        problem.prompt.split_s if two else problem.prompt.experts_s,
        problem.token.transfer_s,
        problem.token.burst_s,
        parts,
        (lacking[0], lacking[1]),
        staging_experts=problem.staging_experts,
        ahead=choice.prefetch != "off",
    )
    times = problem.token._replace(expert_s=problem.split_s if two else problem.token.expert_s)
    frames, as_ready = problem.staging_experts, problem.engine.as_ready
    if choice.prefetch == "off":
        token_s = decode_layer_s(
            times, problem.top_k, parts, held, staging_experts=frames, as_ready=as_ready
        )
    else:
        of_rank = problem.predicted_held[choice.policy]
        none = np.ones(len(of_rank))
        ranks = Held(
            *(of_rank[:, n] if size else none for n, size in zip(slots, sizes, strict=True))
        )
        token_s = decode_ahead_s(
            times,
            problem.top_k,
            parts,
            held,
            Ahead(choice.prefetch, problem.gap_s, problem.accuracy, ranks),
            choice.depth,
            staging_experts=frames,
            as_ready=as_ready,
        )[choice.depth - 1]
    return float(first_s.item() + (problem.new_tokens - 1) * token_s.item())


def used_bytes(problem: LayerProblem, choice: Choice) -> int:
    place = problem.cuts.splits.tolist().index(choice.split)
    return int(
        choice.tops * problem.cuts.top_bytes[place]
        + choice.bottoms * problem.cuts.bottom_bytes[place]
    )


def options(table: LayerTable) -> list[Choice]:
    return [
        table.choice(int(state), int(cut)) for state, cut in np.argwhere(np.isfinite(table.seconds))
    ]


@pytest.mark.parametrize("engine", [ON_DEMAND, STREAMING])
def test_every_entry_is_the_price_of_its_option(engine: EngineCapabilities) -> None:
    problem = layer_problem(engine=engine)
    found = options(tabulate(problem))
    # Uncut 0 to 8 slots; each of three cuts 0 to 8 tops, and 1 to 8 bottoms beside all of them.
    assert len(found) == 9 + 3 * 17
    assert len({(choice.split, choice.tops, choice.bottoms) for choice in found}) == len(found)
    for choice in found:
        assert choice.seconds == pytest.approx(price_s(problem, choice), rel=1e-9)
        assert choice.budget_bytes == used_bytes(problem, choice)
    assert {choice.prefetch for choice in found} <= set(problem.engine.prefetch)
    assert max(choice.depth for choice in found) <= problem.staging_experts


def test_amounts_of_staging_that_are_ample_can_be_priced_at_once() -> None:
    deepest = layer_problem(engine=STREAMING, staging_experts=8)
    problems = [
        dataclasses.replace(
            deepest,
            staging_experts=2 + depth,
            engine=dataclasses.replace(
                STREAMING,
                prefetch=STREAMING.prefetch if depth else ("off",),
                max_prefetch_depth=depth,
            ),
        )
        for depth in (0, 1, 3)
    ]
    for together, problem in zip(
        tabulate_all([*problems, deepest]), [*problems, deepest], strict=True
    ):
        alone = tabulate(problem)
        assert together.problem is problem
        assert together.variants == alone.variants
        assert together.policy == alone.policy
        assert together.seconds.tolist() == alone.seconds.tolist()
        assert together.variant.tolist() == alone.variant.tolist()


def test_prefetching_is_chosen_where_it_is_better_and_only_what_the_engine_has() -> None:
    chosen = {choice.prefetch for choice in options(tabulate(layer_problem(engine=STREAMING)))}
    assert "all" in chosen
    bottoms = dataclasses.replace(STREAMING, prefetch=("off", "bottoms"))
    chosen = {choice.prefetch for choice in options(tabulate(layer_problem(engine=bottoms)))}
    assert chosen == {"off", "bottoms"}
    # The prompt, whose experts are known from all its tokens together, needs nothing here.
    blind = layer_problem(engine=STREAMING, accuracy=np.zeros(4), used=np.zeros(8))
    assert {choice.prefetch for choice in options(tabulate(blind))} == {"off"}


def test_the_policy_is_the_one_that_hits_most_around_that_size() -> None:
    few, many = power_curve(32, 0.5), power_curve(32, 0.7)
    many[16:32] = 0.98
    few[25] = 0.99  # luck at one size
    problem = layer_problem(experts=32, hits={"lru": few, "lfu": many})
    table = tabulate(problem)
    assert table.policy == ("lru",) * 14 + ("lfu",) * (33 - 14)
    choice = table.choice(32 + 25, 0)
    assert (choice.tops, choice.policy) == (25, "lfu")
    assert choice.seconds == pytest.approx(price_s(problem, choice))


def test_only_policies_of_the_engine_are_chosen_and_of_equals_the_first() -> None:
    curve = power_curve(8, 0.5)
    table = tabulate(layer_problem(hits={"pinned": curve, "lru": curve}))
    assert set(table.policy) == {"pinned"}
    lru = dataclasses.replace(ON_DEMAND, policies=("lru",))
    assert set(tabulate(layer_problem(engine=lru)).policy) == {"lru"}


@given(
    budget_bytes=st.integers(0, 10 * 1024 * 1024),
    exponent=st.floats(0.3, 1.5),
    bytes_per_s=st.floats(1e8, 1e10),
)
@settings(max_examples=60)
def test_no_option_that_fits_is_better_than_that_of_the_frontier(
    budget_bytes: int, exponent: float, bytes_per_s: float
) -> None:
    table = tabulate(layer_problem(exponent=exponent, bytes_per_s=bytes_per_s))
    frontier = table.frontier
    place = int(frontier.within(np.array([budget_bytes]))[0])
    fitting = [choice for choice in options(table) if choice.budget_bytes <= budget_bytes]
    assert frontier.seconds[place] == min(choice.seconds for choice in fitting)
    chosen = table.choice(int(frontier.state[place]), int(frontier.cut[place]))
    assert chosen.budget_bytes == frontier.bytes[place] <= budget_bytes
    assert chosen.seconds == frontier.seconds[place]


@pytest.mark.parametrize("engine", [ON_DEMAND, STREAMING])
def test_the_frontier_holds_what_nothing_undercuts_and_nothing_else(
    engine: EngineCapabilities,
) -> None:
    table = tabulate(layer_problem(engine=engine))
    every = {(choice.budget_bytes, choice.seconds) for choice in options(table)}
    best = {
        one
        for one in every
        if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in every)
    }
    frontier = table.frontier
    found = list(zip(frontier.bytes.tolist(), frontier.seconds.tolist(), strict=True))
    assert found == sorted(best)
    assert found[0][0] == 0


def test_all_in_the_bottom_is_the_same_as_uncut() -> None:
    whole = even_cuts(256, 256, 4096)
    bottom = Cuts(np.array([0]), 256, whole.bottom_bytes, whole.top_bytes)
    tables = [tabulate(layer_problem(cuts=each, engine=STREAMING)) for each in (whole, bottom)]
    assert tables[0].seconds == pytest.approx(tables[1].seconds)
    assert [tables[0].choice(11, 0)[1:4], tables[1].choice(11, 0)[1:4]] == [(256, 3, 0), (0, 0, 3)]


def test_everything_resident_leaves_the_compute() -> None:
    problem = layer_problem()
    table = tabulate(problem)
    token_s = problem.token.other_s + problem.token.shared_s + 2 * 3e-4
    prompt_s = problem.prompt.other_s + problem.prompt.experts_s
    frontier = table.frontier
    assert frontier.seconds[-1] == pytest.approx(prompt_s + 63 * token_s)
    whole = table.choice(int(frontier.state[-1]), int(frontier.cut[-1]))
    assert (whole.tops, whole.budget_bytes) == (problem.num_experts, table.full_bytes)


@pytest.mark.parametrize("engine", [ON_DEMAND, STREAMING])
def test_a_faster_link_makes_no_option_dearer(engine: EngineCapabilities) -> None:
    speeds = np.geomspace(1e7, 1e11, 9)
    found = [
        tabulate(layer_problem(engine=engine, bytes_per_s=float(speed))).seconds for speed in speeds
    ]
    for slow, fast in itertools.pairwise(found):
        known = np.isfinite(slow)
        assert (fast[known] <= slow[known] * (1.0 + 1e-12)).all()


def test_cuts_are_those_of_the_granularity_uncut_first(tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec
    layer = spec.moe_layers[0]
    found = cut_options(spec, layer, spec.dtype)
    moe = spec.moe(layer)
    possible = cuts(moe, spec.hidden_size, spec.dtype)
    assert found.splits[0] == moe.intermediate_size
    assert sorted(found.splits.tolist()) == list(possible[1:])
    assert found.bottom_bytes[0] == 0
    assert found.interior.tolist() == [False] + [True] * (len(possible) - 2)


def test_many_cuts_are_thinned_evenly_more_so_of_many_experts(tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec
    layer = spec.moe_layers[0]

    def splits(experts: int) -> list[int]:
        moe = dataclasses.replace(spec.moe(layer), intermediate_size=16 * 200, num_experts=experts)
        layers = list(spec.layers)
        layers[layer] = dataclasses.replace(layers[layer], moe=moe)
        found = cut_options(dataclasses.replace(spec, layers=tuple(layers)), layer, spec.dtype)
        return sorted(found.splits.tolist())

    for experts, count in ((8, MAX_CUTS), (64, 49), (256, LEAST_CUTS)):
        found = splits(experts)
        assert len(found) == count
        assert {16, 16 * 199, 16 * 200} <= set(found)
        assert np.ptp(np.diff(found[:-1])) <= 16


def test_a_kept_cut_is_the_only_one(tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec
    layer = spec.moe_layers[0]
    for ratio in (0.0, 0.5, 1.0):
        layout = layer_layout(spec, layer, ratio)
        found = kept_cut(spec, layout)
        assert found.splits.tolist() == [layout.split]
        assert (found.top_bytes[0] > 0, found.bottom_bytes[0] > 0) == (ratio > 0, ratio < 1)
